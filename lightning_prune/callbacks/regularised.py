"""Channel pruning after training under a penalty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Union

from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.budget import Scope
from lightning_prune.callbacks.base import Shrink
from lightning_prune.callbacks.channels import Measure
from lightning_prune.callbacks.monitors import Monitors
from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.phases import PhasedPruning
from lightning_prune.callbacks.repair import RepairName
from lightning_prune.callbacks.support import has_no_end
from lightning_prune.criteria import Criterion, CriterionName
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.analysis import Norms
from lightning_prune.penalties import ChannelPenalty, PenaltyName, penalty_from
from lightning_prune.schedules import Position, Schedule, ScheduleName


class RegularisedPruning(PhasedPruning):
    """Channel pruning of a network that a penalty has taught to do without some of its channels.

    The penalty acts at each optimizer step until the last round. What it adds to gradients is there before they are
    clipped, and clipped with them; proximal steps come after the optimizer's own and are not clipped.

    Args:
        penalty: ``"slimming"`` (Liu et al., 2017) or ``"bn_ista"`` (Ye et al., 2018), best with the criterion bn_scale,
            ``"group_lasso"`` (Wen et al., 2016), ``"group_norm"`` (Fang et al., 2023), or a ``ChannelPenalty``.
        penalty_start: Share of the fit after which the penalty begins to act, in [0, 1).
        criterion: As for :class:`~lightning_prune.ChannelPruning`.
        remove, of, schedule, scope, include, exclude, ratios, round_to, min_channels, shrink, norms, inner, verify,
            recalibrate, seed, directory, monitors, repair, repair_batches: As there.

    Raises:
        ConfigurationError: If an argument is wrong, no group has what the penalty acts on, or it would never act.
        BudgetError: If the budget is out of reach on this network.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[RegularisedPruning("slimming", criterion="bn_scale")])
    """

    provenance = "published"

    def __init__(
        self,
        penalty: Union[PenaltyName, ChannelPenalty] = "group_norm",  # noqa: UP007
        penalty_start: float = 0.0, criterion: Union[CriterionName, Criterion] = "l2",  # noqa: UP007
        remove: float = 0.5, of: Measure = "macs",
        schedule: Union[ScheduleName, Schedule] = "one_shot",  # noqa: UP007
        scope: Scope = "global", include: Patterns | None = None, exclude: Patterns | None = None,
        ratios: Mapping[str, float] | None = None, round_to: int = 1,
        min_channels: Union[int, float] = 1,  # noqa: UP007
        shrink: Shrink = "rounds", norms: Norms = "exact", inner: Patterns | None = None, verify: bool = True,
        recalibrate: int = 0, seed: int = 0, directory: str | None = None, monitors: Monitors = "keep",
        repair: RepairName = "none", repair_batches: int = 8,
    ) -> None:  # fmt: skip
        super().__init__(
            criterion, remove, of, schedule, scope, include, exclude, ratios, round_to, min_channels, "keep", shrink,
            norms, inner, verify, recalibrate, seed, directory, monitors, repair, repair_batches,
        )  # fmt: skip
        self.penalty, self.penalty_start = penalty, penalty_start
        self._penalty, self._acting = penalty_from(penalty), False

    @override
    def check_length(self, length: Position) -> None:
        super().check_length(length)
        if self.penalty_start > 0 and has_no_end(length):
            raise ConfigurationError(
                f"penalty_start={self.penalty_start:g} is a share of the fit, which has no end that is known. Give the "
                f"Trainer max_epochs or max_steps, or leave penalty_start at 0."
            )

    @override
    def check_phases(self, last: Position) -> None:
        if not 0 <= self.penalty_start < min(last.fraction, 1):
            raise ConfigurationError(
                f"penalty_start must be a share of the fit, at least 0 and before the last round at "
                f"{min(last.fraction, 1):g}, but is {self.penalty_start}: later the penalty would never act."
            )

    @override
    def prepare(self, network: Network) -> None:
        super().prepare(network)
        self._penalty.check({name: network.graph.groups[name] for name in self._eligible(network)})
        self.learnt["costs"] = self.channel_costs(network)

    @override
    def before_batch(self, network: Network, position: Position) -> None:
        self._acting = self.under_way(network) and position.fraction >= self.penalty_start

    @override
    def before_step(self, network: Network, optimizer: Optimizer) -> None:
        if self._acting:
            self._penalty.before_step(self.step(network, optimizer))

    @override
    def after_step(self, network: Network, optimizer: Optimizer) -> None:
        if self._acting:
            self._penalty.after_step(self.step(network, optimizer))

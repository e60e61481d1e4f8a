"""Growing regularisation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Union

import torch
from torch import Tensor
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
from lightning_prune.criteria import Criterion, CriterionName
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.analysis import Norms
from lightning_prune.penalties import Growth, add_decay
from lightning_prune.schedules import OneShot, Position, Unit


class GReg(PhasedPruning):
    """Presses what is to go towards zero with an L2 penalty that grows, then removes it (Wang et al., 2021).

    Variant 1 chooses what goes before the first step. Variant 2 first lets a small coefficient grow on all channels
    alike, which drives them apart, then chooses; those that stay are set free, the others pressed on from there. The
    source penalises filters; here it is all that is removed with a channel. Gradients are clipped after this.

    Args:
        variant: 1 (GReg-1) or 2 (GReg-2).
        remove: Fraction to remove in all.
        of: What it is a fraction of.
        criterion: What chooses.
        at: Position of the only round; what is left between the end of the growth and this lets the rest settle.
        unit: Of ``at``: ``"fraction"`` of the fit, ``"epoch"`` or ``"step"``.
        delta: Growth of the coefficient each time (the source: 1e-4); default: what reaches the ceiling by the round.
        every: Optimizer steps from one time to the next.
        ceiling: Last coefficient. Learning rate times this must be well below 1.
        first_delta: As delta, for the coefficient on all channels (the source: 1e-5), in at most half of the steps.
        first_ceiling: Its last value.
        scope, include, exclude, ratios, round_to, min_channels, shrink, norms, inner, verify, recalibrate, seed,
            directory, monitors, repair, repair_batches: As for :class:`~lightning_prune.ChannelPruning`.

    Raises:
        ConfigurationError: If an argument is wrong, or the growth does not fit into the steps before the round.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[GReg(remove=0.5)], logger=False)
    """

    provenance = "published"

    def __init__(
        self,
        variant: Literal[1, 2] = 1, remove: float = 0.5, of: Measure = "macs",
        criterion: Union[CriterionName, Criterion] = "l1",  # noqa: UP007
        at: float = 0.6, unit: Unit = "fraction", delta: float | None = None, every: int = 5, ceiling: float = 1.0,
        first_delta: float | None = None, first_ceiling: float = 0.01, scope: Scope = "global",
        include: Patterns | None = None, exclude: Patterns | None = None, ratios: Mapping[str, float] | None = None,
        shrink: Shrink = "rounds", directory: str | None = None, round_to: int = 1,
        min_channels: Union[int, float] = 1,  # noqa: UP007
        norms: Norms = "exact", inner: Patterns | None = None, verify: bool = True, recalibrate: int = 0, seed: int = 0,
        monitors: Monitors = "keep", repair: RepairName = "none", repair_batches: int = 8,
    ) -> None:  # fmt: skip
        super().__init__(
            criterion, remove, of, OneShot(at, unit), scope, include, exclude, ratios, round_to, min_channels, "keep",
            shrink, norms, inner, verify, recalibrate, seed, directory, monitors, repair, repair_batches,
        )  # fmt: skip
        if variant not in (1, 2):
            raise ConfigurationError(f"variant must be the number 1 or 2, but is {variant!r}.")
        self.variant, self.at, self.unit, self.every = variant, at, unit, every
        self.delta, self.ceiling, self.first_delta, self.first_ceiling = delta, ceiling, first_delta, first_ceiling

    @override
    def check_phases(self, last: Position) -> None:
        steps = math.floor(last.step) if math.isfinite(last.step) else 0
        start, self._choice = 0.0, 0
        if self.variant == 2:
            self._first = Growth.within(steps // 2, self.first_delta, self.every, self.first_ceiling)
            start, self._choice = self.first_ceiling, self._first.steps
        self._second = Growth.within(steps - self._choice, self.delta, self.every, self.ceiling, start)

    @override
    def before_batch(self, network: Network, position: Position) -> None:
        if self.under_way(network):
            since = position.step - self._choice
            self._coefficient = self._first.after(position.step) if since < 0 else self._second.after(since)
            if since >= 0 and "going" not in self.per_unit:
                self.per_unit["going"] = {name: ~mask for name, mask in self.foreseen(network).items()}

    @override
    def before_step(self, network: Network, optimizer: Optimizer) -> None:
        if self.under_way(network):
            step, going = self.step(network, optimizer), self.per_unit.get("going", {})
            for name, group in step.groups.items():
                add_decay(group, step, self._coefficient * going.get(name, torch.ones(group.width)))

    @override
    def select(self, network: Network, level: float) -> dict[str, Tensor]:
        going, widths = self.per_unit.get("going", {}), network.graph.widths
        if going and all(len(mask) == widths.get(name) for name, mask in going.items()):
            return {name: ~mask for name, mask in going.items()}
        return super().select(network, level)  # a group of which some should go cannot be cut after all: others go

"""Soft filter pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Union

from typing_extensions import override

from lightning_prune.budget import Scope
from lightning_prune.callbacks.base import Shrink
from lightning_prune.callbacks.channels import Measure
from lightning_prune.callbacks.monitors import Monitors
from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.phases import PhasedPruning
from lightning_prune.criteria import Criterion, CriterionName
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.analysis import Norms
from lightning_prune.masks import Masks
from lightning_prune.schedules import OneShot, Position, Unit


class SoftFilterPruning(PhasedPruning):
    """Zeroes the least important channels after each epoch, yet lets them train on (He et al., 2018).

    A zeroed channel may come back in the next epoch, and another be zeroed in its place; those that are the least
    important at the only round go for good. As many are zeroed each time as will go. The source zeroes the filters that
    make a channel; here it is what switches the channel off exactly, mostly the weights that read it.

    Args:
        remove: Fraction to remove in all, in [0, 1).
        of: What it is a fraction of.
        criterion: What matters; the source takes the 2-norm of the filters, here it is that of all coupled weights.
        every: Number of epochs after which channels are zeroed, again and again.
        at: Position of the only round.
        unit: Of ``at``: ``"fraction"`` of the fit, ``"epoch"`` or ``"step"``.
        scope: This and all others: as for :class:`~lightning_prune.ChannelPruning`.
        include: Channels that may go.
        exclude: Channels that stay.
        ratios: Fixed fractions by pattern.
        round_to: Widths become multiples of this.
        min_channels: Fewest channels of a group.
        shrink: When channels are removed physically.
        norms, inner: What else may go of transformers.
        verify: Whether each shrink is checked.
        recalibrate: Batches to re-estimate batch-norm statistics on.
        seed: Seed of random criteria.
        directory: Where the checkpoint and the report are written.
        monitors: What ``EarlyStopping`` and ``ModelCheckpoint`` do about a round.

    Raises:
        ConfigurationError: If an argument is wrong, or the round comes before anything was zeroed.
        BudgetError: If the budget is out of reach on this network.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[SoftFilterPruning(remove=0.4)], logger=False)
    """

    provenance = "published"

    def __init__(
        self,
        remove: float = 0.5,
        of: Measure = "macs",
        criterion: Union[CriterionName, Criterion] = "l2",  # noqa: UP007
        every: int = 1,
        at: float = 0.8,
        unit: Unit = "fraction",
        scope: Scope = "global",
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        ratios: Mapping[str, float] | None = None,
        round_to: int = 1,
        min_channels: Union[int, float] = 1,  # noqa: UP007
        shrink: Shrink = "rounds",
        norms: Norms = "exact",
        inner: Patterns | None = None,
        verify: bool = True,
        recalibrate: int = 0,
        seed: int = 0,
        directory: str | None = None,
        monitors: Monitors = "keep",
    ) -> None:
        super().__init__(
            criterion, remove, of, OneShot(at, unit), scope, include, exclude, ratios, round_to, min_channels,
            shrink=shrink, norms=norms, inner=inner, verify=verify, recalibrate=recalibrate, seed=seed,
            directory=directory, monitors=monitors,
        )  # fmt: skip
        if every < 1:
            raise ConfigurationError(f"every is a number of epochs, so at least 1, but is {every}.")
        self.every, self.at, self.unit = every, at, unit

    @override
    def check_phases(self, last: Position) -> None:
        if last.epoch <= self.every:
            raise ConfigurationError(
                f"channels are zeroed for the first time after epoch {self.every}, but the round that removes them is "
                f"at epoch {last.epoch:g}, and not after that. Train longer, or prune later."
            )

    @override
    def before_batch(self, network: Network, position: Position) -> None:
        times = int(position.epoch) // self.every
        if self.under_way(network) and times > 0 and times != self.learnt.get("times"):
            self.learnt["times"] = times
            zeroed = Masks(network.graph)
            zeroed.set(self.foreseen(network))
            zeroed.apply(network.tensors)

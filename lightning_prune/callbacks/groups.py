"""What all methods do that choose channels: remove or mask what was selected."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.support import refuse_followers
from lightning_prune.errors import BudgetError, ShrinkError
from lightning_prune.surgery.resize import Cut, read


class ChannelCallback(PruningCallback):
    """Base of the methods that choose channels, in :meth:`select`."""

    @abstractmethod
    def select(self, network: Network, level: float) -> dict[str, Tensor]:
        """Choose the units to keep.

        Args:
            network: The network as it is.
            level: Share of the budget that must be reached by this round, in (0, 1].

        Returns:
            For each group that may be cut a bool mask of shape ``[units]``, True = keep.
        """

    @property
    def per_unit(self) -> dict[str, dict[str, Tensor]]:
        """What the method has learnt of units: by a name of its choice, tensors ``[units, ...]`` by group name.

        They follow each shrink, and are saved in checkpoints. So do weights behind gates, in ``learnt["dense"]``.
        """
        found: dict[str, dict[str, Tensor]] = self.learnt.setdefault("units", {})
        return found

    @override
    def follow(self, keep: Mapping[str, Tensor], cuts: Mapping[str, Sequence[Cut]]) -> None:
        for values in self.per_unit.values():
            values.update({name: values[name][keep[name].to(values[name].device)] for name in keep if name in values})
        dense: dict[str, Tensor] = self.learnt.get("dense", {})
        dense.update({name: read(dense[name], axes) for name, axes in cuts.items() if name in dense})

    @override
    def carry_out(self, network: Network, level: float) -> None:
        keep = self._selected(network, level, {})
        if self.shrink == "rounds":
            self._shrink(network, level, keep)
        else:
            network.masks.set(keep)
            network.hold_masks()

    def _selected(self, network: Network, level: float, otherwise: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The units to keep; where groups that must stay put the budget out of reach, what there is otherwise."""
        try:
            keep: Mapping[str, Tensor] = self.select(network, level)
        except BudgetError as problem:
            if not network.whole:
                raise
            rank_zero_warn(f"with {', '.join(network.whole)} as wide as it is this round misses its budget: {problem}")
            keep = {name: mask for name, mask in otherwise.items() if name in network.graph.groups}
        return network.broadcast(keep)

    def _shrink(self, network: Network, level: float, keep: Mapping[str, Tensor]) -> None:
        """Remove channels; where some cannot go after all, others go instead."""
        while True:
            refuse_followers(network.followers.left_behind(network.graph.groups, keep))
            try:
                self.follow(keep, network.shrink(keep, self.verify).cuts)
                return
            except ShrinkError as problem:
                if not network.give_up(problem):
                    raise
                rank_zero_warn(f"{problem}. Training goes on with {', '.join(problem.groups)} as wide as it is.")
            keep = self._selected(network, level, keep)

"""What earlier runs of a network have shown, for later ones that may not show it any more."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_prune.graph.channels import ChannelGroup, Refusal
from lightning_prune.graph.labels import Frozen, LabelSpace

if TYPE_CHECKING:
    from lightning_prune.graph.grouping import Leaf, Places

Position = tuple[str, int, Tensor]
"""A tensor's name, one of its dimensions, and the positions there of each unit, of shape ``[units, k]``."""


class Known(NamedTuple):
    """Which positions went together, and which tensors were used at all.

    A loss that is left out after the first epochs, or a network that is copied into another one every hundred steps,
    is seen in some runs only. What belongs together for once has to be cut together ever after.

    Attributes:
        groups: Slots of each channel group.
        used: Names of the tensors that were used. What is in no group of theirs stays whole.
        reasons: Why parts stayed whole, by what a refusal calls them.
    """

    groups: Mapping[str, Sequence[Position]] = {}
    used: Collection[str] = ()
    reasons: Mapping[str, str] = {}

    def hold(self, space: LabelSpace, leaves: Sequence[Leaf]) -> None:
        """Have the labels of a network know of it.

        Args:
            space: Where the labels come from.
            leaves: Its dimensions of tensors.
        """
        ids = {(leaf.tensor, leaf.dim): leaf.ids for leaf in leaves}
        free = {place: torch.zeros(len(labels), dtype=torch.bool) for place, labels in ids.items()}
        for slots in self.groups.values():
            present = [(tensor, dim, index) for tensor, dim, index in slots if (tensor, dim) in ids]
            labels = [ids[tensor, dim][index] for tensor, dim, index in present]
            for (tensor, dim, index), own in zip(present, labels, strict=True):
                free[tensor, dim][index.flatten()] = True
                space.unite(labels[0][:, :1], own)
        for (tensor, dim), labels_there in ids.items():
            if tensor in self.used and not bool((there := free[tensor, dim]).all()):
                space.frozen.append(Frozen(labels_there[~there], self.reasons.get(f"{tensor} (dim {dim})")))

    @property
    def names(self) -> dict[Places, str]:
        """What the groups were called."""
        return {frozenset((t, d, i.shape[1]) for t, d, i in slots): name for name, slots in self.groups.items()}

    def plain(self) -> dict[str, Any]:
        """The same in plain types, of which ``Known(**plain)`` makes it again."""
        groups = {name: [list(slot) for slot in slots] for name, slots in self.groups.items()}
        return {"groups": groups, "used": list(self.used), "reasons": dict(self.reasons)}

    def after(self, cuts: Mapping[str, Sequence[tuple[int, Tensor]]]) -> Known:
        """The same for tensors that were resized since.

        Args:
            cuts: For each of them the positions that were read along some dimensions. Of one that was read several
                times nothing is known any more.
        """
        axes = {(tensor, dim): positions for tensor, read in cuts.items() for dim, positions in read}
        grown = {tensor for (tensor, _), positions in axes.items() if len(positions) > len(torch.unique(positions))}
        groups: dict[str, list[Position]] = {}
        for name, slots in self.groups.items():
            if grown.isdisjoint(tensor for tensor, _, _ in slots):
                groups[name] = [(t, d, _moved(index, axes.get((t, d)))) for t, d, index in slots]
        return Known(groups, sorted(set(self.used) - grown), self.reasons)


def known_of(groups: Iterable[ChannelGroup], used: Collection[str], refused: Iterable[Refusal]) -> Known:
    """What a trace has found."""
    slots = {group.name: [(s.tensor, s.dim, s.index) for s in group.slots] for group in groups}
    return Known(slots, sorted(used), dict(refused))


def _moved(index: Tensor, kept: Tensor | None) -> Tensor:
    """Where the units are whose positions were all kept."""
    if kept is None:
        return index
    kept = kept.cpu()
    place = torch.full((max(int(index.max()), int(kept.max())) + 1,), -1)
    place[kept] = torch.arange(len(kept))
    moved = place[index]
    return moved[(moved >= 0).all(1)]

"""From units to channel groups: what each dimension of each tensor does, and which units are alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune.graph.channels import ChannelGroup, Role, Slot
from lightning_prune.graph.labels import NEVER_ZERO, SOLID, ZEROED, LabelSpace, components

_ROLES: tuple[Role, ...] = ("consumer", "producer", "scale", "statistic", "bias")
Signature = tuple[tuple[int, int], ...]
"""Numbers of leaves, with the number of positions that belong to one unit."""


class Leaf(NamedTuple):
    """One dimension of one parameter or buffer, with its labels."""

    tensor: str
    dim: int
    ids: Tensor


Places = frozenset[tuple[str, int, int]]
"""Dimensions of tensors that are cut together, with how many of their positions belong to one unit."""


def places(group: ChannelGroup) -> Places:
    """What a group is made of."""
    return frozenset((slot.tensor, slot.dim, slot.index.shape[1]) for slot in group.slots)


class LeafTable:
    """Every position of every leaf, end to end: its label, the number of its leaf and its place in it.

    Args:
        leaves: The leaves.
        space: Where their labels come from, with all that was learnt of them.

    Attributes:
        roles: What each leaf does with its channels.
    """

    def __init__(self, leaves: Sequence[Leaf], space: LabelSpace) -> None:
        """See the class."""
        self._leaves = leaves
        self._space = space
        empty = torch.zeros(0, dtype=torch.int64)
        self._ids = torch.cat([empty, *(leaf.ids for leaf in leaves)])
        numbers = (torch.full_like(leaf.ids, number) for number, leaf in enumerate(leaves))
        self._leaf = torch.cat([empty, *numbers])
        self._position = torch.cat([empty, *(torch.arange(len(leaf.ids)) for leaf in leaves)])
        self.roles, self._read_with = self._find_roles()
        self._never_zero = self._leaves_marked(NEVER_ZERO)
        self._zeroed = self._leaves_marked(ZEROED)

    def covered(self, labels: Tensor) -> Tensor:
        """For each leaf how many of its positions carry one of the labels (a bool for each label)."""
        return torch.bincount(self._leaf[labels[self._ids]], minlength=len(self._leaves))

    def groups(
        self,
        roots: Tensor,
        zeroed: Tensor,
        approximate: Tensor,
        tensors: Mapping[str, Tensor],
        names: Mapping[Places, str],
    ) -> list[tuple[ChannelGroup, Tensor]]:
        """Units that own the same number of positions of the same tensor dimensions form a group.

        Args:
            roots: The unit of each label; ``SOLID`` for what stays whole.
            zeroed: For each label whether its unit is switched off only by zeroing all that makes it.
            approximate: For each label whether its unit is normalised over.
            tensors: The tensors by name.
            names: What groups are called that were found before, so that none takes the name of another that is gone.

        Returns:
            The groups, each with the roots of its units.
        """
        owners = roots[self._ids]
        order = torch.argsort(owners, stable=True)
        order = order[owners[order] != SOLID]
        unit_roots, sizes = torch.unique_consecutive(owners[order], return_counts=True)
        starts = sizes.cumsum(0) - sizes
        families: dict[Signature, list[Tensor]] = defaultdict(list)
        for signature, units in _stretches(owners[order], self._leaf[order]):
            families[signature].append(units)
        found = []
        for signature, members in families.items():
            units = torch.cat(members)
            span = torch.arange(int(sizes[units[0]]))
            positions = self._position[order[starts[units, None] + span]]
            group = self._group(signature, positions, bool(zeroed[unit_roots[units]].any()), tensors)
            group = replace(group, approximate=bool(approximate[unit_roots[units]].any()))
            found.append((group, unit_roots[units]))
        taken = {names[key] for group, _ in found if (key := places(group)) in names}
        named = []
        for group, units in found:
            name, copies = names.get(places(group)), 1
            while name is None:
                candidate = group.name if copies == 1 else f"{group.name}#{copies}"
                name = None if candidate in taken else candidate
                copies += 1
            taken.add(name)
            named.append((replace(group, name=name), units))
        return named

    def _group(
        self, signature: Signature, positions: Tensor, zero_all: bool, tensors: Mapping[str, Tensor]
    ) -> ChannelGroup:
        slots, start = [], 0
        for number, count in signature:
            leaf = self._leaves[number]
            slots.append(Slot(leaf.tensor, leaf.dim, positions[:, start : start + count], self.roles[number]))
            start += count
        makers = [slot for slot in slots if slot.role == "producer"] or slots
        name = makers[0].tensor.rpartition(".")[0] or makers[0].tensor
        zeroable = tuple(slot for slot, (leaf, _) in zip(slots, signature, strict=True) if leaf not in self._never_zero)
        readers = tuple(slot for slot in zeroable if slot.role == "consumer")
        others = {id(slots[i]) for i, (leaf, _) in enumerate(signature) if leaf in self._zeroed | self._read_with}
        off = tuple(slot for slot in zeroable if slot.role == "consumer" or id(slot) in others)
        pattern = tuple(sorted((s.role, s.dim, s.index.shape[1], tuple(tensors[s.tensor].shape[2:])) for s in slots))
        return ChannelGroup(name, tuple(slots), zeroable if zero_all or not readers else off, pattern)

    def _find_roles(self) -> tuple[list[Role], set[int]]:
        """The role of each leaf, as it is used itself, or else what is computed from parameters alone with it.

        Also the numbers of the leaves with which something is computed that reads: it is zero only where they are.
        """
        static = components(self._space.count, self._space.static_edges)
        itself = {role: self._leaves_with(self._marked_labels(role)) for role in _ROLES}
        derived = {}
        for role in _ROLES:
            families = torch.zeros(self._space.count, dtype=torch.bool)
            families[static[self._marked_labels(role)]] = True
            derived[role] = self._leaves_with(families[static])
        result: list[Role] = []
        for number in range(len(self._leaves)):
            found = [role for role in _ROLES if itself[role][number]]
            found = found or [role for role in _ROLES if derived[role][number]]
            result.append(found[0] if found else "producer")
        return result, {number for number, reads in enumerate(derived["consumer"]) if reads}

    def _marked_labels(self, mark: str) -> Tensor:
        """For each label whether it carries a mark."""
        marked = torch.zeros(self._space.count, dtype=torch.bool)
        ids = self._space.marks.get(mark)
        if ids:
            marked[torch.cat(ids)] = True
        return marked

    def _leaves_marked(self, mark: str) -> set[int]:
        """Numbers of the leaves that have a label with a mark."""
        return {number for number, marked in enumerate(self._leaves_with(self._marked_labels(mark))) if marked}

    def _leaves_with(self, labels: Tensor) -> list[bool]:
        """For each leaf whether it has one of the labels."""
        found = torch.zeros(len(self._leaves), dtype=torch.bool)
        found[self._leaf[labels[self._ids]]] = True
        return found.tolist()


def _stretches(roots: Tensor, leaves: Tensor) -> Iterator[tuple[Signature, Tensor]]:
    """Stretches of units that own equally many positions of the same leaves; both tensors sorted by unit, then leaf."""
    if not len(roots):
        return
    base = int(leaves.max()) + 1
    runs, counts = torch.unique_consecutive(roots * base + leaves, return_counts=True)
    codes = torch.stack([runs % base, counts])
    _, lengths = torch.unique_consecutive(runs // base, return_counts=True)
    unit = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    before = (torch.arange(len(runs)) - lengths[unit]).clamp(min=0)
    differs = torch.ones(len(lengths), dtype=torch.bool)
    differs[1:] = lengths[1:] != lengths[:-1]
    differs[unit[(codes != codes[:, before]).any(0)]] = True
    first_runs = lengths.cumsum(0) - lengths
    heads = differs.nonzero().flatten().tolist()
    for head, end in zip(heads, [*heads[1:], len(lengths)], strict=True):
        start = int(first_runs[head])
        signature = codes[:, start : start + int(lengths[head])].T.tolist()
        yield tuple((leaf, count) for leaf, count in signature), torch.arange(head, end)

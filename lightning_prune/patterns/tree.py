"""Binary decision trees over what is either on or off."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Leaf(NamedTuple):
    """A leaf, and the way to it.

    Attributes:
        path: The unit asked for at each turn, and whether it is on, from the root down.
        samples: Number of samples that come here.
        hits: How many of them have the property.
    """

    path: tuple[tuple[int, bool], ...]
    samples: int
    hits: int


@dataclass(frozen=True)
class Tree:
    """A decision tree; its nodes are numbered level by level, from the root with number 0.

    Attributes:
        unit: For each node the unit that it asks for, or -1 in a leaf.
        children: For each node where samples go in which the unit is off, and where those in which it is on.
        samples: For each node the number of samples that come there.
        hits: For each node how many of them have the property.
    """

    unit: list[int] = field(default_factory=list)
    children: list[tuple[int, int]] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)

    def leaves(self) -> Iterator[Leaf]:
        """All leaves, those on the side of "off" first."""
        pending: list[tuple[int, tuple[tuple[int, bool], ...]]] = [(0, ())]
        while pending:
            node, path = pending.pop()
            unit, (off, on) = self.unit[node], self.children[node]
            if unit < 0:
                yield Leaf(path, self.samples[node], self.hits[node])
            else:
                pending += [(on, (*path, (unit, True))), (off, (*path, (unit, False)))]


def grow_tree(signatures: Tensor, property_: Tensor, max_depth: int = 8, least: int = 1) -> Tree:
    """Fit a tree that tells by the units which samples have a property, by the entropy (Quinlan, 1986).

    A node that is not pure asks for the unit with the largest gain of information, be it none; of equal ones for the
    first. All nodes of a level are split together.

    Args:
        signatures: Which units are on, bool of shape ``[samples, units]``.
        property_: Which samples have the property, bool of shape ``[samples]``.
        max_depth: Most questions in a row.
        least: Fewest samples in a leaf.

    Example:
        >>> on = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.bool)
        >>> tree = grow_tree(on, torch.tensor([False, False, False, True]))
        >>> tree.unit
        [0, -1, 1, -1, -1]
        >>> list(tree.leaves())[-1]
        Leaf(path=((0, True), (1, True)), samples=1, hits=1)
    """
    tree = Tree()
    data, property_ = signatures.float(), property_.bool()
    place = torch.zeros(len(data), dtype=torch.int64, device=data.device)  # in which node of the level a sample is
    width = 1
    for depth in range(max_depth + 1):
        samples, hits = torch.bincount(place, minlength=width), torch.bincount(place[property_], minlength=width)
        gains = _gains(data, property_, place, samples.double(), hits.double(), least)
        best, unit = gains.max(1)
        splits = best.isfinite() & (hits > 0) & (hits < samples) & (depth < max_depth)
        number = splits.cumsum(0) - 1
        first = len(tree.unit) + width
        tree.unit.extend(unit.where(splits, -1).tolist())
        tree.children.extend(
            (first + 2 * rank, first + 2 * rank + 1) if split else (-1, -1)
            for split, rank in zip(splits.tolist(), number.tolist(), strict=True)
        )
        tree.samples.extend(samples.tolist())
        tree.hits.extend(hits.tolist())
        width = 2 * int(splits.sum())
        if not width:
            break
        on = data.gather(1, unit[place][:, None]).flatten().long()
        goes_on = splits[place]
        place = (2 * number[place] + on)[goes_on]
        data, property_ = data[goes_on], property_[goes_on]
    return tree


def _gains(data: Tensor, property_: Tensor, place: Tensor, samples: Tensor, hits: Tensor, least: int) -> Tensor:
    """Bits gained by asking each unit in each node, ``[nodes, units]``; minus infinity where a leaf would be small."""
    shape = len(samples), data.shape[1]
    on = data.new_zeros(shape).index_add_(0, place, data).double()
    on_hits = data.new_zeros(shape).index_add_(0, place[property_], data[property_]).double()
    off, off_hits = samples[:, None] - on, hits[:, None] - on_hits
    gains = _bits(samples, hits)[:, None] - _bits(on, on_hits) - _bits(off, off_hits)
    return gains.masked_fill((on < least) | (off < least), -torch.inf)


def _bits(samples: Tensor, hits: Tensor) -> Tensor:
    """Entropy of the property, summed over samples."""
    misses = samples - hits
    return (torch.xlogy(samples, samples) - torch.xlogy(hits, hits) - torch.xlogy(misses, misses)) / math.log(2)

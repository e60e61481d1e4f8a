"""What belongs together: channel groups and the slots they are made of."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from lightning_prune.text import COLUMNS, aligned, listed, shortened, wrapped

if TYPE_CHECKING:
    from lightning_prune.graph.analysis import Analysis

Role = Literal["producer", "bias", "scale", "statistic", "consumer"]


@dataclass(frozen=True, eq=False)
class Slot:
    """One slice family of a channel group: which positions of one dimension of one tensor belong to which unit.

    Args:
        tensor: Full name of the parameter or buffer, as in ``named_parameters()`` / ``named_buffers()``.
        dim: Dimension of that tensor which is cut.
        index: Positions along ``dim`` of each unit, int64 of shape ``[units, k]``.
        role: What the tensor does with the channel: ``producer`` makes it (a convolution's rows), ``bias`` adds to it,
            ``scale`` multiplies it, ``statistic`` is a running statistic of it, ``consumer`` reads it.
    """

    tensor: str
    dim: int
    index: Tensor
    role: Role

    def __repr__(self) -> str:
        return f"Slot({self.tensor!r}, dim={self.dim}, {self.role}, {len(self.index)} units)"

    def gather(self, tensor: Tensor) -> Tensor:
        """The entries of ``tensor`` that belong to each unit, shape ``[units, entries]``."""
        index = self.index.to(tensor.device)
        return tensor.index_select(self.dim, index.flatten()).movedim(self.dim, 0).reshape(len(index), -1)

    def positions(self, units: Tensor) -> Tensor:
        """Positions along ``dim`` of the given units (int64 indices or a bool mask), flat."""
        return self.index[units].flatten()


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """All slices of all parameters and buffers that must go together when one channel goes.

    Args:
        name: Name of the group: the module that produces its channels.
        slots: Every slice family of the group.
        off: The slots to zero in order to switch a unit off exactly: its consumers, or, where a consumer has no
            parameters, everything that makes it.
        pattern: Equal for groups of the same shape pattern (used by the isomorphic scope).
        approximate: Whether its channels are normalised over, so that without some of them the others are normalised
            by other statistics.
    """

    name: str
    slots: tuple[Slot, ...]
    off: tuple[Slot, ...]
    pattern: Hashable = None
    approximate: bool = False

    def __repr__(self) -> str:
        return f"ChannelGroup({self.name!r}, {self.width} units, {len(self.slots)} slots)"

    @property
    def width(self) -> int:
        """Number of units (channels that can be removed one by one)."""
        return len(self.slots[0].index)

    @property
    def makers(self) -> tuple[str, ...]:
        """The modules that make its channels, or the names of parameters that the network itself holds."""
        paths = (slot.tensor.rpartition(".")[0] or slot.tensor for slot in self.with_role("producer"))
        return tuple(dict.fromkeys(paths))

    def with_role(self, *roles: Role) -> tuple[Slot, ...]:
        """The slots that play one of the given roles."""
        return tuple(slot for slot in self.slots if slot.role in roles)


class Refusal(NamedTuple):
    """A part of the network that stays whole, and why."""

    path: str
    reason: str


class Extent(NamedTuple):
    """Size of one dimension as a function of group widths: ``fixed + sum(count * width)``."""

    fixed: int
    per_unit: tuple[tuple[str, int], ...] = ()

    def size(self, widths: Mapping[str, int]) -> int:
        """The size of the dimension when the groups have the given widths."""
        return self.fixed + sum(count * widths[group] for group, count in self.per_unit)


class Operation(NamedTuple):
    """One executed operator whose multiply-accumulates are counted."""

    function: object
    arguments: tuple[object, ...]
    result: tuple[Extent, ...]


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """The channel groups of one network, as found by running it.

    Attributes:
        groups: Channel groups by name.
        refused: Parts that stay whole, with the reason.
        tensors: Shape of every parameter and float buffer as a function of the group widths, by name.
        operations: Operators that multiply and accumulate in the run whose cost is counted.
        batch_size: Number of samples in the batch that ``operations`` were recorded on.
        evidence: What the graph was derived from; surgery proves a cut against it.

    Example:
        >>> import torch
        >>> from lightning_prune import trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> trace(net, torch.zeros(2, 8))
        ChannelGraph(1 channel group with 6 units, 2 parts stay whole)
        >>> print(trace(net, torch.zeros(2, 8)))
        channel group  width  tensors
        0                  6        3
        <BLANKLINE>
        stays whole
          0.weight (dim 1): meets a tensor of fixed size (...)
          2.weight (dim 0): is an output of the network
    """

    groups: Mapping[str, ChannelGroup]
    refused: tuple[Refusal, ...] = ()
    tensors: Mapping[str, tuple[Extent, ...]] = field(default_factory=dict)
    operations: tuple[Operation, ...] = ()
    batch_size: int = 1
    evidence: Analysis | None = field(default=None, repr=False)

    @property
    def widths(self) -> dict[str, int]:
        """Present number of units of each group."""
        return {name: group.width for name, group in self.groups.items()}

    def __repr__(self) -> str:
        groups = "1 channel group" if len(self.groups) == 1 else f"{len(self.groups)} channel groups"
        whole = "1 part stays" if len(self.refused) == 1 else f"{len(self.refused)} parts stay"
        return f"ChannelGraph({groups} with {sum(self.widths.values())} units, {whole} whole)"

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The groups, who makes them, and what stays whole, as plain text at most 100 columns wide."""
        rows = [("channel group", "width", "tensors")]
        for name, group in self.groups.items():
            rows.append((shortened(name, 44), str(group.width), str(len({slot.tensor for slot in group.slots}))))
        header, *lines = aligned(rows)
        others = [[path for path in group.makers if path != group.name] for group in self.groups.values()]
        if any(others):
            room = COLUMNS - len(header) - 2
            header = f"{header}  also made by"
            lines = [f"{line}  {listed(paths, room)}".rstrip() for line, paths in zip(lines, others, strict=True)]
        whole = [wrapped(f"{path}: {reason}") for path, reason in self.refused]
        return "\n".join([header, *lines, *(["", "stays whole", *whole] if whole else [])])

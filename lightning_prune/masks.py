"""What is off: channel masks held as zeroed weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.errors import ConfigurationError, PruneError
from lightning_prune.graph.channels import ChannelGraph
from lightning_prune.surgery.optimizer_state import doubtful_keys

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LONG_RUN = 64
"""Elements that lie side by side in memory, from which on it costs nothing to read one number for all of them."""


class OffEntry(NamedTuple):
    """Positions along one dimension of one tensor that are held at zero.

    Args:
        tensor: Full name of the tensor.
        dim: The dimension.
        positions: Flat int64 positions along ``dim``.
    """

    tensor: str
    dim: int
    positions: Tensor


class Enforced(ABC):
    """Something that is off in some tensors: keeps it at zero, in weights, gradients and optimizer state."""

    @abstractmethod
    def _names(self) -> Iterable[str]:
        """Full names of the tensors in which something is off."""

    @abstractmethod
    def _fill(self, name: str, target: Tensor) -> None:
        """Zero what is off in a tensor of the shape of the named one."""

    def apply(self, tensors: Mapping[str, Tensor]) -> None:
        """Zero what is off, in place.

        Args:
            tensors: Parameters and buffers of the network by full name.

        Raises:
            PruneError: If a tensor to be zeroed is missing.
        """
        for name in self._present(tensors):
            self._fill(name, tensors[name])

    def apply_gradients(self, tensors: Mapping[str, Tensor]) -> None:
        """Zero the gradients of what is off; parameters without a gradient are passed over.

        Args:
            tensors: Parameters of the network by full name.

        Raises:
            PruneError: If a tensor to be zeroed is missing.
        """
        for name in self._present(tensors):
            if (gradient := tensors[name].grad) is not None:
                self._fill(name, gradient)

    def apply_optimizer_state(self, tensors: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> None:
        """Zero what is off in all optimizer state that has the shape of its parameter, such as momentum.

        Args:
            tensors: Parameters of the network by full name.
            optimizers: The optimizers that may hold state for them.

        Raises:
            PruneError: If a tensor to be zeroed is missing.
        """
        for optimizer in optimizers:
            doubtful = doubtful_keys(optimizer)
            for name in self._present(tensors):
                parameter = tensors[name]
                for key, value in optimizer.state[parameter].items() if parameter in optimizer.state else ():
                    if isinstance(value, Tensor) and value.shape == parameter.shape and key not in doubtful:
                        self._fill(name, value)

    def _present(self, tensors: Mapping[str, Tensor]) -> list[str]:
        names = list(self._names())
        if missing := [name for name in names if name not in tensors]:
            raise PruneError(f"cannot mask {', '.join(missing)}: no such tensor. Were the masks made for this network?")
        return names


class Masks(Enforced):
    """Which units of a network's channel groups are kept, and the entries to zero for those that are not.

    All units are kept at first. The entries are worked out when the masks change, so applying them costs one pass over
    the memory of each tensor and dimension. A resized network needs new masks, made from its own graph.

    Args:
        graph: Channel graph of the network.

    Attributes:
        keep: Bool masks of shape ``[units]`` on the CPU by group name, True = kept. Change them through :meth:`set`.

    Example:
        >>> from lightning_prune.graph.channels import ChannelGroup, Slot
        >>> reads = Slot("head.weight", 1, torch.arange(3)[:, None], "consumer")
        >>> masks = Masks(ChannelGraph({"fc": ChannelGroup("fc", (reads,), (reads,))}))
        >>> masks.set({"fc": torch.tensor([True, False, True])})
        >>> weight = torch.ones(1, 3)
        >>> masks.apply({"head.weight": weight})
        >>> weight
        tensor([[1., 0., 1.]])
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self._groups = graph.groups
        self.keep = {name: torch.ones(group.width, dtype=torch.bool) for name, group in graph.groups.items()}
        self._entries: dict[str, list[OffEntry]] | None = None
        self._bits: dict[tuple[object, ...], list[Tensor]] = {}

    def set(self, keep: Mapping[str, Tensor]) -> None:
        """Replace the masks of the given groups; groups that are not named stay as they are.

        Args:
            keep: Bool masks of shape ``[units]`` by group name.

        Raises:
            ConfigurationError: If a group does not exist or has another number of units; nothing is changed then.
        """
        for name, mask in keep.items():
            if name not in self.keep:
                raise ConfigurationError(
                    f"there is no channel group {name!r} to mask; the network has {', '.join(self.keep) or 'none'}."
                )
            if mask.dtype != torch.bool or mask.shape != self.keep[name].shape:
                raise ConfigurationError(
                    f"the mask of channel group {name!r} must be bool of shape {list(self.keep[name].shape)}, but is "
                    f"{mask.dtype} of shape {list(mask.shape)}. Was it made for a network of other widths?"
                )
        self.keep.update({name: mask.detach().cpu().clone() for name, mask in keep.items()})
        self._entries = None
        self._bits.clear()

    @property
    def widths(self) -> dict[str, int]:
        """Number of kept units of each group."""
        return {name: int(mask.sum()) for name, mask in self.keep.items()}

    def off_entries(self) -> list[OffEntry]:
        """Everything to hold at zero, at most one entry per tensor and dimension."""
        positions: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        for name, group in self._groups.items():
            for slot in group.off:
                positions[slot.tensor, slot.dim].append(slot.positions(~self.keep[name]))
        flat = {where: torch.unique(torch.cat(parts)) for where, parts in positions.items()}
        return [OffEntry(tensor, dim, index) for (tensor, dim), index in flat.items() if len(index)]

    def state_dict(self) -> dict[str, Tensor]:
        """The keep masks by group name."""
        return {name: mask.clone() for name, mask in self.keep.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over masks saved by :meth:`state_dict`.

        Raises:
            ConfigurationError: If they belong to a network with other groups or widths; nothing is changed then.
        """
        missing = sorted(set(self.keep) - set(state))
        if missing:
            raise ConfigurationError(
                f"the saved masks lack channel group(s) {', '.join(missing)}. Were they saved from another network?"
            )
        self.set(state)

    def _by_name(self) -> dict[str, list[OffEntry]]:
        """The entries by tensor name; worked out once after each change."""
        if self._entries is None:
            by_name: dict[str, list[OffEntry]] = defaultdict(list)
            for entry in self.off_entries():
                by_name[entry.tensor].append(entry)
            self._entries = dict(by_name)
        return self._entries

    def _names(self) -> Iterable[str]:
        return self._by_name()

    def _fill(self, name: str, target: Tensor) -> None:
        target = target.detach()
        if target.layout is torch.sparse_coo:
            for entry in self._by_name()[name]:
                _fill_sparse(target, entry)
            return
        integer = _INTEGERS.get(target.element_size())
        if integer is None or target.is_complex():
            for entry in self._by_name()[name]:
                target.index_fill_(entry.dim, entry.positions.to(target.device), 0)
            return
        key = name, target.device, integer, target.stride()
        if key not in self._bits:
            self._bits[key] = [_keep_bits(entry, target, integer) for entry in self._by_name()[name]]
        for bits in self._bits[key]:
            target.view(integer).bitwise_and_(bits)


def _fill_sparse(target: Tensor, entry: OffEntry) -> None:
    """Zero entries of a sparse tensor, where it is and whether or not the same place is in it more than once."""
    values, positions = target._values(), entry.positions.to(target.device)
    if entry.dim >= target.sparse_dim():
        values.index_fill_(entry.dim - target.sparse_dim() + 1, positions, 0)
    else:
        values[torch.isin(target._indices()[entry.dim], positions)] = 0


def _keep_bits(entry: OffEntry, target: Tensor, integer: torch.dtype) -> Tensor:
    """Integers with all bits set where entries stay and none where they go, to be broadcast over ``target``.

    Cutting out bits takes a third of the time of ``index_fill_``, and unlike a product it makes zero of ``inf`` too. It
    runs at the speed of memory only over long runs of equal strides, so short inner dimensions are written out.
    """
    count, stride = target.shape[entry.dim], target.stride(entry.dim)
    bits = torch.full((count,), -1, dtype=integer)
    bits[entry.positions] = 0
    inner = {d for d in range(target.dim()) if target.stride(d) < stride}
    if math.prod(target.shape[d] for d in inner) >= _LONG_RUN:
        inner.clear()
    sizes = [n if d == entry.dim or d in inner else 1 for d, n in enumerate(target.shape)]
    bits = bits.view([count if d == entry.dim else 1 for d in range(target.dim())])
    return bits.expand(sizes).contiguous().to(target.device)

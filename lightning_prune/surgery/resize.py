"""The one primitive of surgery: a new axis is the old axis read at some positions, in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_leaves

from lightning_prune.graph.channels import ChannelGroup
from lightning_prune.surgery.optimizer_state import doubtful_keys

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Cut(NamedTuple):
    """``new axis = old axis[positions]`` along one dimension."""

    dim: int
    positions: Tensor


def plan_cuts(
    groups: Mapping[str, ChannelGroup], tensors: Mapping[str, Tensor], keep: Mapping[str, Tensor]
) -> dict[str, list[Cut]]:
    """Which positions of which tensors stay when only the given units of each group are kept.

    Args:
        groups: All channel groups.
        tensors: Parameters and buffers, by full name.
        keep: Kept units (int64 indices) of each group that is cut.
    """
    removed: dict[tuple[str, int], list[Tensor]] = {}
    for name, units in keep.items():
        group = groups[name]
        off = torch.ones(group.width, dtype=torch.bool)
        off[units] = False
        for slot in group.slots:
            removed.setdefault((slot.tensor, slot.dim), []).append(slot.positions(off))
    cuts: dict[str, list[Cut]] = {}
    for (tensor, dim), positions in removed.items():
        stays = torch.ones(tensors[tensor].shape[dim], dtype=torch.bool)
        stays[torch.cat(positions)] = False
        if not bool(stays.all()):
            cuts.setdefault(tensor, []).append(Cut(dim, stays.nonzero().flatten()))
    return cuts


def read(tensor: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """A new tensor with every cut axis read at the kept positions, in the same memory format."""
    result = tensor.detach()
    for cut in cuts:
        result = result.index_select(cut.dim, cut.positions.to(tensor.device))
    if result.layout is not torch.strided:
        return result
    last = _CHANNELS_LAST.get(tensor.dim())
    if last is not None and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous():
        return result.contiguous(memory_format=last)
    return result.contiguous()


def replace(tensor: Tensor, value: Tensor, gradient: Tensor | None = None) -> None:
    """Give a tensor a new size and content while it stays the same object.

    ``set_`` rather than ``.data =``: it also resets the cached gradient accumulator, which remembers the old size.
    """
    tensor.grad = None
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        tensor.set_(value)  # type: ignore[call-overload]
    if gradient is not None:
        tensor.grad = gradient


class Saved(NamedTuple):
    """A tensor as it was before it was touched."""

    tensor: Tensor
    value: Tensor
    gradient: Tensor | None


def resize(tensors: Mapping[str, Tensor], cuts: Mapping[str, Sequence[Cut]]) -> list[Saved]:
    """Cut (or widen, where positions repeat) tensors in place, gradients too; all of them or none.

    Returns:
        What was there.
    """
    saved: list[Saved] = []
    try:
        for name, axes in cuts.items():
            tensor = tensors[name]
            value = read(tensor, axes)
            gradient = None if tensor.grad is None else read(tensor.grad, axes)
            saved.append(Saved(tensor, tensor.detach(), tensor.grad))
            replace(tensor, value, gradient)
    except BaseException:
        restore(saved)
        raise
    return saved


def restore(saved: Iterable[Saved]) -> None:
    """Put back what :func:`resize` replaced."""
    for entry in saved:
        replace(entry.tensor, entry.value, entry.gradient)


def resize_optimizers(
    optimizers: Iterable[Optimizer],
    tensors: Mapping[str, Tensor],
    cuts: Mapping[str, Sequence[Cut]],
    old: Iterable[Saved],
) -> None:
    """Cut the state that optimizers keep for parameters which were cut; all of it or nothing.

    A state tensor is cut along a dimension if it has as many dimensions as its parameter and was as long there, which
    also covers factored statistics. State that fits no rule is dropped for that parameter, with a warning.
    """
    optimizers = list(optimizers)
    shapes = {id(entry.tensor): tuple(entry.value.shape) for entry in old}
    names = {id(tensors[name]): name for name in cuts}
    changes: list[tuple[Any, dict[Any, Any]]] = []
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            changes.append((optimizer.state, {}))
            if optimizer.state:
                _warn("LBFGS keeps its history for all parameters in one vector; it starts afresh")
            continue
        doubtful = doubtful_keys(optimizer, shapes)
        for parameter, state in optimizer.state.items():
            name = names.get(id(parameter))
            if name is None:
                continue
            shape = shapes[id(parameter)]
            if all(_fits(value, shape) and key not in doubtful for key, value in state.items()):
                changes.append((state, {key: _cut_state(value, shape, cuts[name]) for key, value in state.items()}))
                continue
            changes.append((state, {}))
            _warn(
                f"{type(optimizer).__name__} keeps state for {name} in a form that cannot be cut; "
                f"it starts afresh for that parameter"
            )
    for state, value in changes:
        state.clear()
        state.update(value)
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            optimizer._numel_cache = None


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _fits(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether it is known how a piece of state follows its parameter."""
    if isinstance(value, (tuple, list, dict)):
        return not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
    if not isinstance(value, Tensor) or value.numel() <= 1:
        return True
    if type(value) not in (Tensor, nn.Parameter):  # compressed in a manner of its own
        return False
    return value.dim() == len(shape) and all(n in (1, full) for n, full in zip(value.shape, shape, strict=True))


def _cut_state(value: Any, shape: tuple[int, ...], axes: Sequence[Cut]) -> Any:
    if not isinstance(value, Tensor) or (value.numel() <= 1 and value.dim() != len(shape)):
        return value
    return read(value, [cut for cut in axes if value.shape[cut.dim] == shape[cut.dim]])

"""The one primitive of surgery: a new axis is the old axis read at some positions, in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_prune.graph.channels import ChannelGraph


class Cut(NamedTuple):
    """``new axis = old axis[index]`` along one dimension."""

    dim: int
    index: Tensor


def plan_cuts(graph: ChannelGraph, keep: Mapping[str, Tensor]) -> dict[str, list[Cut]]:
    """Which positions of which tensors stay when only the given units of each group are kept.

    Args:
        graph: The channel graph.
        keep: Kept units (int64 indices) of each group that is cut.
    """
    removed: dict[tuple[str, int], list[Tensor]] = {}
    for name, units in keep.items():
        group = graph.groups[name]
        off = torch.ones(group.width, dtype=torch.bool)
        off[units] = False
        for slot in group.slots:
            removed.setdefault((slot.tensor, slot.dim), []).append(slot.positions(off))
    cuts: dict[str, list[Cut]] = {}
    for (tensor, dim), positions in removed.items():
        extent = graph.tensors[tensor][dim]
        stays = torch.ones(extent.size(graph.widths), dtype=torch.bool)
        stays[torch.cat(positions)] = False
        if not bool(stays.all()):
            cuts.setdefault(tensor, []).append(Cut(dim, stays.nonzero().flatten()))
    return cuts


def read(tensor: Tensor, cuts: Sequence[Cut]) -> Tensor:
    """A new tensor with every cut axis read at the kept positions, in the same memory format."""
    result = tensor.detach()
    for cut in cuts:
        result = result.index_select(cut.dim, cut.index.to(tensor.device))
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        return result.contiguous(memory_format=torch.channels_last)
    return result.contiguous()


def replace(tensor: Tensor, value: Tensor, gradient: Tensor | None = None) -> None:
    """Give a tensor a new size and content while it stays the same object.

    ``set_`` rather than ``.data =``: it also resets the cached gradient accumulator, which remembers the old size.
    """
    tensor.grad = None
    with torch.no_grad():
        tensor.set_(value)  # type: ignore[call-overload]
    if gradient is not None:
        tensor.grad = gradient


class Saved(NamedTuple):
    """A tensor as it was before it was touched."""

    tensor: Tensor
    value: Tensor
    gradient: Tensor | None


def resize(tensors: Mapping[str, Tensor], cuts: Mapping[str, Sequence[Cut]]) -> list[Saved]:
    """Cut (or widen, where an index repeats positions) tensors in place, gradients too; returns what was there."""
    saved = []
    for name, axes in cuts.items():
        tensor = tensors[name]
        saved.append(Saved(tensor, tensor.detach(), tensor.grad))
        gradient = None if tensor.grad is None else read(tensor.grad, axes)
        replace(tensor, read(tensor, axes), gradient)
    return saved


def restore(saved: Iterable[Saved]) -> None:
    """Put back what :func:`resize` replaced."""
    for entry in saved:
        replace(entry.tensor, entry.value, entry.gradient)


def resize_optimizers(
    optimizers: Iterable[Optimizer], tensors: Mapping[str, Tensor], cuts: Mapping[str, Sequence[Cut]], old: Iterable[Saved]
) -> None:
    """Cut the state that optimizers keep for parameters which were cut.

    A state tensor is cut along a dimension if it has as many dimensions as its parameter and was as long there, which
    also covers factored statistics. State that fits no rule is dropped for that parameter, with a warning.
    """
    shapes = {id(entry.tensor): tuple(entry.value.shape) for entry in old}
    named = {id(tensors[name]): (name, axes) for name, axes in cuts.items()}
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            _reset_lbfgs(optimizer)
            continue
        for parameter, state in optimizer.state.items():
            if id(parameter) not in named:
                continue
            name, axes = named[id(parameter)]
            shape = shapes[id(parameter)]
            if any(_is_odd(value, len(shape)) for value in state.values()):
                warnings.warn(
                    f"{type(optimizer).__name__} keeps state for {name} in a form that cannot be cut; "
                    f"it starts afresh for that parameter",
                    stacklevel=2,
                )
                state.clear()
                continue
            for key, value in state.items():
                state[key] = _cut_state(value, shape, axes)


def _is_odd(value: Any, ndim: int) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1 and value.dim() != ndim


def _cut_state(value: Any, shape: tuple[int, ...], axes: Sequence[Cut]) -> Any:
    if not isinstance(value, Tensor) or value.dim() != len(shape) or value.dim() == 0:
        return value
    return read(value, [cut for cut in axes if value.shape[cut.dim] == shape[cut.dim]])


def _reset_lbfgs(optimizer: LBFGS) -> None:
    if optimizer.state:
        warnings.warn("LBFGS keeps its history for all parameters in one vector; it starts afresh", stacklevel=3)
    optimizer.state.clear()
    optimizer._numel_cache = None

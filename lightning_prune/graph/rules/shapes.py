"""Operators that move elements about: the labels move the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.calls import Call, Labelled, Planes, Rule
from lightning_prune.graph.labels import SOLID, Plane, align, compact, reshape_ids, settle
from lightning_prune.graph.rules.pointwise import merge


def _dim(call: Call, ndim: int, key: str = "dim") -> int:
    return int(call.arguments[key]) % ndim


def _source(call: Call) -> Tensor:
    return call.tensors[0]


def reshape(call: Call) -> list[Planes]:
    """Any row-major change of shape."""
    source, target = _source(call), call.outputs[0]
    planes = (Plane(reshape_ids(p.ids, tuple(source.shape), tuple(target.shape)), p.zero) for p in call.planes(source))
    return [tuple(planes)]


def same_place(call: Call) -> list[Planes]:
    """Dimensions change places: the operator itself moves the compact labels."""
    rest = call.args[1:]
    planes = (Plane(call.function(p.ids, *rest, **call.kwargs), p.zero) for p in call.planes(_source(call)))
    return [tuple(planes)]


def turned(call: Call) -> list[Planes]:
    """Dimensions of a tensor change places while it stays the same tensor."""
    source, function = _source(call), getattr(torch.ops.aten, call.name)
    return [tuple(Plane(function(p.ids, *call.args[1:]), p.zero) for p in call.planes(source))]


def expand(call: Call) -> list[Planes]:
    """Broadcasting adds dimensions along which nothing varies; they may take any size."""
    source, target = _source(call), call.outputs[0]
    before = (1,) * (target.dim() - source.dim()) + tuple(source.shape)
    grown = [d for d, size in enumerate(before) if size != target.shape[d]]
    fresh = (Plane(p.ids, False) for p in call.new_labels(target.shape, grown))
    return [(*(align(p, target.dim()) for p in call.planes(source)), *fresh)]


def slice_(call: Call) -> list[Planes]:
    """A range along one dimension."""
    source, target = _source(call), call.outputs[0]
    dim = _dim(call, source.dim())
    rest = {key: call.arguments[key] for key in ("start", "end", "step")}
    result = []
    for plane in call.planes(source):
        ids = plane.ids
        if ids.shape[dim] > 1 and target.shape[dim] != source.shape[dim]:
            inside = torch.ops.aten.slice(torch.arange(source.shape[dim]), 0, **rest)
            beyond = torch.ones(source.shape[dim], dtype=torch.bool).index_fill(0, inside, False)
            call.space.leave_out(ids.index_select(dim, beyond.nonzero().flatten()))
            ids = compact(ids.index_select(dim, inside))
        result.append(Plane(ids, plane.zero))
    return [tuple(result)]


def narrow_reads(call: Call) -> list[Planes]:
    """Single positions along a dimension: what is picked by its number cannot move."""
    source = _source(call)
    dim = _dim(call, source.dim())
    settled = settle(call.space, call.planes(source), (dim,), "single channels are picked by their number")
    planes = tuple(Plane(plane.ids.squeeze(dim), plane.zero) for plane in settled)
    return [planes for _ in call.outputs]


def keep_pieces_equal(call: Call, planes: Planes, dim: int, pieces: int) -> None:
    """Whatever goes from one piece along ``dim`` goes from all the others at the same place."""
    for plane in planes:
        if plane.ids.shape[dim] > 1:
            call.space.keep_number(plane.ids.unflatten(dim, (pieces, -1)), dim)


def split(call: Call) -> list[Planes]:
    """Pieces along one dimension. Equal pieces must stay equal."""
    source = _source(call)
    dim = _dim(call, source.dim())
    lengths = [output.shape[dim] for output in call.outputs]
    planes = call.planes(source)
    if len(set(lengths)) == 1:
        keep_pieces_equal(call, planes, dim, len(lengths))
    results: list[list[Plane]] = [[] for _ in lengths]
    for plane in planes:
        varies = plane.ids.shape[dim] > 1
        pieces: Sequence[Tensor] = plane.ids.split(lengths, dim) if varies else [plane.ids] * len(lengths)
        for result, piece in zip(results, pieces, strict=True):
            result.append(Plane(compact(piece), plane.zero))
    return [tuple(result) for result in results]


def _join(call: Call, shapes: list[tuple[int, ...]], planes: list[Planes], dim: int) -> Planes:
    """Labels of pieces laid end to end along ``dim``."""
    along = [[p for p in piece if p.ids.shape[dim] > 1] for piece in planes]
    across = [tuple(p for p in piece if p.ids.shape[dim] == 1) for piece in planes]
    result: list[Plane] = []
    if any(along):
        ndim = len(shapes[0])
        others = {d for piece in along for p in piece for d in p.dims if d != dim}
        columns = []
        for shape, piece in zip(shapes, along, strict=True):
            full = [shape[d] if d == dim or d in others else 1 for d in range(ndim)]
            columns.append(piece[0].ids.expand(full) if piece else torch.full(full, SOLID))
        result.append(Plane(compact(torch.cat(columns, dim)), all(p.zero for piece in along for p in piece)))
    flat = [Labelled((*s[:dim], 1, *s[dim + 1 :]), p) for s, p in zip(shapes, across, strict=True)]
    everyone = set(range(len(flat)))
    return (*result, *merge(call.space, flat, lambda zeros: zeros == everyone))


def cat(call: Call) -> list[Planes]:
    """Concatenation."""
    pieces = [tensor for tensor in call.tensors if tensor.dim() == call.outputs[0].dim()]
    dim = _dim(call, call.outputs[0].dim())
    shapes = [tuple(piece.shape) for piece in pieces]
    return [_join(call, shapes, [call.planes(piece) for piece in pieces], dim)]


def stack(call: Call) -> list[Planes]:
    """Stacking: every piece gets a new dimension of size 1 first."""
    dim = _dim(call, call.outputs[0].dim())
    shapes = [(*t.shape[:dim], 1, *t.shape[dim:]) for t in call.tensors]
    planes = [tuple(Plane(p.ids.unsqueeze(dim), p.zero) for p in call.planes(t)) for t in call.tensors]
    return [_join(call, shapes, planes, dim)]


def rearrange(call: Call) -> list[Planes]:
    """Any other movement of elements: run the operator on the labels themselves."""
    source = _source(call)
    fill = {"value": SOLID} if "value" in call.arguments else {}
    result = []
    for plane in call.planes(source):
        full = plane.ids.expand(source.shape).to(torch.float64)
        arguments: dict[str, Any] = {**call.arguments, **fill}
        arguments[next(iter(arguments))] = full
        moved = call.function(**arguments).round().to(torch.int64)
        result.append(Plane(compact(moved), plane.zero))
    return [tuple(result)]


def channel_shuffle(call: Call) -> list[Planes]:
    """Channels of equal groups are dealt out in turn."""
    keep_pieces_equal(call, call.planes(_source(call)), 1, call.arguments["groups"])
    return rearrange(call)


def glu(call: Call) -> list[Planes]:
    """One half gates the other."""
    source = _source(call)
    dim = _dim(call, source.dim())
    planes = call.planes(source)
    keep_pieces_equal(call, planes, dim, 2)
    halves: list[list[Plane]] = [[], []]
    for plane in planes:
        pieces = plane.ids.chunk(2, dim) if plane.ids.shape[dim] > 1 else (plane.ids, plane.ids)
        for half, piece in zip(halves, pieces, strict=True):
            half.append(Plane(compact(piece), plane.zero))
    shape = tuple(call.outputs[0].shape)
    operands = [Labelled(shape, tuple(half)) for half in halves]
    return [merge(call.space, operands, lambda zeros: 0 in zeros, (call.static, call.static))]


def pad(call: Call) -> list[Planes]:
    """Constant padding: a labelled dimension gains positions that stay; other dimensions only grow."""
    source, amounts = _source(call), list(call.arguments["pad"])
    padded = {source.dim() - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    if any(set(plane.dims) & padded for plane in call.planes(source)):
        return rearrange(call)
    return [call.planes(source)]


def squeezed(call: Call) -> list[Planes]:
    """Dimensions of size 1 go while the tensor stays the same tensor, whose shape before is not known any more."""
    return call.opaque("loses dimensions in place")


def rolled(call: Call) -> list[Planes]:
    """Elements come in again at the other end, a number of places away that need not move with the width."""
    source = _source(call)
    dims = [d % source.dim() for d in call.arguments["dims"]] or range(source.dim())
    return [settle(call.space, call.planes(source), dims, "is rolled by a number of places")]


def strided(call: Call) -> list[Planes]:
    """A view by strides: followed where it reshapes, or moves about inside the last dimensions only."""
    source, target = _source(call), call.outputs[0]
    if not source.is_contiguous() or source.storage_offset() != target.storage_offset():
        call.constant("by strides of its own")
        return call.opaque("is read by strides")
    if target.numel() == source.numel() and target.is_contiguous():
        call.constant("in order")
        return reshape(call)
    lead = 0
    while lead < min(source.dim(), target.dim()) and _same_step(source, target, lead):
        lead += 1
    room = source.stride(lead - 1) if lead else source.numel()
    reach = sum((n - 1) * step for n, step in zip(target.shape[lead:], target.stride()[lead:], strict=True))
    if reach >= room:
        call.constant("by strides of its own")
        return call.opaque("is read by strides")
    call.constant(f"inside what follows dimension {lead}")
    planes = settle(call.space, call.planes(source), range(lead, source.dim()), "is read by strides")
    ones = (1,) * (target.dim() - lead)
    return [tuple(Plane(p.ids.reshape(*p.ids.shape[:lead], *ones), p.zero) for p in planes)]


def restrided(call: Call) -> list[Planes]:
    """Other strides for a tensor itself: followed where it lies as before, which is all that torch does on its own."""
    return [call.planes(call.tensors[0])] if call.hands_on else call.opaque("is read by strides")


def _same_step(source: Tensor, target: Tensor, dim: int) -> bool:
    return source.shape[dim] == target.shape[dim] and source.stride(dim) == target.stride(dim)


_RESHAPES = (
    "view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten", "unflatten", "alias",
    "detach", "clone", "contiguous", "squeeze_copy", "expand_as", "positive",
)  # fmt: skip
IN_PLACE: dict[str, Rule] = {
    **dict.fromkeys(("transpose_", "t_", "swapaxes_", "swapdims_", "unsqueeze_"), turned),
    "squeeze_": squeezed,
    "as_strided_": restrided,
}
"""Operators that give a tensor another shape while it stays the same tensor."""
RULES: dict[str, Rule] = {
    **dict.fromkeys(_RESHAPES, reshape),
    **dict.fromkeys(("t", "transpose", "permute", "movedim", "swapaxes", "numpy_T", "flip", "rot90"), same_place),
    **dict.fromkeys(("select", "unbind"), narrow_reads),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk"), split),
    **dict.fromkeys(("repeat", "pixel_shuffle", "pixel_unshuffle", "unfold"), rearrange),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), channel_shuffle),
    "expand": expand,
    "glu": glu,
    "slice": slice_,
    "cat": cat,
    "stack": stack,
    "constant_pad_nd": pad,
    "roll": rolled,
    "as_strided": strided,
}

"""Reading and writing by index tensors: indexed dimensions stay whole, the others move on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.graph.calls import Call, Labelled, Planes, Rule
from lightning_prune.graph.labels import Plane, compact, settle
from lightning_prune.graph.rules.pointwise import merge

_PICKED = "channels are picked by an index tensor"
_WRITTEN = "channels are written by an index tensor"
_MASKS = (torch.bool, torch.uint8)


def _freeze(call: Call, tensors: Sequence[Tensor | None], reason: str) -> None:
    for tensor in tensors:
        for plane in call.planes(tensor):
            call.space.freeze(plane.ids, reason)


def _indexed_dims(indices: Sequence[Tensor | None]) -> list[int]:
    """Dimensions that a list of index tensors uses up; a mask uses as many as it has."""
    dims: list[int] = []
    position = 0
    for index in indices:
        span = index.dim() if index is not None and index.dtype in _MASKS else 1
        if index is not None:
            dims.extend(range(position, position + span))
        position += span
    return dims


def _picked(planes: Planes, indices: Sequence[Tensor | None]) -> Planes:
    """Planes that are constant along the indexed dimensions, as reading by the indices leaves them."""

    def first(positions: Tensor | None) -> Tensor | None:
        if positions is None:
            return None
        shape = (1,) * positions.dim()
        if positions.dtype in _MASKS:
            return torch.ones(shape, dtype=torch.bool)
        return torch.zeros(shape, dtype=torch.int64)

    places = [first(positions) for positions in indices]
    return tuple(Plane(torch.ops.aten.index.Tensor(plane.ids, places), plane.zero) for plane in planes)


def index(call: Call) -> list[Planes]:
    """Reading by several index tensors."""
    source, indices = call.tensors[0], list(call.arguments["indices"])
    _freeze(call, indices, "steers what is picked")
    settled = settle(call.space, call.planes(source), _indexed_dims(indices), _PICKED)
    return [_picked(settled, indices)]


def index_along(call: Call) -> list[Planes]:
    """``index_select`` and ``embedding``: one indexed dimension."""
    source, target = call.tensors[0], call.outputs[0]
    dim = int(call.arguments["dim"]) % source.dim() if "dim" in call.arguments else 0
    _freeze(call, call.tensors[1:], "steers what is picked")
    result = []
    for plane in settle(call.space, call.planes(source), (dim,), "rows are picked by an index tensor"):
        lead = [1] * (target.dim() - source.dim() + 1)
        ids = plane.ids
        result.append(Plane(ids.reshape(*ids.shape[:dim], *lead, *ids.shape[dim + 1 :]), plane.zero))
    return [tuple(result)]


def embedding_bag(call: Call) -> list[Planes]:
    """Rows of a table, summed, averaged or compared by bags."""
    table, result = call.arguments["weight"], call.outputs[0]
    _freeze(call, [t for t in call.tensors if t is not table], "steers what is picked")
    planes = settle(call.space, call.planes(table), (0,), "rows are picked by an index tensor")
    places = tuple(Plane(plane.ids, False) for plane in planes)
    return [planes, *(places if output.shape == result.shape else () for output in call.outputs[1:])]


def write(call: Call) -> list[Planes]:
    """``index_put``: values are written where several index tensors point."""
    target, values = call.arguments["self"], call.arguments["values"]
    indices = list(call.arguments["indices"])
    given = [(place, positions) for place, positions in enumerate(indices) if positions is not None]
    if len(given) == 1 and given[0][1].dtype in _MASKS and values.numel() == 1:
        return [_fill_by_mask(call, target, *given[0])]
    _freeze(call, indices, "steers what is written")
    planes = settle(call.space, call.planes(target), _indexed_dims(indices), _WRITTEN)
    whole = torch.zeros(1, dtype=torch.bool).expand(target.shape)
    on_cpu = [None if positions is None else positions.cpu() for positions in indices]
    place = Labelled(tuple(torch.ops.aten.index.Tensor(whole, on_cpu).shape), _picked(planes, indices))
    written = Labelled(tuple(values.shape), call.planes(values))
    merged = merge(call.space, (place, written), lambda zeros: zeros == {0, 1})
    zero = bool(merged) and all(plane.zero for plane in merged)
    return [tuple(Plane(plane.ids, plane.zero and zero) for plane in planes)]


def _fill_by_mask(call: Call, target: Tensor, start: int, mask: Tensor) -> Planes:
    """One number written wherever a mask holds, which is pointwise."""
    rest = target.dim() - start - mask.dim()

    def lifted(shape: Sequence[int]) -> tuple[int, ...]:
        return (1,) * start + tuple(shape) + (1,) * rest

    planes = tuple(Plane(plane.ids.reshape(lifted(plane.ids.shape)), False) for plane in call.planes(mask))
    operands = (Labelled(tuple(target.shape), call.planes(target)), Labelled(lifted(mask.shape), planes))
    return merge(call.space, operands, lambda zeros: False)


def _without(call: Call, tensor: Tensor, dim: int, reason: str) -> Labelled:
    """A tensor as if it were broadcast along one dimension, where its labels must be constant."""
    shape = list(tensor.shape)
    shape[dim] = 1
    return Labelled(tuple(shape), settle(call.space, call.planes(tensor), (dim,), reason))


def write_along(call: Call) -> list[Planes]:
    """``index_add`` and its kind: slices are written where one index tensor points."""
    target, source = call.arguments["self"], call.arguments.get("source")
    dim = int(call.arguments["dim"]) % max(target.dim(), 1)
    _freeze(call, [t for t in call.tensors if t is not target and t is not source], "steers what is written")
    operands = [_without(call, target, dim, _WRITTEN)]
    if source is not None:
        operands.append(_without(call, source, dim, _WRITTEN))
    return [merge(call.space, operands, lambda zeros: zeros == {0, 1})]


def gather(call: Call) -> list[Planes]:
    """Reading along one dimension, each place by an index of its own."""
    source, positions = call.arguments["self"], call.arguments["index"]
    dim = int(call.arguments["dim"]) % source.dim()
    shape = tuple(1 if d == dim else n for d, n in enumerate(positions.shape))
    planes = []
    for plane in settle(call.space, call.planes(source), (dim,), _PICKED):
        ids = plane.ids
        for d in plane.dims:
            ids = ids.narrow(d, 0, shape[d])
        planes.append(Plane(compact(ids), plane.zero))
    places = Labelled(tuple(positions.shape), call.planes(positions))
    return [merge(call.space, (Labelled(shape, tuple(planes)), places), lambda zeros: 0 in zeros)]


def scatter(call: Call) -> list[Planes]:
    """Writing along one dimension, each place by an index of its own."""
    target, positions = call.arguments["self"], call.arguments["index"]
    source = call.arguments.get("src")
    dim = int(call.arguments["dim"]) % target.dim()
    involved = [tensor for tensor in (target, positions, source) if isinstance(tensor, Tensor)]
    others = [d for d in range(target.dim()) if d != dim]
    if any(tensor.shape[d] != target.shape[d] for tensor in involved for d in others):
        return call.opaque(_WRITTEN)
    operands = [_without(call, tensor, dim, _WRITTEN) for tensor in involved]
    return [merge(call.space, operands, lambda zeros: {0, 2} <= zeros)]


def _opaque(reason: str) -> Rule:
    def rule(call: Call) -> list[Planes]:
        return call.opaque(reason)

    return rule


def counted(call: Call) -> list[Planes]:
    """``bucketize`` and ``searchsorted``: where each number belongs among sorted ones."""
    limits = call.arguments["boundaries" if call.name == "bucketize" else "sorted_sequence"]
    numbers = call.arguments["self"]
    if not isinstance(numbers, Tensor) or limits.dim() > 1:
        return call.opaque("is compared with sorted numbers")
    _freeze(call, [tensor for tensor in call.tensors if tensor is not numbers], "holds sorted numbers")
    return [tuple(Plane(plane.ids, False) for plane in call.planes(numbers))]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("index", "_unsafe_index"), index),
    **dict.fromkeys(("index_select", "embedding"), index_along),
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), embedding_bag),
    **dict.fromkeys(("index_put", "_unsafe_index_put", "_index_put_impl"), write),
    **dict.fromkeys(("index_add", "index_copy", "index_reduce", "index_fill"), write_along),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), scatter),
    **dict.fromkeys(("bucketize", "searchsorted"), counted),
    **dict.fromkeys(("take", "masked_select", "nonzero"), _opaque("single elements are picked by an index tensor")),
    **dict.fromkeys(("put", "masked_scatter"), _opaque("single elements are written by an index tensor")),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _opaque("channels are classes, named by number")),
    "gather": gather,
}

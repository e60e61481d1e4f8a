"""Triangles and diagonals: elements that are told apart by two positions."""

from __future__ import annotations

from torch import Tensor

from lightning_prune.graph.calls import Call, Planes, Rule
from lightning_prune.graph.labels import Plane, settle
from lightning_prune.graph.rules.contractions import NEEDS_ZERO, sum_out


def paired(call: Call, planes: Planes, dims: tuple[int, int], apart: bool, reason: str) -> Planes:
    """Planes along two dimensions whose elements are told apart by position: the same ones must go from both.

    Args:
        call: The operator.
        planes: Labels of its input.
        dims: The two dimensions.
        apart: Whether what goes from both changes how the rest is told apart.
        reason: Why what cannot be paired stays whole.
    """
    pair = [next((p for p in planes if p.dims == (dim,)), None) for dim in dims]
    first, second = pair
    if apart or first is None or second is None or first.ids.numel() != second.ids.numel():
        return settle(call.space, planes, dims, reason)
    call.space.unite(first.ids.flatten(), second.ids.flatten())
    others = tuple(p for p in planes if p is not first and p is not second)
    return (first, second, *settle(call.space, others, dims, reason))


def triangle(call: Call) -> list[Planes]:
    """``triu`` and ``tril``: next to the main diagonal the pattern stays what it is if a row goes with its column."""
    source, diagonal = call.tensors[0], call.arguments["diagonal"]
    stays = diagonal in ((0, 1) if call.name == "triu" else (-1, 0)) and source.shape[-1] == source.shape[-2]
    dims = (source.dim() - 2, source.dim() - 1)
    planes = paired(call, call.planes(source), dims, not stays, "lies under a triangular pattern")
    if call.static:
        for plane in planes:
            if set(plane.dims) & set(dims):
                call.space.mark(NEEDS_ZERO, plane.ids)  # where both are halves of a weight one half alone is not off
    return [planes]


def _dims(call: Call, tensor: Tensor) -> list[int]:
    return [int(call.arguments[key]) % tensor.dim() for key in ("dim1", "dim2")]


def diagonal(call: Call) -> list[Planes]:
    """Elements with two equal indices."""
    return [_diagonal(call, *sorted(_dims(call, call.tensors[0])))]


def _diagonal(call: Call, dim1: int, dim2: int) -> Planes:
    source = call.tensors[0]
    stays = call.arguments.get("offset", 0) == 0 and source.shape[dim1] == source.shape[dim2]
    planes = paired(call, call.planes(source), (dim1, dim2), not stays, "lies under a diagonal")
    result = []
    for plane in planes:
        if plane.dims == (dim2,):
            continue
        ids = plane.ids.movedim(dim1, -1) if plane.ids.shape[dim1] > 1 else plane.ids.select(dim1, 0).unsqueeze(-1)
        result.append(Plane(ids.select(dim2 - 1, 0), plane.zero))
    return tuple(result)


def trace(call: Call) -> list[Planes]:
    """The sum of the diagonal."""
    return [tuple(Plane(p.ids.squeeze(0), p.zero) for p in sum_out(call.space, _diagonal(call, 0, 1), 0, ()))]


def diagonal_matrix(call: Call) -> list[Planes]:
    """``diag_embed``: one dimension becomes two, of which only elements with equal indices are not zero."""
    source, target = call.tensors[0], call.outputs[0]
    dims = sorted(_dims(call, target))
    last = source.dim() - 1
    planes = call.planes(source)
    if call.arguments["offset"]:
        planes = settle(call.space, planes, (last,), "is laid along a diagonal")
    result = []
    for plane in planes:
        if plane.ids.shape[last] == 1:
            rest = plane.ids.squeeze(last)
            result.append(Plane(rest.unsqueeze(dims[0]).unsqueeze(dims[1]), plane.zero))
            continue
        along = call.space.tie(plane.ids, [d for d in plane.dims if d != last]).flatten()
        shapes = ([len(along) if d == dim else 1 for d in range(target.dim())] for dim in dims)
        result.extend(Plane(along.reshape(shape), plane.zero) for shape in shapes)
    return [tuple(result)]


RULES: dict[str, Rule] = {
    **dict.fromkeys(("triu", "tril"), triangle),
    **dict.fromkeys(("diagonal", "diagonal_copy"), diagonal),
    "diag_embed": diagonal_matrix,
    "trace": trace,
}

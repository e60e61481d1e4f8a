"""Matrix products and convolutions: multiply in a joint index space, then sum over the shared index."""

from __future__ import annotations

from torch import Tensor

from lightning_prune.graph.blocks import keep_positions
from lightning_prune.graph.calls import Call, Labelled, Planes, Rule
from lightning_prune.graph.labels import READ, LabelSpace, Plane, reshape_ids, settle
from lightning_prune.graph.rules.pointwise import mark, merge

NEEDS_ZERO = "needs zero"
"""Mark of labels whose units are off only when everything that makes them is zero."""


def sum_out(space: LabelSpace, planes: Planes, dim: int, protected: Planes) -> Planes:
    """Labels of a sum over ``dim``.

    Args:
        space: Where findings are reported.
        planes: Labels of the summands.
        dim: The dimension that disappears (kept with size 1).
        protected: Labels of weights among the factors: where they are zeroed a removed summand is zero in any case.
    """
    result = []
    weighed = any(p.ids.shape[dim] > 1 and p.zero for p in protected)
    for plane in planes:
        if plane.zero or weighed:
            plane = keep_positions(space, plane, (dim,))
        if plane.ids.shape[dim] > 1:
            space.mark(READ, plane.ids)
        if plane.ids.shape[dim] == 1:
            result.append(plane)
        elif len(plane.dims) > 1:
            result.append(Plane(space.tie(plane.ids, (dim,)), plane.zero))
        elif not weighed:
            if plane.zero:
                space.mark(NEEDS_ZERO, plane.ids)
            else:
                space.freeze(plane.ids, "is summed over while a removed channel would not be zero there")
    return tuple(result)


def contract(call: Call, first: Labelled, second: Labelled, dim: int, static: tuple[bool, bool]) -> Planes:
    """Multiply two operands given in one joint index space and sum over ``dim``."""
    weights = [operand for operand, is_static in zip((first, second), static, strict=True) if is_static]
    for operand in weights:
        for plane in operand.planes:
            mark(call.space, "consumer" if plane.ids.shape[dim] > 1 else "producer", (plane,))
    product = merge(call.space, (first, second), lambda zeros: bool(zeros), static)
    return sum_out(call.space, product, dim, tuple(p for operand in weights for p in operand.planes))


def _insert(tensor: Tensor, planes: Planes, dim: int) -> Labelled:
    return _with_dim(Labelled(tuple(tensor.shape), planes), dim)


def _with_dim(operand: Labelled, dim: int) -> Labelled:
    shape = list(operand.shape)
    position = dim % (len(shape) + 1)
    shape.insert(position, 1)
    return Labelled(tuple(shape), tuple(Plane(p.ids.unsqueeze(position), p.zero) for p in operand.planes))


def _keep_last_positions(call: Call, batch: Tensor) -> None:
    """Once a single position is left of every block of a batch, still no whole block goes where positions may."""
    for plane in call.planes(batch):
        if plane.dims == (0,) and 1 in batch.shape[1:] and call.space.prefers_inner(plane.ids):
            call.space.freeze(plane.ids, "is the last position of every block")


def _product(call: Call, first: Tensor, second: Tensor) -> Planes:
    if first.dim() == 3:
        _keep_last_positions(call, first)
        _keep_last_positions(call, second)
    a = _insert(first, call.planes(first), -1)
    b = _insert(second, call.planes(second), -3)
    summed = contract(call, a, b, len(a.shape) - 2, (call.is_static(first), call.is_static(second)))
    return tuple(Plane(p.ids.squeeze(-2), p.zero) for p in summed)


def matrix_product(call: Call) -> list[Planes]:
    """``mm`` and ``bmm``."""
    return [_product(call, *call.tensors)]


def add_matrix_product(call: Call) -> list[Planes]:
    """``addmm`` and ``baddbmm``: a product plus a bias."""
    bias, first, second = call.tensors
    return [_add_bias(call, _product(call, first, second), bias)]


def _add_bias(call: Call, planes: Planes, bias: Tensor, shape: tuple[int, ...] | None = None) -> Planes:
    shape = shape or tuple(bias.shape)
    labels = call.planes(bias)
    if len(shape) != bias.dim():
        labels = tuple(Plane(p.ids.reshape(shape), p.zero) for p in labels)
    if call.is_static(bias):
        mark(call.space, "bias", labels)
    operands = (Labelled(tuple(call.outputs[0].shape), planes), Labelled(shape, labels))
    return merge(call.space, operands, lambda zeros: zeros == {0, 1}, (call.static, call.is_static(bias)))


def vector_product(call: Call) -> list[Planes]:
    """``mv``, ``dot`` and ``vdot``."""
    return [_by_vector(call, *call.tensors)]


def add_vector_product(call: Call) -> list[Planes]:
    """``addmv``: a product plus a bias."""
    bias, matrix, vector = call.tensors
    return [_add_bias(call, _by_vector(call, matrix, vector), bias)]


def _by_vector(call: Call, matrix: Tensor, vector: Tensor) -> Planes:
    a = Labelled(tuple(matrix.shape), call.planes(matrix))
    b = Labelled(tuple(vector.shape), call.planes(vector))
    dim = matrix.dim() - 1
    lifted = tuple(Plane(p.ids.reshape((1,) * dim + (-1,)), p.zero) for p in b.planes)
    static = (call.is_static(matrix), call.is_static(vector))
    summed = contract(call, a, Labelled((1,) * dim + b.shape, lifted), dim, static)
    return tuple(Plane(p.ids.squeeze(dim), p.zero) for p in summed)


def add_outer_product(call: Call) -> list[Planes]:
    """``addr``: an outer product plus a bias."""
    bias, first, second = call.tensors
    a, b = _insert(first, call.planes(first), 1), _insert(second, call.planes(second), 0)
    product = merge(call.space, (a, b), lambda zeros: bool(zeros), (call.is_static(first), call.is_static(second)))
    return [_add_bias(call, product, bias)]


def three_products(call: Call) -> list[Planes]:
    """``_trilinear``: three operands in one joint index space, multiplied, then summed over some dimensions."""
    static = [call.is_static(tensor) for tensor in call.tensors]
    summed = sorted(call.arguments["sumdim"])
    operands = []
    for number, tensor in enumerate(call.tensors, start=1):
        operand = Labelled(tuple(tensor.shape), call.planes(tensor))
        for dim in sorted(call.arguments[f"expand{number}"]):
            operand = _with_dim(operand, dim)
        operands.append(operand)
    weights = tuple(p for operand, weight in zip(operands, static, strict=True) if weight for p in operand.planes)
    for plane in weights:
        mark(call.space, "consumer" if set(plane.dims) & set(summed) else "producer", (plane,))
    product = merge(call.space, operands, lambda zeros: bool(zeros), static)
    for dim in reversed(summed):
        product = sum_out(call.space, product, dim, weights)
        product = tuple(Plane(p.ids.squeeze(dim), p.zero) for p in product)
        weights = tuple(Plane(p.ids.select(dim, 0), p.zero) for p in weights if p.ids.shape[dim] == 1)
    return [product]


def distance(call: Call) -> list[Planes]:
    """``cdist``: every row minus every other one, then a norm over the last dimension."""
    first, second = call.tensors[:2]
    ndim = max(first.dim(), second.dim())
    a = _insert(first, call.planes(first), first.dim() - 1)
    b = _insert(second, call.planes(second), second.dim() - 2)
    apart = merge(call.space, (a, b), lambda zeros: zeros == {0, 1})
    return [tuple(Plane(p.ids.squeeze(ndim), False) for p in sum_out(call.space, apart, ndim, ()))]


def convolution(call: Call) -> list[Planes]:
    """Convolutions of any dimension, transposed and grouped ones too."""
    data, weight, bias = (call.arguments[key] for key in ("input", "weight", "bias"))
    planes = settle(call.space, call.planes(data), range(2, data.dim()), "varies over the image")
    return [grouped_product(call, data, planes, weight, bias, call.arguments["groups"], call.arguments["transposed"])]


def grouped_product(
    call: Call, data: Tensor, planes: Planes, weight: Tensor, bias: Tensor | None, groups: int, transposed: bool
) -> Planes:
    """Labels of a convolution of data with labels ``planes``, found in the space (batch, group, out, in)."""
    kernel = range(2, weight.dim())
    batch, channels = data.shape[:2]
    rows, columns = weight.shape[:2]
    per_group_in = channels // groups
    per_group_out = columns if transposed else rows // groups

    def joint_data(plane: Plane) -> Plane:
        flat = plane.ids.reshape(plane.ids.shape[:2])
        return Plane(reshape_ids(flat, (batch, channels), (batch, groups, 1, per_group_in)), plane.zero)

    def joint_weight(plane: Plane) -> Plane:
        flat = plane.ids.reshape(plane.ids.shape[:2])
        if transposed:
            ids = reshape_ids(flat, (rows, columns), (groups, per_group_in, per_group_out)).transpose(1, 2)
        else:
            ids = reshape_ids(flat, (rows, columns), (groups, per_group_out, columns))
        return Plane(ids.unsqueeze(0), plane.zero)

    image = tuple(map(joint_data, planes))
    filters = tuple(map(joint_weight, settle(call.space, call.planes(weight), kernel, None)))
    image, filters = (tuple(keep_positions(call.space, p, (2, 3)) for p in planes) for planes in (image, filters))
    if groups > 1 and not any(plane.dims == (3,) for plane in image):  # then only whole groups can go
        filters = settle(call.space, filters, (2, 3) if transposed else (3,), None)
    a = Labelled((batch, groups, 1, per_group_in), image)
    b = Labelled((1, groups, per_group_out, per_group_in), filters)
    for plane in (*image, *filters):
        call.space.keep_dense(plane.ids)
    summed = contract(call, a, b, 3, (call.is_static(data), call.is_static(weight)))
    out_channels = groups * per_group_out
    ones = (1,) * (data.dim() - 2)
    result = []
    for plane in summed:
        flat = reshape_ids(plane.ids, (batch, groups, per_group_out, 1), (batch, out_channels))
        result.append(Plane(flat.reshape(*flat.shape, *ones), plane.zero))
    return tuple(result) if bias is None else _add_bias(call, tuple(result), bias, (1, out_channels, *ones))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("mm", "bmm", "_sparse_mm"), matrix_product),
    **dict.fromkeys(("addmm", "baddbmm", "_sparse_addmm"), add_matrix_product),
    **dict.fromkeys(("mv", "dot", "vdot"), vector_product),
    **dict.fromkeys(("_cdist_forward", "_euclidean_dist"), distance),
    "addmv": add_vector_product,
    "addr": add_outer_product,
    "_trilinear": three_products,
    **dict.fromkeys(("convolution", "_convolution"), convolution),
}

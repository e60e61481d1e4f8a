"""Pointwise operators: labels of different operands at the same place belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.blocks import share_blocks_only
from lightning_prune.graph.calls import Call, Labelled, Planes, Rule
from lightning_prune.graph.labels import NEVER_ZERO, LabelSpace, Plane, align, varying
from lightning_prune.graph.program import map_nested


class _Carrier:
    """A plane of the result, with the operands that carry it."""

    def __init__(self, plane: Plane, operand: int) -> None:
        self.ids = plane.ids
        self.members = {operand}
        self.zeros = {operand} if plane.zero else set()


def merge(
    space: LabelSpace,
    operands: Sequence[Labelled],
    zero: Callable[[set[int]], bool],
    static: Sequence[bool] = (),
) -> Planes:
    """Unite the labels of operands that meet element by element (after broadcasting).

    Args:
        space: Where unions are reported.
        operands: Shape and planes of each operand.
        zero: Whether the result is zero where the given operands are zero.
        static: For each operand, whether it depends on parameters and constants only.
    """
    ndim = max(len(operand.shape) for operand in operands)
    shapes = [(1,) * (ndim - len(operand.shape)) + tuple(operand.shape) for operand in operands]
    carriers: list[_Carrier] = []
    for number, operand in enumerate(operands):
        for plane in operand.planes:
            carrier = _Carrier(align(plane, ndim), number)
            for other in [c for c in carriers if number not in c.members and _meet(c.ids, carrier.ids)]:
                if (apart := share_blocks_only(space, other.ids, carrier.ids)) is not None:
                    other.ids, carrier.ids = apart
                    continue
                all_static = bool(static) and all(static[i] for i in carrier.members | other.members)
                carrier.ids = _combine(space, other.ids, carrier.ids, all_static)
                carrier.members |= other.members
                carrier.zeros |= other.zeros
                carriers.remove(other)
            carriers.append(carrier)
    planes = []
    for carrier in (c for c in carriers if varying(c.ids)):
        solid = [shape for number, shape in enumerate(shapes) if number not in carrier.members]
        ids = _against_solid(space, carrier.ids, solid)
        if ids is not None:
            planes.append(Plane(ids, zero(carrier.zeros)))
    return tuple(planes)


def _meet(first: Tensor, second: Tensor) -> bool:
    return any(a > 1 and b > 1 for a, b in zip(first.shape, second.shape, strict=True))


def _combine(space: LabelSpace, first: Tensor, second: Tensor, static: bool) -> Tensor:
    """Unite two planes that vary along a common dimension; returns the plane of the result."""
    dims_first = [d for d, n in enumerate(first.shape) if n > 1]
    dims_second = [d for d, n in enumerate(second.shape) if n > 1]
    common = [d for d in dims_first if d in dims_second]
    outer, inner = (first, second) if len(dims_first) >= len(dims_second) else (second, first)
    outer_dims = dims_first if outer is first else dims_second
    blocks_vary = len(outer_dims) > len(common) and outer_dims[0] not in common
    if blocks_vary and not space.prefers_inner(first, second):
        # The smaller plane labels only inner positions (one weight shared by all blocks): whole blocks stay removable.
        space.freeze(inner, "is shared by all blocks of a dimension that is split")
        return space.tie(outer, common)
    space.unite(first, second, static)
    extra = [d for d in outer_dims if d not in common]
    return space.tie(outer, extra)


def _against_solid(space: LabelSpace, ids: Tensor, shapes: Sequence[Sequence[int]]) -> Tensor | None:
    """Operands without labels meet the plane: dimensions along which they are not broadcast cannot be cut."""
    dims = varying(ids)
    solid = [d for d in dims if any(shape[d] > 1 for shape in shapes)]
    if solid and len(solid) == len(dims):
        space.freeze(ids, "meets a tensor of fixed size")
        return None
    return space.tie(ids, solid)


def keeps_zero(call: Call, zeros: set[int]) -> bool:
    """Whether the operator gives zero where the given tensor arguments are zero, found by running it on tiny ones."""
    if not zeros:
        return False
    seen = -1

    def tiny(value: Any) -> Any:
        nonlocal seen
        if not isinstance(value, Tensor):
            return value
        seen += 1
        if seen in zeros:
            return torch.zeros(2, dtype=value.dtype)
        return torch.tensor([-2, 3]).to(value.dtype) if value.dtype is not torch.bool else torch.tensor([False, True])

    try:
        result = call.function(*map_nested(tiny, call.args), **map_nested(tiny, call.kwargs))
    except (RuntimeError, TypeError, IndexError):
        return False
    first = result[0] if isinstance(result, (tuple, list)) else result
    return not bool((first != 0).any())


def pointwise(call: Call) -> list[Planes]:
    """Any operator that computes each element of its output from the elements at the same place."""
    operands = [Labelled(tuple(tensor.shape), call.planes(tensor)) for tensor in call.tensors]
    if not operands:
        return [call.new_labels(output.shape) for output in call.outputs]
    _mark_roles(call)
    static = [call.is_static(tensor) for tensor in call.tensors]
    divisor = _must_not_be_zero(call)
    planes = merge(call.space, operands, lambda zeros: keeps_zero(call, zeros - divisor), static)
    return [planes for _ in call.outputs]


def _must_not_be_zero(call: Call) -> set[int]:
    """The divisor, where a parameter is divided by the norm of another: zero by zero would be no number."""
    if call.name != "div" or not call.static or len(call.tensors) != 2:
        return set()
    for plane in call.planes(call.tensors[1]):
        call.space.mark(NEVER_ZERO, plane.ids)
    return {1}


def _mark_roles(call: Call) -> None:
    """A parameter that multiplies or shifts what depends on data is a scale or a bias."""
    roles = {"mul": "scale", "div": "scale", "add": "bias", "sub": "bias"}
    if call.name in roles and not call.static:
        for tensor in call.tensors:
            if call.is_static(tensor):
                mark(call.space, roles[call.name], call.planes(tensor))


def mark(space: LabelSpace, role: str, planes: Iterable[Plane]) -> None:
    """Note the role that these labels play."""
    for plane in planes:
        space.mark(role, plane.ids)


_MORE = (
    "copy", "where", "fill", "zero", "masked_fill", "bernoulli", "normal", "uniform", "exponential", "native_dropout",
    "threshold", "hardtanh", "clamp", "lerp", "addcmul", "addcdiv", "nan_to_num", "prelu", "_prelu_kernel", "gelu",
    "rrelu_with_noise", "_to_copy", "hardswish", "hardsigmoid", "relu6", "mish", "silu", "elu", "selu", "celu",
    "leaky_relu", "softplus", "softshrink", "hardshrink", "tanhshrink", "log_sigmoid_forward", "logit",
)  # fmt: skip
RULES: dict[str, Rule] = dict.fromkeys(_MORE, pointwise)

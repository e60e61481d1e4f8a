"""Tensors made from nothing: they may take any size, unless their values depend on their place."""

from __future__ import annotations

from lightning_prune.graph.calls import Call, Planes, Rule
from lightning_prune.graph.labels import Plane


def uniform_values(call: Call) -> list[Planes]:
    """Zeros, ones, noise: any part of them serves as well as any other."""
    result = []
    for output in call.outputs:
        zero = not output.is_floating_point() or call.name.endswith("zeros")
        result.append(tuple(Plane(plane.ids, zero) for plane in call.new_labels(output.shape)))
    return result


def like(call: Call) -> list[Planes]:
    """Zeros, ones, noise in the shape of another tensor, which they must share with it."""
    zero = not call.outputs[0].is_floating_point() or call.name == "zeros_like"
    return [tuple(Plane(plane.ids, zero) for plane in call.planes(call.tensors[0]))]


def fixed_values(call: Call) -> list[Planes]:
    """Counting tensors and constants: they cannot be cut."""
    return [() for _ in call.outputs]


def from_data(call: Call) -> list[Planes]:
    """Tensors made from numbers of Python or NumPy: a size may have been written into a small one."""
    data = call.outputs[0]
    if data.numel() <= _SMALL:
        call.constant(str(data.tolist()))  # as a string, in which NaN equals NaN
    return [()]


_SMALL = 64
_UNIFORM = (
    "zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full", "new_empty",
    "empty_strided", "new_empty_strided",
)  # fmt: skip
_LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like")
_FIXED = (
    "arange", "linspace", "eye", "scalar_tensor", "randint", "randperm", "tril_indices", "triu_indices", "one_hot",
)  # fmt: skip
RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNIFORM, uniform_values),
    **dict.fromkeys(_LIKE, like),
    **dict.fromkeys(_FIXED, fixed_values),
    **dict.fromkeys(("lift_fresh", "lift_fresh_copy"), from_data),
}

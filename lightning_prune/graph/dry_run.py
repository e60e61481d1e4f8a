"""Dry runs: run what a network does without the arithmetic that costs time.

Which operators a network executes seldom depends on the numbers it computes. So matrix products and convolutions of
data, and all that follows from them, give tensors of the right shape without numbers, until the network looks at one;
then it must be run for real.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry


class NumbersNeededError(BaseException):
    """The network looks at a number that a dry run made up.

    Not an ``Exception``, so that no handler of the user's code takes it for a failure of the network.
    """


def reads_numbers(function: OpOverload, args: Sequence[Any]) -> bool:
    """Whether what happens next may depend on the numbers that an operator is given."""
    if function.namespace not in ("aten", "prims"):
        return True
    if function is torch.ops.aten.index.Tensor:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags


READS_OUTSIDE = frozenset({"numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "untyped_storage"})
"""Methods of a tensor that hand its numbers out without an operator."""


class Geometry(NamedTuple):
    """What is known of a tensor without its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class LeftOut(NamedTuple):
    """What an operator would have returned, but for the numbers."""

    result: Any


def leave_out(function: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], is_made_up: bool) -> LeftOut | None:
    """The result of an operator on data without its arithmetic.

    Args:
        function: The operator.
        args: Its arguments.
        kwargs: Its keyword arguments.
        is_made_up: Whether an argument is made up already, so that nothing is lost.

    Returns:
        None where the operator must be executed: it is cheap, it gives a view, or its result is not known without it.
    """
    if not is_made_up and function._overloadpacket not in flop_registry:
        return None
    if function.is_view or kwargs.get("device") is not None or torch.Tag.inplace_view in function.tags:
        return None
    if function._schema.is_mutable:
        in_place = function._schema.name.endswith("_") and torch.Tag.pointwise in function.tags
        return LeftOut(args[0]) if in_place else None
    try:
        made = _geometry_of_result(function, _described(tuple(args)), _described(dict(kwargs)))
    except Exception:  # no meta kernel, or the call is wrong: the operator itself says it best
        return None
    device = next(tensor.device for tensor in _tensors((*args, *kwargs.values())))
    return LeftOut(_filled(made, device))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _described(value: Any) -> Any:
    """Arguments with geometries for tensors, hashable."""
    if isinstance(value, Tensor):
        return Geometry(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    if isinstance(value, dict):
        return tuple((key, _described(item)) for key, item in value.items())
    return value


@lru_cache(maxsize=4096)
def _geometry_of_result(function: OpOverload, args: Any, kwargs: Any) -> Any:
    """What the operator makes of tensors that have no numbers."""
    with _disable_current_modes():
        result = function(*map(_empty, args), **{key: _empty(value) for key, value in kwargs})
    if not all(isinstance(part, Tensor) for part in (result if isinstance(result, (tuple, list)) else (result,))):
        raise NotImplementedError
    return _described(result)


def _empty(value: Any) -> Any:
    if isinstance(value, Geometry):
        return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device="meta")
    return [_empty(item) for item in value] if isinstance(value, tuple) else value


def _filled(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Geometry):
        return tuple(_filled(item, device) for item in value)
    tensor = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=device)
    # Nobody reads the numbers, and memory that is not written costs nothing; but a position must be a position.
    return tensor if value.dtype.is_floating_point or value.dtype.is_complex else tensor.zero_()

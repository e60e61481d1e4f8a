"""Rehearsal: run what a network does without the arithmetic that costs time.

Which operators a network executes seldom depends on the numbers it computes. So matrix products and convolutions of
data give zeros of the right shape, until the network looks at a number that came from them; then it must be run for
real.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from lightning_prune.graph.program import map_nested


class NumbersNeededError(BaseException):
    """The network looks at a number that a rehearsal made up.

    Not an ``Exception``, so that no handler of the user's code takes it for a failure of the network.
    """


def is_costly(function: OpOverload) -> bool:
    """Whether a rehearsal leaves out the arithmetic of an operator."""
    return function._overloadpacket in flop_registry


def reads_numbers(function: OpOverload, args: Sequence[Any]) -> bool:
    """Whether what happens next may depend on the numbers that an operator is given."""
    if function.namespace not in ("aten", "prims"):
        return True
    if function is torch.ops.aten.index.Tensor:
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags


READS_OUTSIDE = frozenset({"numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "untyped_storage"})
"""Methods of a tensor that hand its numbers out without an operator."""


def made_up(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operator would return, with zeros for numbers."""

    def empty(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    def zeros(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).zero_()

    device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return map_nested(zeros, function(*map_nested(empty, tuple(args)), **map_nested(empty, dict(kwargs))))

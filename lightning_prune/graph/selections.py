"""Selections: what a network picks by its numbers (boxes, tokens, a branch), recorded once and played back.

A detector keeps as many boxes as it finds, so two runs of it compare only if the second one keeps the same boxes as the
first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.graph.program import map_nested

_ORDERED = frozenset({"aten::topk", "aten::sort"})
_POSITIONS = frozenset({"aten::argmax", "aten::argmin", "aten::argsort", "torchvision::nms"})
_HARMLESS = frozenset({"aten::equal"})


def is_selection(function: OpOverload, args: Sequence[Any]) -> bool:
    """Whether the numbers that an operator is given decide what comes next."""
    if function is torch.ops.aten.index.Tensor:
        return any(mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in args[1])
    return _selects(function)


@cache
def _selects(function: OpOverload) -> bool:
    name = function._schema.name
    if name in _ORDERED or name in _POSITIONS:
        return True
    tags = function.tags
    decides = torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
    return decides and name not in _HARMLESS


class Selection(NamedTuple):
    """What was selected.

    Args:
        function: The operator.
        shape: Shape of the tensor it selected from.
        chosen: Its result; the indices of it where it returns values too; the masks of an ``index``.
    """

    function: OpOverload
    shape: tuple[int, ...]
    chosen: Any


class Selections:
    """A tape of selections.

    Args:
        tape: Selections to play back, in order; without them they are recorded.
        numbers: Whether to play back single floating-point numbers too.
    """

    def __init__(self, tape: list[Selection] | None = None, numbers: bool = True) -> None:
        """See the class."""
        self.tape: list[Selection] = [] if tape is None else tape
        self._playing = tape is not None
        self._numbers = numbers
        self._position = 0

    def run(self, function: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Execute an operator that selects, or say what it selected the last time."""
        shape = tuple(args[0].shape) if isinstance(args[0], Tensor) else ()
        if not self._playing:
            result = function(*args, **kwargs)
            self.tape.append(Selection(function, shape, map_nested(_kept, _chosen(function, args, result))))
            return result
        due = self.tape[self._position] if self._position < len(self.tape) else None
        if due is None or due.function is not function or due.shape != shape:
            return function(*args, **kwargs)
        self._position += 1
        if isinstance(due.chosen, float) and not self._numbers:
            return function(*args, **kwargs)
        return _replayed(due, args, kwargs)


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _chosen(function: OpOverload, args: Sequence[Any], result: Any) -> Any:
    if function is torch.ops.aten.index.Tensor:
        return tuple(args[1])
    return result[1] if function._schema.name in _ORDERED else result


def _replayed(selection: Selection, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    chosen = map_nested(_kept, selection.chosen)
    if selection.function is torch.ops.aten.index.Tensor:
        return selection.function(args[0], list(chosen))
    if selection.function._schema.name in _ORDERED:
        names = [argument.name for argument in selection.function._schema.arguments]
        dim = {"dim": -1, **dict(zip(names, args, strict=False)), **kwargs}["dim"]
        return args[0].gather(dim, chosen) if args[0].dim() else args[0].clone(), chosen
    return chosen


class SelectionsMode(TorchDispatchMode):
    """Records or plays back all selections made inside it.

    Args:
        selections: The tape.
    """

    def __init__(self, selections: Selections) -> None:
        """See the class."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._selections = selections

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute the operator or play it back."""
        if is_selection(func, args):
            return self._selections.run(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

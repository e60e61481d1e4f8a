"""What is known of an optimizer: the shape of its state, and how it moves weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, optim
from torch.optim import Optimizer

_ENTRY_BY_ENTRY = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.Adamax,
    optim.Adagrad,
    optim.Adadelta,
    optim.RMSprop,
)


def leaves_zeros(optimizer: Optimizer) -> bool:
    """Whether an optimizer is known not to move a weight that is zero and whose gradient and state are zero.

    Args:
        optimizer: Any optimizer. One of a class derived from those of torch counts as unknown.
    """
    return type(optimizer) in _ENTRY_BY_ENTRY


def doubtful_keys(optimizer: Optimizer, shapes: Mapping[int, tuple[int, ...]] | None = None) -> frozenset[Any]:
    """Kinds of state that may hold something else than a number for each entry of a parameter.

    The optimizers of torch keep no such thing, but others do: the preconditioners of a matrix are square, and for a
    square parameter they cannot be told from its momentum by their shape.

    Args:
        optimizer: Any optimizer.
        shapes: Shapes that parameters had when their state was made, by ``id``, where they have others by now.
    """
    if type(optimizer).__module__.startswith("torch.optim"):
        return frozenset()
    certain: set[Any] = set()
    undecided: set[Any] = set()
    wrong: set[Any] = set()
    for parameter, state in optimizer.state.items():
        shape = (shapes or {}).get(id(parameter), tuple(parameter.shape))
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.dim() != 2 or len(shape) != 2 or value.numel() <= 1:
                continue
            if value.shape[0] != value.shape[1]:
                certain.add(key)
            else:
                (undecided if tuple(value.shape) == shape else wrong).add(key)
    return frozenset(wrong | (undecided - certain))

"""What tracers look at: the user's code, and not the bookkeeping around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes

_unobserved_depth = 0
_exactly_depth = 0


@contextmanager
def unobserved() -> Iterator[None]:
    """Inside, nobody looks at what is executed: for what is done around the user's code and is no part of it."""
    global _unobserved_depth
    _unobserved_depth += 1
    try:
        with _disable_current_modes():
            yield
    finally:
        _unobserved_depth -= 1


@contextmanager
def bookkeeping() -> Iterator[None]:
    """Inside, nobody looks, and tensors are no more than tensors to torch, which is much faster for many of them."""
    with unobserved(), torch._C.DisableTorchFunction():
        yield


def is_observed() -> bool:
    """Whether a tracer should look at what is executed now."""
    return _unobserved_depth == 0


@contextmanager
def computing_exactly() -> Iterator[None]:
    """Inside, programs that would run in mixed precision run in that of their weights."""
    global _exactly_depth
    _exactly_depth += 1
    try:
        yield
    finally:
        _exactly_depth -= 1


def is_exact() -> bool:
    """Whether mixed precision should be left out."""
    return _exactly_depth > 0

"""One way: functions that choose among kernels by sizes, strides or hardware always execute the same operators."""

from __future__ import annotations

import math
import string
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_prune.graph.program import is_observed
from lightning_prune.graph.rehearsal import READS_OUTSIDE, NumbersNeededError


class MakesUp(Protocol):
    """Knows which tensors hold numbers that were made up."""

    def is_made_up(self, tensor: Tensor) -> bool:
        """Whether the numbers of a tensor come from a rehearsal."""


_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


class _OneWay(TorchFunctionMode):
    """Functions that choose among kernels by strides or hardware always go the same way, in operators that are seen."""

    def __init__(self, tracer: MakesUp) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace ``linear``; run recurrent layers without their fused kernel."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and is_observed():
            return _linear(*args, **kwargs)
        if func is torch.functional.einsum and is_observed() and len(args) == 3 and isinstance(args[0], str):
            return _einsum(*args)
        name = getattr(func, "__name__", None)
        if name in READS_OUTSIDE and is_observed() and self._tracer.is_made_up(args[0]):
            raise NumbersNeededError
        if name in _RECURRENT:
            with torch.backends.mkldnn.flags(enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() != 2 or input.dim() < 2:
        return torch.nn.functional.linear(input, weight, bias)
    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    product = rows.mm(weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return product if input.dim() == 2 else product.reshape(*input.shape[:-1], weight.shape[0])


def _einsum(equation: str, first: Tensor, second: Tensor) -> Tensor:
    """A product of two tensors as one batched matrix product, whether or not some sizes are 1."""
    terms = _spelled_out(equation, (first.dim(), second.dim()))
    a, b, output = terms
    sizes = dict(zip(a + b, (*first.shape, *second.shape), strict=False))
    shapes = (tuple(sizes.get(letter, 0) for letter in term) for term in (a, b))
    fits = all(shape == tensor.shape for shape, tensor in zip(shapes, (first, second), strict=True))
    distinct = all(term.isalpha() and len(set(term)) == len(term) for term in terms)
    if not fits or not distinct or not set(a) ^ set(b) <= set(output):
        return torch.functional.einsum(equation, first, second)
    batch = [letter for letter in output if letter in a and letter in b]
    summed = [letter for letter in a if letter in b and letter not in output]
    left, right = ([letter for letter in term if letter not in batch + summed] for term in (a, b))

    def size(letters: list[str]) -> int:
        return math.prod(sizes[letter] for letter in letters)

    rows = first.permute([a.index(letter) for letter in batch + left + summed])
    columns = second.permute([b.index(letter) for letter in batch + summed + right])
    product = torch.bmm(
        rows.reshape(size(batch), size(left), size(summed)), columns.reshape(size(batch), size(summed), size(right))
    )
    made = batch + left + right
    return product.reshape([sizes[letter] for letter in made]).permute([made.index(letter) for letter in output])


def _spelled_out(equation: str, ndims: tuple[int, int]) -> list[str]:
    """The terms of an equation of two operands, with letters for dots; an equation without an arrow stays as it is."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    counts = [n - len(term.replace("...", "")) for n, term in zip(ndims, terms, strict=False) if "..." in term]
    dots = "".join(unused[-max(counts) :]) if counts and max(counts) > 0 else ""
    spelled: list[str] = []
    for term in (*terms[:2], output):
        own = dots if term is output else dots[len(dots) - max(ndims[len(spelled)] - len(term) + 3, 0) :]
        spelled.append(term.replace("...", own))
    return spelled if len(terms) == 2 else ["", "", ""]


@contextmanager
def decomposed(tracer: MakesUp) -> Iterator[None]:
    """Switch off the fused kernels that hide from a tracer which operators they stand for."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
            with _OneWay(tracer), sdpa_kernel(SDPBackend.MATH):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)

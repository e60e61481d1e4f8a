"""One way: functions that choose among kernels by sizes, strides or hardware always execute the same operators."""

from __future__ import annotations

import math
import string
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.graph.dry_run import READS_OUTSIDE, NumbersNeededError
from lightning_prune.graph.observation import is_observed


class MakesUp(Protocol):
    """Knows which tensors hold numbers that were made up."""

    def is_made_up(self, tensor: Tensor) -> bool:
        """Whether the numbers of a tensor come from a dry run."""


_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
_FUSED_ON_ACCELERATORS = _RECURRENT | {
    "lstm_cell",
    "gru_cell",
    "rnn_tanh_cell",
    "rnn_relu_cell",
    "rms_norm",
    "grid_sampler",
}
"""Functions that are one kernel on an accelerator, each with a name of its own, and several known operators here."""


class _OneWay(TorchFunctionMode):
    """Functions that choose among kernels by strides or hardware always go the same way, in operators that are seen."""

    def __init__(self, tracer: MakesUp) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace what goes several ways; run what has a fused kernel without it."""
        kwargs = kwargs or {}
        if func in _REPLACED and is_observed():
            return _REPLACED[func](*args, **kwargs)
        if func is torch.functional.einsum and is_observed() and isinstance(args[0], str) and len(args) > 2:
            return _einsum(*args)
        name = getattr(func, "__name__", None)
        if name in READS_OUTSIDE and is_observed() and self._tracer.is_made_up(args[0]):
            raise NumbersNeededError
        if name in _FUSED_ON_ACCELERATORS and is_observed():
            return _on_the_cpu(func, args, kwargs)
        return func(*args, **kwargs)


def _on_the_cpu(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What a function gives on the CPU without a fused kernel, back on the device that its tensors are on."""
    devices = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    with torch.backends.mkldnn.flags(enabled=False):
        if devices <= {torch.device("cpu")} or len(devices) > 1:
            return func(*args, **kwargs)
        moved, named = tree_map_only(Tensor, Tensor.cpu, (args, kwargs))
        return tree_map_only(Tensor, lambda tensor: tensor.to(*devices), func(*moved, **named))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() != 2 or input.dim() < 2:
        return torch.nn.functional.linear(input, weight, bias)
    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    product = rows.mm(weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return product if input.dim() == 2 else product.reshape(*input.shape[:-1], weight.shape[0])


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Without any data torch would multiply by the first channel's weight, whatever the channel."""
    if input.numel() == 0 and not training:
        return torch.native_batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps)[0]
    return torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


_REPLACED: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch.nn.functional.linear: _linear,
    torch.nn.functional.batch_norm: _batch_norm,
}


def _einsum(equation: str, *operands: Tensor) -> Tensor:
    """A product as batched matrix products of two tensors at a time, whether or not some sizes are 1."""
    terms = _spelled_out(equation, [operand.dim() for operand in operands])
    inputs, output = terms[:-1], terms[-1]
    sizes = dict(zip("".join(inputs), (n for operand in operands for n in operand.shape), strict=False))
    shapes = [tuple(sizes.get(letter, 0) for letter in term) for term in inputs]
    fits = [tuple(operand.shape) for operand in operands] == shapes
    distinct = all(term.isalpha() and len(set(term)) == len(term) for term in terms)
    if not fits or not distinct or not set(output) <= sizes.keys():
        return torch.functional.einsum(equation, *operands)
    product, letters = operands[0], inputs[0]
    for number, (term, operand) in enumerate(zip(inputs[1:], operands[1:], strict=True), 2):
        needed = set(output).union(*inputs[number:])
        product, letters = _product(product, letters, operand, term, needed)
    return product.permute([letters.index(letter) for letter in output])


def _product(first: Tensor, a: str, second: Tensor, b: str, needed: set[str]) -> tuple[Tensor, str]:
    """The product of two tensors, summed over the letters that nobody needs any more; its letters."""
    first, a = _summed(first, a, needed | set(b))
    second, b = _summed(second, b, needed | set(a))
    sizes = {**dict(zip(a, first.shape, strict=True)), **dict(zip(b, second.shape, strict=True))}
    batch = [letter for letter in a if letter in b and letter in needed]
    summed = [letter for letter in a if letter in b and letter not in needed]
    left, right = ([letter for letter in term if letter not in batch + summed] for term in (a, b))

    def size(letters: list[str]) -> int:
        return math.prod(sizes[letter] for letter in letters)

    rows = first.permute([a.index(letter) for letter in batch + left + summed])
    columns = second.permute([b.index(letter) for letter in batch + summed + right])
    product = torch.bmm(
        rows.reshape(size(batch), size(left), size(summed)), columns.reshape(size(batch), size(summed), size(right))
    )
    letters = batch + left + right
    return product.reshape([sizes[letter] for letter in letters]), "".join(letters)


def _summed(tensor: Tensor, letters: str, needed: set[str]) -> tuple[Tensor, str]:
    dims = [dim for dim, letter in enumerate(letters) if letter not in needed]
    if not dims:
        return tensor, letters
    return tensor.sum(dims), "".join(letter for letter in letters if letter in needed)


def _spelled_out(equation: str, ndims: Sequence[int]) -> list[str]:
    """The terms of an equation, with letters for dots; empty ones where it has no arrow or too few terms."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != len(ndims) or len(terms) < 2:
        return [""] * (len(ndims) + 1)
    counts = [n - len(term) + 3 if "..." in term else 0 for n, term in zip(ndims, terms, strict=True)]
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    dots = "".join(unused[: max(counts)])
    own = [dots[len(dots) - count :] if count > 0 else "" for count in counts]
    return [term.replace("...", letters) for term, letters in zip((*terms, output), (*own, dots), strict=True)]


@contextmanager
def _unsynchronised() -> Iterator[None]:
    """Have batch-norms that would ask other processes for their statistics take those of this one."""
    own = nn.SyncBatchNorm.forward
    nn.SyncBatchNorm.forward = _BatchNorm.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.SyncBatchNorm.forward = own  # type: ignore[method-assign]


@contextmanager
def decomposed(tracer: MakesUp) -> Iterator[None]:
    """Switch off the fused kernels that hide from a tracer which operators they stand for."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
            with _OneWay(tracer), sdpa_kernel(SDPBackend.MATH), _unsynchronised():
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)

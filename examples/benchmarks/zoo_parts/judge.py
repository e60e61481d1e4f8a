"""One judge for every backend: is the pruned network the original with the removed entries switched off?

The removed entries are deduced from the weights alone: every parameter holds distinct values, so each surviving slice
is found again in the original tensor; whatever did not survive is zeroed there, in producers and in consumers alike.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .locate import NotLocatedError, surviving
from .statistics import GivenScales, KeptStatistics, RecordedScales

TOLERANCE = 1e-4
# Exchanging two faint channels moves an output by as little as 1e-6, which only float64 tells from rounding.
DOUBLE_TOLERANCE = 1e-7
EVIDENCE = 1e-3
_OUTPUT = "(output)"
PROVEN = ("exact", "norm-exact", "scale-exact")
# Stands for zero where zero gives 0/0 (the norm of a removed row under weight normalisation); needs float64.
_ALMOST_ZERO = 1e-100


@dataclass(frozen=True)
class Verdict:
    """What the judge found.

    Attributes:
        word: ``exact``, ``norm-exact``, ``scale-exact``, ``norm-inexact``, ``WRONG``, ``no evidence``,
            ``unconfirmed`` (equal in float32, not quite in float64) or ``other``.
        error: Largest difference to the masked original, relative to the largest value of each output.
        change: How far the masked original is from the original, measured likewise.
        compared: Number of tensors compared.
        precision: In what precision the error was measured.
        reason: Why it is ``other``.
    """

    word: str
    error: float | None = None
    change: float | None = None
    compared: int = 0
    precision: str = "float32"
    reason: str | None = None


@torch.no_grad()
def judge(original: nn.Module, pruned: nn.Module, inputs: Sequence[Any], inside: bool = False) -> Verdict:
    """Compare a pruned network with its original.

    Args:
        original: The network before pruning, with the same weights.
        pruned: The network after it.
        inputs: Positional arguments of ``forward``.
        inside: Whether to compare also what modules inside return, where its shape did not change. For networks whose
            outputs depend on a selection (detectors): near ties make final outputs differ, or they may be empty.
    """
    try:
        masks = surviving(original, pruned)
    except NotLocatedError as problem:
        return Verdict("other", reason=str(problem))
    masked = copy.deepcopy(original)
    trial = _Trial(original, masked, pruned, masks, inputs, inside)
    verdict = trial.verdict(0.0)
    try:
        with as_double(original), as_double(masked), as_double(pruned):
            double = _Trial(original, masked, pruned, masks, _doubled(inputs), inside).verdict(_ALMOST_ZERO)
    except (RuntimeError, TypeError):  # some networks contain float32 constants
        return verdict
    if verdict.word in PROVEN and double.error is not None and DOUBLE_TOLERANCE <= double.error < TOLERANCE:
        return replace(double, word="unconfirmed")
    return double


class _Trial:
    def __init__(
        self,
        original: nn.Module,
        masked: nn.Module,
        pruned: nn.Module,
        masks: Mapping[str, Tensor],
        inputs: Sequence[Any],
        inside: bool,
    ):
        self.original, self.masked, self.pruned = original, masked, pruned
        self.masks, self.inputs, self.inside = masks, inputs, inside

    def verdict(self, zero: float) -> Verdict:
        precision = "float64" if zero else "float32"
        tolerance = DOUBLE_TOLERANCE if zero else TOLERANCE
        dense = self._run(self.original)
        recorded = RecordedScales()
        found = self._run(self.pruned, recorded)
        if self._misshapen(dense, found):
            return Verdict("other", precision=precision, reason="the outputs have another shape")
        parameters = dict(self.masked.named_parameters())
        for name, mask in self.masks.items():
            parameters[name].data.masked_fill_(~mask, zero)
        expected = self._run(self.masked)
        if not all(bool(value.isfinite().all()) for name, value in dense.values.items() if name in found.values):
            return Verdict("other", precision=precision, reason="the original's outputs are not finite")
        change, compared = difference(dense, expected, set(found.unchanged(dense)))
        error, _ = difference(expected, found)
        if error < tolerance:
            word = "exact" if change > EVIDENCE else "no evidence"
            return Verdict(word, error, change, compared, precision)
        statistics = KeptStatistics({id(parameters[name]): mask for name, mask in self.masks.items()})
        norm_error, _ = difference(self._run(self.masked, statistics), found)
        if norm_error < tolerance:
            return Verdict("norm-exact", norm_error, change, compared, precision)
        with GivenScales(recorded.scales):
            scale_error, _ = difference(self._run(self.masked, statistics), found)
        if scale_error < tolerance:
            return Verdict("scale-exact", scale_error, change, compared, precision)
        word = "norm-inexact" if statistics.changed else "WRONG"
        return Verdict(word, min(error, norm_error, scale_error), change, compared, precision)

    def _run(self, model: nn.Module, mode: AbstractContextManager[Any] | None = None) -> Observed:
        with mode or nullcontext():
            return observe(model, self.inputs, self.inside)

    def _misshapen(self, dense: Observed, found: Observed) -> bool:
        return not self.inside and {n: v.shape for n, v in dense.values.items()} != {
            n: v.shape for n, v in found.values.items()
        }


@dataclass
class Observed:
    """Tensors by name, how many selections came before each, and what the selections chose."""

    values: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    selected: list[Tensor] = field(default_factory=list)

    def unchanged(self, other: Observed) -> list[str]:
        """Names of the tensors that have the same shape in both."""
        return [n for n, v in self.values.items() if n in other.values and other.values[n].shape == v.shape]

    def agreeing(self, other: Observed) -> int:
        """How many selections chose the same, from the first on."""
        pairs = zip(self.selected, other.selected, strict=False)
        different = (number for number, (mine, theirs) in enumerate(pairs) if not torch.equal(mine, theirs))
        return next(different, min(len(self.selected), len(other.selected)))


class Selections(TorchDispatchMode):
    """Inside, what operators choose by comparing values is noted: what follows two different choices cannot agree."""

    def __init__(self, seen: Observed):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name in ("topk", "sort"):
            self.seen.selected.append(result[1].clone())
        elif name in ("nms", "nonzero", "argmax"):
            self.seen.selected.append(result.clone())
        elif name == "index":
            self.seen.selected += [i.clone() for i in args[1] if i is not None and i.dtype is torch.bool]
        return result


def observe(model: nn.Module, inputs: Sequence[Any], inside: bool = False) -> Observed:
    """The float tensors that a network returns in evaluation mode, and those that its modules do, by name."""
    seen = Observed()
    calls: dict[str, int] = {}
    selections = Selections(seen) if inside else nullcontext()

    def note(name: str, value: Any) -> None:
        number = calls[name] = calls.get(name, -1) + 1
        for position, leaf in enumerate(tree_leaves(value)):
            if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                key = f"{name} {number}.{position}"
                seen.values[key] = leaf.detach().clone()
                seen.after[key] = len(seen.selected)

    handles = []
    for name, module in model.named_modules():
        if inside and name and next(module.parameters(), None) is not None:
            handles.append(module.register_forward_hook(lambda _m, _i, result, name=name: note(name, result)))
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused operator hides norms and attention
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            arguments = tree_map(_copied, tuple(inputs))
            with selections:
                result = model(*arguments)
            note(_OUTPUT, result)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    return seen


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _doubled(inputs: Sequence[Any]) -> Any:
    return tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, tuple(inputs))


def difference(expected: Observed, found: Observed, names: set[str] | None = None) -> tuple[float, int]:
    """Largest difference, relative to each tensor's largest expected value, and how many tensors were compared."""
    largest, compared = 0.0, 0
    agreeing = expected.agreeing(found)
    for name in found.unchanged(expected):
        value, other = expected.values[name], found.values[name]
        if value.numel() == 0 or expected.after[name] > agreeing or (names is not None and name not in names):
            continue
        compared += 1
        scale = float(value.abs().max()) or 1.0
        distance = float((value - other).abs().max()) / scale
        if not distance <= largest:  # NaN counts as a difference
            largest = distance if distance == distance else float("inf")
    return (largest, compared) if compared else (float("inf"), 0)


@contextmanager
def as_double(model: nn.Module) -> Iterator[None]:
    """Inside, parameters and float buffers are double; afterwards the same tensors as before are back."""
    tensors = [*model.parameters(), *model.buffers()]
    kept = [(tensor, tensor.data) for tensor in tensors if tensor.is_floating_point()]
    complex_ones = [(tensor, tensor.data) for tensor in tensors if tensor.is_complex()]
    gradients = [(tensor, tensor.grad) for tensor in model.parameters()]
    try:
        for tensor, _ in gradients:
            tensor.grad = None
        for tensor, data in kept:
            tensor.data = data.double()
        for tensor, data in complex_ones:
            tensor.data = data.to(torch.complex128)
        yield
    finally:
        for tensor, data in kept + complex_ones:
            tensor.data = data
        for tensor, gradient in gradients:
            tensor.grad = gradient

"""What the network puts out: compared between the masked network and the shrunk one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.errors import ShrinkError
from lightning_prune.graph.analysis import Analysis, Run
from lightning_prune.graph.observation import computing_exactly
from lightning_prune.graph.program import tensors_in
from lightning_prune.graph.selections import Selection, Selections, SelectionsMode
from lightning_prune.surgery.attributes import UnsolvedError
from lightning_prune.surgery.resize import Saved, replace, restore
from lightning_prune.surgery.statistics import kept_statistics
from lightning_prune.surgery.transaction import kept_labels

_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
    torch.complex128: 1e-9,
    torch.complex64: 1e-4,
}


_HALF = {torch.float16, torch.bfloat16}

_AMPLIFIED, _MOST = 10.0, 0.05
"""How far beyond what rounding its weights does to a network a difference may go, and how far at the most."""

Scales = Mapping[int, Mapping[int, float]]
"""Numbers that follow the widths, by the ``id`` of a program's events and the position among them."""


class UnequalError(ShrinkError):
    """Outputs differ by more than rounding usually explains."""


class Output(NamedTuple):
    """A tensor that a program hands out, with the relative difference that rounding may make in it."""

    value: Tensor
    tolerance: float


@dataclass(frozen=True)
class Observed:
    """What the evaluation programs handed out.

    Attributes:
        outputs: Their tensors.
        selections: What each of them selected by its numbers; None where that is not known.
        mixed: Whether they ran in mixed precision, if the network trains in it.
    """

    outputs: list[Output] = field(default_factory=list)
    selections: Sequence[list[Selection] | None] = field(default_factory=list)
    mixed: bool = True


Surroundings = Callable[[Run, Selections], AbstractContextManager[None]]


def _selections_only(run: Run, selections: Selections) -> AbstractContextManager[Any]:
    return SelectionsMode(selections) if run.selects else nullcontext()


@contextmanager
def _full_precision() -> Iterator[None]:
    """Have a GPU multiply single-precision numbers as such, not by TensorFloat-32.

    Its error is above what is allowed here, and differs among kernels, which are chosen by the sizes. By the settings
    that every version of torch has, which the network may read; but not where it was told by the newer ones.
    """
    cudnn = torch.backends.cudnn
    try:
        convolutions, products = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        with _told_newly():
            yield
        return
    try:
        if convolutions:
            cudnn.allow_tf32 = False
        if products != "highest":
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if convolutions:
            cudnn.allow_tf32 = True
        if products != "highest":
            torch.set_float32_matmul_precision(products)


@contextmanager
def _told_newly() -> Iterator[None]:
    """The same by the settings of torch 2.9 and later; the older ones fail once these are used."""
    cudnn: Any = torch.backends.cudnn
    places = [cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def outputs(
    analysis: Analysis, like: Observed | None = None, surroundings: Surroundings = _selections_only
) -> Observed:
    """What the evaluation programs hand out now.

    Args:
        analysis: What is known of the network.
        like: What they handed out in another run whose selections are repeated: numbers that differ by rounding only
            must not pick another box or branch.
        surroundings: What each program runs in.

    Raises:
        ShrinkError: If one of them cannot be run.
        UnsolvedError: If that is one which only restricts.
    """
    # Half precision hides errors of several percent. What follows events of the trace must run as that did, though.
    if surroundings is _selections_only and (like is None or not like.mixed):
        try:
            with computing_exactly():
                return _outputs(analysis, like, surroundings, mixed=False)
        except (ShrinkError, UnsolvedError):
            if like is not None:
                raise
    return _outputs(analysis, like, surroundings, mixed=True)


def _outputs(analysis: Analysis, like: Observed | None, surroundings: Surroundings, mixed: bool) -> Observed:
    found: list[Output] = []
    tapes: list[list[Selection] | None] = []
    for run in analysis.runs:
        if run.program.training:
            continue
        tape = None if like is None else like.selections[len(tapes)]
        selections = Selections(tape, numbers=False)
        seen = _Dtypes()
        try:
            watched = nullcontext() if mixed or run.dtypes.isdisjoint(_HALF) else seen
            with _full_precision(), watched, surroundings(run, selections):
                result = run.program.run()
        except Exception as error:
            reason = f"{run.program.name} failed ({type(error).__name__}: {error})"
            if run.program.restricts:  # a new trace will tell whether it is only in its way by now
                raise UnsolvedError(0, reason, run) from error
            raise ShrinkError(reason) from error
        tapes.append(selections.tape)
        tolerance = max((_TOLERANCE.get(dtype, 0.0) for dtype in seen.dtypes or run.dtypes), default=0.0)
        found.extend(Output(tensor.detach().clone(), tolerance) for tensor in tensors_in(result))
    return Observed(found, tapes, mixed)


class _Dtypes(TorchDispatchMode):
    """Takes down what types of numbers operators return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator."""
        result = func(*args, **(kwargs or {}))
        self.dtypes.update(tensor.dtype for tensor in tensors_in(result))
        return result


def masked_outputs(
    analysis: Analysis, keep: Mapping[str, Tensor], scales: Scales | None = None, rounded: Observed | None = None
) -> Observed:
    """Outputs of the full network with the removed units switched off.

    Args:
        analysis: What is known of the network.
        keep: Kept units (int64 indices) of each group that is cut.
        scales: Numbers that followed the widths in the shrunk network.
        rounded: Of an earlier run, whose selections are repeated with every weight off by a last digit.

    Raises:
        ShrinkError: If it cannot be run so.
    """
    tensors = analysis.tensors
    values = {} if rounded is None else _rounded(tensors)
    for name, units in keep.items():
        group = analysis.groups[name]
        off = torch.ones(group.width, dtype=torch.bool)
        off[units] = False
        for slot in group.off:
            value = values.setdefault(slot.tensor, tensors[slot.tensor].detach().clone())
            value.index_fill_(slot.dim, slot.positions(off).to(value.device), 0)
    saved = [Saved(tensors[name], tensors[name].detach(), tensors[name].grad) for name in values]
    try:
        for name, value in values.items():
            replace(tensors[name], value)
        if not any(analysis.groups[name].approximate for name in keep) and not scales:
            return outputs(analysis, rounded)
        kept = kept_labels(analysis, keep)

        def surroundings(run: Run, selections: Selections) -> AbstractContextManager[None]:
            return kept_statistics(analysis, run, kept, (scales or {}).get(id(run.events), {}), selections)

        return outputs(analysis, rounded or _traced(analysis), surroundings)
    finally:
        restore(saved)


def _traced(analysis: Analysis) -> Observed:
    """What was selected when the programs were traced: other statistics must not make them take another course."""
    runs = (run for run in analysis.runs if not run.program.training)
    return Observed(selections=[None if run.dry else run.selections for run in runs])


def _rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    values = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            signs = 2 * torch.randint(2, tensor.shape, generator=draw).to(tensor.device, tensor.dtype) - 1
            values[name] = tensor.detach() * (1 + torch.finfo(tensor.dtype).eps * signs)
    return values


def tolerant(analysis: Analysis, keep: Mapping[str, Tensor], scales: Scales, expected: Observed) -> Observed:
    """Allow outputs to differ by what a last digit of the weights makes of them, in networks that amplify it.

    Args:
        analysis: What is known of the network.
        keep: As for :func:`masked_outputs`.
        scales: As there.
        expected: What that gave, taken with unrounded weights.

    Raises:
        ShrinkError: If the network cannot be run so.
    """
    moved = masked_outputs(analysis, keep, scales, rounded=expected)
    allowed = [
        Output(value, max(tolerance, min(_AMPLIFIED * _difference(value, other.value), _MOST)))
        if value.shape == other.value.shape
        else Output(value, tolerance)
        for (value, tolerance), other in zip(expected.outputs, moved.outputs, strict=True)
    ]
    return Observed(allowed, expected.selections)


def _reals(tensor: Tensor) -> Tensor:
    """The numbers in a tensor, complex ones as pairs of real ones; on the CPU, as not all devices know doubles."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).cpu().double()


def _difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where only one is NaN, or an infinity differs."""
    if expected.numel() == 0 or not (expected.is_floating_point() or expected.is_complex()):
        return 0.0
    a, b = _reals(expected), _reals(found)
    finite = a.isfinite() & b.isfinite()
    if not torch.allclose(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    a, b = a[finite], b[finite]
    scale = float(a.abs().max()) if a.numel() else 0.0
    return float((a - b).abs().max()) / scale if scale > 0 else float(b.abs().max()) if b.numel() else 0.0


def largest_difference(expected: Observed, found: Observed) -> float:
    """Largest relative difference between outputs of the same shape.

    Raises:
        UnequalError: If one differs by more than rounding can explain.
        ShrinkError: If their numbers differ.
    """
    masked_count, count = len(expected.outputs), len(found.outputs)
    if masked_count != count:
        raise ShrinkError(f"the shrunk network hands out {count} tensors, the masked one {masked_count}")
    largest = 0.0
    for (masked, tolerance), (shrunk, _) in zip(expected.outputs, found.outputs, strict=True):
        if masked.shape == shrunk.shape:
            difference = _difference(masked, shrunk)
            if not difference <= tolerance:
                raise UnequalError(
                    f"the shrunk network differs from the masked one by {difference:.2g} of the largest output"
                )
            largest = max(largest, difference)
    return largest

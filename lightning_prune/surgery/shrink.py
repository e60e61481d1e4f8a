"""Shrink a network in place: plan, check, apply, prove, and roll back on any mismatch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_prune.errors import ConfigurationError, ShrinkError
from lightning_prune.graph.analysis import Analysis
from lightning_prune.graph.channels import ChannelGraph
from lightning_prune.graph.labels import SOLID
from lightning_prune.graph.program import Program, module_programs
from lightning_prune.graph.tracer import run_traced
from lightning_prune.surgery.attributes import (
    Setting,
    Solver,
    UnsolvedError,
    integer_settings,
    symbolic,
    write_settings,
)
from lightning_prune.surgery.check import Checker, Expectation
from lightning_prune.surgery.constructors import described_settings
from lightning_prune.surgery.resize import Cut, Saved, plan_cuts, replace, resize, resize_optimizers, restore

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Shrunk:
    """What a shrink did.

    Attributes:
        settings: Integer attributes that were rewritten, with their new values.
        cuts: What was read of which tensors.
        error: Largest difference to the masked network's outputs, relative to their largest value; None if not verified.
    """

    settings: Mapping[Setting, int] = field(default_factory=dict)
    cuts: Mapping[str, Sequence[Cut]] = field(default_factory=dict)
    error: float | None = None


def trace(model: nn.Module, example_inputs: Tensor | Sequence[Any] | Mapping[str, Any]) -> ChannelGraph:
    """Find the channel groups of a network by running it.

    Args:
        model: Any module. It is left as it was.
        example_inputs: One tensor, a sequence of positional arguments or a mapping of keyword arguments for ``forward``.

    Returns:
        The groups that can be cut, each proven by a trial cut that was undone, and what stays whole and why.

    Raises:
        TraceError: If the network cannot be run on these inputs.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = trace(net, torch.randn(3, 4))
        >>> [(name, group.width) for name, group in graph.groups.items()]
        [('0', 8)]
    """
    return trace_programs(model, module_programs(model, example_inputs))


def trace_programs(model: nn.Module, programs: Sequence[Program]) -> ChannelGraph:
    """Like :func:`trace`, for a network that is run by programs.

    Raises:
        TraceError: If no program can be run.
    """
    analysis = Analysis(model, programs)
    while analysis.groups:
        kept = {name: _trial_units(units, i) for i, (name, units) in enumerate(analysis.units.items())}
        keep = {name: units for name, units in kept.items() if len(units) < len(analysis.units[name])}
        if not keep:
            break
        try:
            with _cut(model, analysis.graph(), keep) as transaction:
                transaction.prove()
                transaction.undo()
        except UnsolvedError as problem:
            _refuse(analysis, problem, keep)
            continue
        break
    return analysis.graph()


def _trial_units(units: Tensor, number: int) -> Tensor:
    """Some units of a group; another share for each group, so that sizes do not agree by chance."""
    share = (2, 3, 4)[number % 3]
    index = torch.arange(len(units))
    kept = index[index % share != share - 1]
    return kept if 0 < len(kept) else index


def _refuse(analysis: Analysis, problem: UnsolvedError, keep: Mapping[str, Tensor]) -> None:
    """Keep whole what reached the call that could not follow, or everything if nothing cut reached it."""
    kept = _kept_labels(analysis, keep)
    for run in analysis.runs if problem.run is None else [problem.run]:
        nearby = run.events[max(problem.position - 1, 0) : problem.position + 1]
        for event in reversed(nearby):
            roots = [analysis.root(plane.ids).flatten() for witness in event.witnesses for plane in witness.planes]
            cut = [r for r in roots if bool((~kept[r]).any())]
            if cut:
                analysis.freeze(torch.cat(cut), problem.reason)
                return
    analysis.freeze(torch.cat([analysis.units[name] for name in keep]), problem.reason)


def _kept_labels(analysis: Analysis, keep: Mapping[str, Tensor]) -> Tensor:
    kept = torch.ones(analysis.space.count, dtype=torch.bool)
    for name, units in keep.items():
        kept[analysis.units[name]] = False
        kept[analysis.units[name][units]] = True
    kept[SOLID] = True
    return kept


class _Transaction:
    """A cut that was applied and can be undone."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, keep: Mapping[str, Tensor]) -> None:
        assert graph.evidence is not None
        self.model, self.analysis = model, graph.evidence
        self.tensors = self.analysis.tensors
        self.kept = _kept_labels(self.analysis, keep)
        self.cuts: dict[str, list[Cut]] = plan_cuts(graph, keep)
        self.original = integer_settings(model)
        self.before = {name: tuple(self.tensors[name].shape) for name in self.cuts}
        self.saved: list[Saved] = resize(self.tensors, self.cuts)
        self.settings: dict[Setting, int] = {}

    def prove(self) -> None:
        """Run every program on the cut network; it must do what was recorded, less what was removed.

        Raises:
            UnsolvedError: If it does not.
        """
        values = {**self.original, **described_settings(self.model, self.before, {})}
        used: set[Setting] = set()
        write_settings(self.model, values)
        expectation = Expectation(self.analysis, self.kept)
        for run in self.analysis.runs:
            checker = Checker(expectation, run)
            try:
                with symbolic(self.model, values), Solver(checker, values, used):
                    run_traced(run.program, checker)
                if checker.position != len(run.events):
                    raise UnsolvedError(checker.position, "the network stopped early")
            except UnsolvedError as problem:
                problem.run = run
                raise
            except Exception as error:
                problem = UnsolvedError(checker.position, f"{run.program.name} failed after the cut: {error}")
                problem.run = run
                raise problem from error
        known = {s: Fraction(values[s], self.original[s]) for s in used if self.original[s] != 0}
        values.update(described_settings(self.model, self.before, known))
        write_settings(self.model, values)
        self.settings = {s: value for s, value in values.items() if value != self.original[s]}

    def undo(self) -> None:
        """Put everything back."""
        restore(self.saved)
        write_settings(self.model, self.original)


@contextmanager
def _cut(model: nn.Module, graph: ChannelGraph, keep: Mapping[str, Tensor]) -> Iterator[_Transaction]:
    """Apply a cut; whatever is raised inside undoes it."""
    transaction = _Transaction(model, graph, keep)
    try:
        yield transaction
    except BaseException:
        transaction.undo()
        raise


def _outputs(analysis: Analysis) -> list[tuple[str, Tensor]]:
    """What the evaluation programs hand out now."""
    results = []
    for run in analysis.runs:
        if not run.program.training:
            tensors = [leaf for leaf in tree_leaves(run.program.run()) if isinstance(leaf, Tensor)]
            results += [(run.program.name, tensor.detach().clone()) for tensor in tensors]
    return results


def _masked_outputs(graph: ChannelGraph, keep: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Outputs of the full network with the removed units switched off."""
    assert graph.evidence is not None
    tensors, values = graph.evidence.tensors, {}
    for name, units in keep.items():
        group = graph.groups[name]
        off = torch.ones(group.width, dtype=torch.bool)
        off[units] = False
        for slot in group.off:
            value = values.setdefault(slot.tensor, tensors[slot.tensor].detach().clone())
            value.index_fill_(slot.dim, slot.positions(off).to(value.device), 0)
    saved = [Saved(tensors[name], tensors[name].detach(), tensors[name].grad) for name in values]
    try:
        for name, value in values.items():
            replace(tensors[name], value)
        return _outputs(graph.evidence)
    finally:
        restore(saved)


def _difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where one is NaN and the other is not."""
    if expected.numel() == 0 or not (expected.is_floating_point() or expected.is_complex()):
        return 0.0
    a, b = expected.double(), found.double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a[a.isfinite()], b[b.isfinite()]
    scale = float(a.abs().max()) if a.numel() else 0.0
    return float((a - b).abs().max()) / scale if scale > 0 else float(b.abs().max()) if b.numel() else 0.0


def _largest_difference(expected: list[tuple[str, Tensor]], found: list[tuple[str, Tensor]]) -> tuple[float, float]:
    """Largest relative difference, and the tolerance for the data type it was found in."""
    worst, tolerance = 0.0, _TOLERANCE[torch.float32]
    for (_, a), (_, b) in zip(expected, found, strict=True):
        if a.shape == b.shape:
            difference, allowed = _difference(a, b), _TOLERANCE.get(a.dtype, 1e-4)
            if difference / allowed > worst / tolerance:
                worst, tolerance = difference, allowed
    return worst, tolerance


def shrink(
    model: nn.Module,
    graph: ChannelGraph,
    keep: Mapping[str, Tensor],
    optimizers: Iterable[Optimizer] = (),
    verify: bool = True,
) -> Shrunk:
    """Physically remove channels, in place and exactly, or leave everything as it was.

    Parameters stay the same objects, so optimizers, schedulers, hooks and tied weights go on working. The cut network
    is run and compared, operator by operator, with the program that was recorded, and its outputs with those of the
    full network whose removed channels are switched off.

    Args:
        model: The network that was traced.
        graph: Its channel graph; stale after the shrink, trace again for another one.
        keep: Kept units of each group that is cut: int64 indices in rising order, or a bool mask of ``[width]``.
        optimizers: Optimizers whose state is cut along.
        verify: Whether to compare the outputs too.

    Raises:
        ConfigurationError: If ``keep`` names an unknown group, keeps nothing of one, or does not fit it.
        ShrinkError: If the result is not proven equal. The network and the optimizers are as they were.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = trace(net, torch.randn(3, 4))
        >>> _ = shrink(net, graph, {"0": torch.tensor([1, 3, 5])})
        >>> net
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
          (2): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    units = _checked(graph, keep)
    if not units:
        return Shrunk()
    assert graph.evidence is not None
    expected = _masked_outputs(graph, units) if verify else []
    error = None
    try:
        with _cut(model, graph, units) as transaction:
            transaction.prove()
            if verify:
                error, tolerance = _largest_difference(expected, _outputs(graph.evidence))
                if not error <= tolerance:
                    raise ShrinkError(
                        f"the shrunk network differs from the masked one by {error:.2g} of the largest output"
                    )
            resize_optimizers(optimizers, transaction.tensors, transaction.cuts, transaction.saved)
    except (UnsolvedError, ShrinkError) as problem:
        culprits = _culprits(model, graph, units)
        raise ShrinkError(
            f"cutting {', '.join(culprits)} is not exact: {problem}. Nothing was changed. Exclude "
            f"{'this group' if len(culprits) == 1 else 'these groups'}, or report the model"
        ) from problem
    return Shrunk(transaction.settings, transaction.cuts, error)


@contextmanager
def resized(model: nn.Module, graph: ChannelGraph, keep: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the network for a while with only some of its units; afterwards it is as it was.

    Raises:
        ShrinkError: If the network cannot follow.
    """
    units = _checked(graph, keep)
    if not units:
        yield
        return
    try:
        with _cut(model, graph, units) as transaction:
            transaction.prove()
            yield
            transaction.undo()
    except UnsolvedError as problem:
        raise ShrinkError(f"the network cannot be run at these widths: {problem}") from problem


def _culprits(model: nn.Module, graph: ChannelGraph, units: Mapping[str, Tensor]) -> list[str]:
    """The groups that cannot be cut even alone; all of them if each can."""
    assert graph.evidence is not None
    found = []
    for name in units if len(units) > 1 else ():
        alone = {name: units[name]}
        expected = _masked_outputs(graph, alone)
        try:
            with _cut(model, graph, alone) as transaction:
                transaction.prove()
                error, tolerance = _largest_difference(expected, _outputs(graph.evidence))
                transaction.undo()
            if not error <= tolerance:
                found.append(name)
        except UnsolvedError:
            found.append(name)
    return found or list(units)


def _checked(graph: ChannelGraph, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kept unit indices of each group that really loses some."""
    if graph.evidence is None:
        raise ConfigurationError("this channel graph was not made by trace(); only a traced graph can be shrunk")
    for name, extents in graph.tensors.items():
        shape = tuple(extent.size(graph.widths) for extent in extents)
        if tuple(graph.evidence.tensors[name].shape) != shape:
            raise ConfigurationError(f"{name} changed its shape since it was traced; trace the network again")
    result = {}
    for name, chosen in keep.items():
        if name not in graph.groups:
            close = difflib.get_close_matches(name, graph.groups, 1)
            hint = f"; did you mean '{close[0]}'?" if close else f"; there are: {', '.join(graph.groups)}"
            raise ConfigurationError(f"no channel group is called '{name}'{hint}")
        width = graph.groups[name].width
        chosen = torch.as_tensor(chosen).cpu()
        if chosen.dtype is torch.bool and chosen.shape != (width,):
            raise ConfigurationError(f"the mask of group '{name}' has shape {tuple(chosen.shape)}, not ({width},)")
        index = chosen.nonzero().flatten() if chosen.dtype is torch.bool else torch.unique(chosen.long())
        if len(index) == 0:
            raise ConfigurationError(f"group '{name}' would lose all of its {width} channels; keep at least one")
        if int(index[0]) < 0 or int(index[-1]) >= width:
            raise ConfigurationError(f"group '{name}' has channels 0 to {width - 1}, asked to keep {index.tolist()}")
        if len(index) < width:
            result[name] = index
    return result

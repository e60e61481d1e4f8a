"""Shrink a network in place: plan, check, apply, prove, and roll back on any mismatch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.errors import ConfigurationError, ShrinkError
from lightning_prune.graph.analysis import Analysis, Norms
from lightning_prune.graph.channels import ChannelGraph, ChannelGroup, Refusal
from lightning_prune.graph.inner import chosen_places, without_effect
from lightning_prune.graph.known import Known
from lightning_prune.graph.program import Example, Inputs, Program, forget_caches, module_programs, uncollected
from lightning_prune.graph.tracer import named_leaves
from lightning_prune.surgery.attributes import UnsolvedError
from lightning_prune.surgery.resize import Cut, resize_optimizers
from lightning_prune.surgery.symbols import Setting
from lightning_prune.surgery.transaction import applied
from lightning_prune.surgery.trial import recorded_anew, settle_groups
from lightning_prune.surgery.verify import (
    Observed,
    Scales,
    UnequalError,
    largest_difference,
    masked_outputs,
    outputs,
    tolerant,
)

Agree = Callable[[Sequence[str]], Sequence[str]]
"""Given the groups that this process cannot cut, says which ones some process cannot; called once by each process."""


class _ElsewhereError(ShrinkError):
    """Another process cannot do what this one has proven."""


@dataclass(frozen=True)
class Shrunk:
    """What a shrink did.

    Attributes:
        settings: Integer attributes that were rewritten, with their new values.
        cuts: What was cut, by full tensor name; the same cuts resize a copy of the network (an average of its weights).
        error: Largest difference to the masked network's outputs, relative to their largest value; None if it was not
            verified, or nothing runs in evaluation mode.
    """

    settings: Mapping[Setting, int] = field(default_factory=dict)
    cuts: Mapping[str, Sequence[Cut]] = field(default_factory=dict)
    error: float | None = None


def trace(
    model: nn.Module,
    example_inputs: Inputs | Example,
    *more: Inputs | Example | Program,
    norms: Norms = "exact",
    inner: Sequence[str] = (),
) -> ChannelGraph:
    """Find the channel groups of a network by running it.

    Args:
        model: Any module. It is left as it was.
        example_inputs: One tensor, a sequence of positional arguments or a mapping of keyword arguments of
            ``forward``.
        more: Further example inputs, so that what the network does with those only is seen too; an
            :class:`~lightning_prune.graph.program.Example` names another method than ``forward``.
        norms: "exact" keeps channels whole that a layer, group or RMS norm takes its statistics over, for without
            them the others would be normalised by something else. "approximate" lets them go: the shrunk network then
            equals the masked one whose norms see the kept channels only, and whose attention scales by the kept width
            of a head where it computes that scale. Such groups are marked ``approximate``.
        inner: Patterns (as in ``fnmatch``) of the names of modules or tensors that make the channels of blocks, such
            as the queries, keys and values of attention heads. Of these not whole blocks go, but equal positions of
            every block: heads get narrower, not fewer.

    Returns:
        The groups that can be cut, each proven by a trial cut that was undone, and what stays whole and why.

    Raises:
        TraceError: If the network cannot be run on these inputs.
        ConfigurationError: If a pattern matches nothing.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = trace(net, torch.randn(3, 4))
        >>> [(name, group.width) for name, group in graph.groups.items()]
        [('0', 8)]
    """
    return trace_programs(model, module_programs(model, example_inputs, more), norms, inner)


def trace_programs(
    model: nn.Module,
    programs: Sequence[Program],
    norms: Norms = "exact",
    inner: Sequence[str] = (),
    known: Known | None = None,
) -> ChannelGraph:
    """Like :func:`trace`, for a network that is run by programs, and of which something may be known already.

    Raises:
        TraceError: If no program can be run.
        ConfigurationError: If a pattern matches nothing.
    """
    with uncollected():
        analysis = Analysis(model, programs, norms, (), known)
        notes: list[Refusal] = []
        if inner:
            # Which tensors make channels, and not read them, is known only after a first run.
            analysis = Analysis(model, programs, norms, chosen_places(analysis, inner), known)
            notes = without_effect(analysis, inner)
        analysis = settle_groups(analysis)
        analysis.notes += notes
        return analysis.graph()


def shrink(
    model: nn.Module,
    graph: ChannelGraph,
    keep: Mapping[str, Tensor],
    optimizers: Iterable[Optimizer] = (),
    verify: bool = True,
    agree: Agree | None = None,
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
        verify: Whether to compare the outputs too. In single precision they may differ by 1e-4 of the largest value;
            where the network itself makes more of rounding, by ten times what a last digit of its weights changes, but
            never by more than 5 %.
        agree: Where several processes hold the network: called by each of them, when it has proven the cut and not yet
            completed it, or cannot, with the groups that it cannot cut; returns those that any process cannot. If there
            are any, all processes leave their network as it was.

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
    units = _checked(model, graph, keep)
    if not units:
        return Shrunk()
    with uncollected():
        try:
            return _proven(graph, units, optimizers, verify, agree)
        except _ElsewhereError:
            raise
        except ShrinkError as problem:
            if agree is not None:
                problem.groups = tuple(agree(problem.groups))
            raise


def _proven(
    graph: ChannelGraph,
    units: Mapping[str, Tensor],
    optimizers: Iterable[Optimizer],
    verify: bool,
    agree: Agree | None,
) -> Shrunk:
    try:
        return _shrink(_evidence(graph), units, optimizers, verify, agree)
    except UnsolvedError:
        # What the programs do may have moved on since the trace (a loss weight that is annealed): compare afresh.
        analysis = _traced_again(graph, units)
    try:
        return _shrink(analysis, units, optimizers, verify, agree)
    except UnsolvedError as problem:
        raise _not_exact(analysis, units, problem) from problem


def _shrink(
    analysis: Analysis,
    units: Mapping[str, Tensor],
    optimizers: Iterable[Optimizer],
    verify: bool,
    agree: Agree | None,
) -> Shrunk:
    try:
        scales = _scales(analysis, units) if verify else {}
        expected = masked_outputs(analysis, units, scales) if verify else None
        try:
            shrunk = _completed(analysis, units, expected, optimizers, agree)
        except UnequalError:
            assert expected is not None
            expected = tolerant(analysis, units, scales, expected)
            shrunk = _completed(analysis, units, expected, optimizers, agree)
    except _ElsewhereError:
        raise
    except ShrinkError as problem:
        raise _not_exact(analysis, units, problem) from problem
    forget_caches(analysis.model)
    return shrunk


def _completed(
    analysis: Analysis,
    units: Mapping[str, Tensor],
    expected: Observed | None,
    optimizers: Iterable[Optimizer],
    agree: Agree | None,
) -> Shrunk:
    """Cut the network and its optimizers, if what it hands out then is as expected."""
    with applied(analysis, units) as transaction:
        transaction.prove()
        found = None if expected is None else largest_difference(expected, outputs(analysis, expected))
        error = found if expected is not None and expected.outputs else None
        if agree is not None and (blamed := agree(())):
            raise _ElsewhereError(f"another process cannot cut {', '.join(blamed)}; nothing was changed", blamed)
        resize_optimizers(optimizers, transaction.tensors, transaction.cuts, transaction.saved)
    return Shrunk(transaction.settings, transaction.cuts, error)


def _scales(analysis: Analysis, units: Mapping[str, Tensor]) -> Scales:
    """The numbers that will follow the widths, found by a cut that is undone."""
    if not analysis.scaled_later or not any(analysis.groups[name].approximate for name in units):
        return {}
    with applied(analysis, units) as transaction:
        transaction.prove()
        transaction.undo()
    return transaction.scales


def _traced_again(graph: ChannelGraph, units: Mapping[str, Tensor]) -> Analysis:
    """A new analysis that has the same groups.

    Raises:
        ShrinkError: If the network is wired otherwise by now.
    """
    analysis = recorded_anew(_evidence(graph).repeated())
    for name in units:
        old, new = graph.groups[name], analysis.groups.get(name)
        if new is None or not _same_slots(old, new):
            raise ShrinkError(f"group '{name}' is not what it was when the network was traced; trace it again", [name])
    return analysis


def _same_slots(first: ChannelGroup, second: ChannelGroup) -> bool:
    return len(first.slots) == len(second.slots) and all(
        (a.tensor, a.dim) == (b.tensor, b.dim) and torch.equal(a.index, b.index)
        for a, b in zip(first.slots, second.slots, strict=True)
    )


def _not_exact(analysis: Analysis, units: Mapping[str, Tensor], problem: Exception) -> ShrinkError:
    culprits = _culprits(analysis, units)
    return ShrinkError(
        f"cutting {', '.join(culprits)} is not exact: {problem}. Nothing was changed. Exclude "
        f"{'this group' if len(culprits) == 1 else 'these groups'}, or report the model",
        culprits,
    )


def keep_whole(graph: ChannelGraph, reasons: Mapping[str, str]) -> ChannelGraph:
    """The channel graph without some of its groups, which stay whole.

    Args:
        graph: A traced graph.
        reasons: Names of groups, with what is said of them among the refusals. Others are ignored.
    """
    analysis = _evidence(graph)
    whole = [name for name in graph.groups if name in reasons]
    roots = {name: analysis.units[name] for name in whole}
    for name in whole:
        analysis.freeze(roots[name], reasons[name])
    analysis.adopt_laws(analysis.laws)
    return analysis.graph() if whole else graph


@contextmanager
def resized(model: nn.Module, graph: ChannelGraph, keep: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the network has only the kept units; afterwards it is as it was. For measuring what a cut would bring.

    Args:
        model: The network that was traced.
        graph: Its channel graph.
        keep: As for :func:`shrink`.

    Raises:
        ConfigurationError: As for :func:`shrink`.
        ShrinkError: If the network cannot be run with these widths.
    """
    units = _checked(model, graph, keep)
    if not units:
        yield
        return
    with applied(_evidence(graph), units) as transaction:
        try:
            transaction.prove()
        except UnsolvedError as problem:
            raise ShrinkError(f"the network cannot be run with these widths: {problem}") from problem
        yield
        transaction.undo()


def _culprits(analysis: Analysis, units: Mapping[str, Tensor]) -> list[str]:
    """The groups that cannot be cut even alone; all of them if each can."""
    found = []
    for name in units if len(units) > 1 else ():
        alone = {name: units[name]}
        try:
            expected = masked_outputs(analysis, alone, _scales(analysis, alone))
            with applied(analysis, alone) as transaction:
                transaction.prove()
                largest_difference(expected, outputs(analysis, expected))
                transaction.undo()
        except (UnsolvedError, ShrinkError):
            found.append(name)
    return found or list(units)


def _evidence(graph: ChannelGraph) -> Analysis:
    if graph.evidence is None:
        raise ConfigurationError("this channel graph was not made by trace(); only a traced graph can be shrunk")
    return graph.evidence


def _checked(model: nn.Module, graph: ChannelGraph, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kept unit indices of each group that really loses some."""
    analysis = _evidence(graph)
    if analysis.model is not model:
        raise ConfigurationError("this channel graph was traced on another network")
    present, widths = named_leaves(model), graph.widths
    for name, extents in graph.tensors.items():
        shape = tuple(extent.size(widths) for extent in extents)
        if present.get(name) is not analysis.tensors[name] or tuple(present[name].shape) != shape:
            raise ConfigurationError(f"{name} was changed since the network was traced; trace it again")
    checked = {name: _kept_units(graph, name, torch.as_tensor(chosen).cpu()) for name, chosen in keep.items()}
    return {name: units for name, units in checked.items() if len(units) < graph.groups[name].width}


def _kept_units(graph: ChannelGraph, name: str, chosen: Tensor) -> Tensor:
    """Sorted indices of the units of one group that stay."""
    if name not in graph.groups:
        close = difflib.get_close_matches(name, graph.groups, 1)
        hint = f"; did you mean '{close[0]}'?" if close else f"; there are: {', '.join(graph.groups)}"
        raise ConfigurationError(f"no channel group is called '{name}'{hint}")
    width = graph.groups[name].width
    if chosen.is_floating_point() or chosen.dim() != 1:
        raise ConfigurationError(f"what to keep of group '{name}' must be a list of channel numbers or a bool mask")
    if chosen.dtype is torch.bool and len(chosen) != width:
        raise ConfigurationError(f"the mask of group '{name}' has length {len(chosen)}, but the group {width} channels")
    units = chosen.nonzero().flatten() if chosen.dtype is torch.bool else torch.unique(chosen.long())
    if len(units) == 0:
        raise ConfigurationError(f"group '{name}' would lose all of its {width} channels; keep at least one")
    if int(units[0]) < 0 or int(units[-1]) >= width:
        raise ConfigurationError(f"group '{name}' has channels 0 to {width - 1}, asked to keep {units.tolist()}")
    return units

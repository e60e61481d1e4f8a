"""The trial cut: groups that the network's own code cannot follow are found, coupled or kept whole."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.graph.analysis import Analysis
from lightning_prune.graph.channels import Extent
from lightning_prune.graph.labels import components
from lightning_prune.graph.tracer import Event
from lightning_prune.surgery.attributes import UnsolvedError
from lightning_prune.surgery.transaction import Transaction, applied

_SHARES = (0.8, 0.4)
_FEW = 8
"""Groups of so few units keep the smaller share: of 8, halves of 7 or 8 are alike, and the first 5 of 6 are there."""
_CHOICES = 16
"""Number of widths that are tried for a group, to find one that no other group has."""
_NEARBY = 12
"""Number of preceding operators among which the partner of a group is looked for."""
_PARTNERS = 4
"""Number of groups nearby that are tried as partners of one whose blocks get narrower."""
Keep = Mapping[str, Tensor]
GroupAt = tuple[str, Event]


def settle_groups(analysis: Analysis) -> Analysis:
    """Cut all groups on trial, again and again, until the network can follow; afterwards it is as it was.

    Returns:
        The analysis with the groups that are left; another one if the network does not repeat what it did at first.
    """
    checked = False
    while analysis.groups:
        keep = _trial_keep(analysis)
        problem = _problem(analysis, keep, learn=True)
        if problem is None:
            break
        if not checked:
            checked, recorded = True, analysis
            analysis = recorded_anew(recorded)
            if analysis is not recorded:
                continue
        _respond(analysis, problem, keep)
    return analysis


def recorded_anew(analysis: Analysis) -> Analysis:
    """The same analysis if the uncut network repeats what was recorded; else one of what it does now.

    The first run may have filled caches outside the network (``functools.lru_cache``), which cannot be put back.
    """
    try:
        with applied(analysis, {}) as transaction:
            transaction.prove()
            transaction.undo()
    except UnsolvedError:
        return analysis.repeated()
    return analysis


def _trial_keep(analysis: Analysis) -> dict[str, Tensor]:
    """Some units of each group, so that no two widths agree by chance that were equal before."""
    taken: set[tuple[int, int]] = set()
    keep = {}
    for number, (name, group) in enumerate(sorted(analysis.groups.items(), key=lambda item: item[1].width)):
        if group.width < 2:
            continue
        share = min(_SHARES) if group.width <= _FEW else _SHARES[number % len(_SHARES)]
        wanted = round(group.width * share)
        near = range(max(1, wanted - _CHOICES), min(group.width, wanted + _CHOICES + 1))
        counts = sorted(near, key=lambda count: (count == 1, abs(count - wanted)))[:_CHOICES]
        widths = [{(n, n * count // group.width) for n in _full_lengths(analysis, name)} for count in counts]
        best = min(range(len(counts)), key=lambda choice: len(widths[choice] & taken))
        taken |= widths[best]
        keep[name] = torch.linspace(0, group.width - 1, counts[best]).long()
    return keep


def _problem(analysis: Analysis, keep: Keep, learn: bool = False) -> UnsolvedError | None:
    """What the network cannot follow when it is cut, if anything; if nothing, what its integers follow is learnt."""
    if not keep:
        return None
    extents = analysis.extents() if learn else {}  # of the tensors as they are
    try:
        with applied(analysis, keep) as transaction:
            transaction.prove()
            if learn:
                analysis.laws = _laws(analysis, keep, extents, transaction)
            transaction.undo()
            if learn and transaction.scaled:
                _mark_approximate(analysis, transaction.scaled)
    except UnsolvedError as problem:
        return problem
    return None


def _mark_approximate(analysis: Analysis, scaled: Iterable[Tensor]) -> None:
    """Note that the network would scale by other numbers without some of these channels."""
    for ids in {id(ids): ids for ids in scaled}.values():
        analysis.mark_approximate(ids.flatten())
    analysis.solve()


def _laws(
    analysis: Analysis, keep: Keep, extents: Mapping[str, Sequence[Extent]], transaction: Transaction
) -> dict[Hashable, Extent]:
    """Which dimension each integer that a module remembers went along with, where only one kind comes into question."""
    full = {name: len(units) for name, units in analysis.units.items()}
    widths = {name: len(keep.get(name, units)) for name, units in analysis.units.items()}
    changed: dict[tuple[int, int], dict[Extent, set[str]]] = defaultdict(lambda: defaultdict(set))
    for tensor, shape in extents.items():
        for extent in shape:
            if extent.per_unit:
                changed[extent.size(full), extent.size(widths)][extent].add(tensor)
    laws: dict[Hashable, Extent] = {}
    for setting, value in transaction.settings.items():
        found = changed[transaction.original[setting], value]
        own = [extent for extent, names in found.items() if any(n.startswith(f"{setting.module}.") for n in names)]
        candidates = own or list(found)
        if len(candidates) == 1:
            laws[setting] = candidates[0]
    return laws


def _respond(analysis: Analysis, problem: UnsolvedError, keep: Keep) -> None:
    """Couple the group at fault with others, or keep it whole."""
    nearby = [] if problem.event is None else [name for name in analysis.groups_at(problem.event) if name in keep]
    names = nearby if nearby and _fails(analysis, keep, nearby) else list(keep)
    involved = _narrowed(analysis, keep, names)
    if not set(involved) <= set(nearby):  # then it was another group that failed there
        problem = _problem(analysis, {name: keep[name] for name in involved}) or problem
    event = problem.event
    # The one that costs least to keep whole.
    culprit = min(involved, key=lambda name: sum(slot.index.numel() for slot in analysis.groups[name].slots))
    places = [] if event is None else _places_alike(analysis, culprit, event)
    alike = list(dict.fromkeys(name for name, _ in places))
    if culprit not in alike:
        places, alike = [], [culprit]
    if (
        not _coupled(analysis, places)
        and not _coupled_positions(analysis, culprit)
        and not _coupled_together(analysis, alike)
    ):
        analysis.freeze(torch.cat([analysis.units[name] for name in alike]), problem.reason)


def _places_alike(analysis: Analysis, culprit: str, event: Event) -> list[GroupAt]:
    """The group at fault where it failed, and groups like it at operators that the same code ran alike."""
    model = analysis.groups[culprit]
    return [
        (name, other)
        for other in (event, *analysis.events_alike(event))
        for name in analysis.groups_at(other)
        if analysis.groups[name].pattern == model.pattern and analysis.groups[name].width == model.width
    ]


def _fails(analysis: Analysis, keep: Keep, names: Sequence[str]) -> bool:
    return _problem(analysis, {name: keep[name] for name in names}) is not None


def _narrowed(analysis: Analysis, keep: Keep, names: Sequence[str]) -> list[str]:
    """The fewest groups that cannot be cut together."""
    involved: list[str] = []
    while names and not (involved and _fails(analysis, keep, involved)):
        # The shortest beginning of the list that fails along with those involved ends in another one.
        low, high = 1, len(names)
        while low < high:
            middle = (low + high) // 2
            fails = _fails(analysis, keep, [*names[:middle], *involved])
            low, high = (low, middle) if fails else (middle + 1, high)
        involved.append(names[low - 1])
        names = names[: low - 1]
    return involved


def _coupled(analysis: Analysis, places: Sequence[GroupAt]) -> bool:
    """Unite each group with one nearby of as many channels, if the network can follow when both lose the same.

    Code that takes the width of one layer for that of another (``x.reshape(B, N, C)`` after an attention over heads)
    works as long as the two stay equal.

    Args:
        analysis: What is known of the network.
        places: Groups, each with an operator that could not follow.
    """
    lengths = set.intersection(*(_full_lengths(analysis, name) for name, _ in places)) if places else set()
    for length in sorted(lengths, reverse=True):
        pairs = dict.fromkeys((name, _partner(analysis, name, event, length)) for name, event in places)
        chosen = [(name, partner) for name, partner in pairs if partner is not None]
        if len(chosen) < len(pairs):
            continue
        keep = _equal_parts(analysis, {name for pair in chosen for name in pair}, length)
        if any(len(units) == 0 for units in keep.values()) or _problem(analysis, keep) is not None:
            continue
        if not _fails(analysis, keep, list(dict.fromkeys(name for name, _ in chosen))):
            continue  # it was not for want of a partner
        for name, partner in chosen:
            analysis.unite(_full_leaf(analysis, name, length), _full_leaf(analysis, partner, length))
        analysis.solve()
        return True
    return False


def _coupled_positions(analysis: Analysis, culprit: str) -> bool:
    """Where heads get narrower: unite a group with one whose width the code takes from the same attribute.

    Queries and values are often reshaped by one ``head_dim``, so the positions of the ones go with those of the others.
    """
    if not analysis.inner:
        return False
    order = {name: number for number, name in enumerate(analysis.groups)}
    near = sorted(analysis.groups, key=lambda name: abs(order[name] - order[culprit]))
    alike = [name for name in near[1:] if analysis.groups[name].width == analysis.groups[culprit].width]
    for partner in alike[:_PARTNERS]:
        for length in _full_lengths(analysis, culprit) & _full_lengths(analysis, partner):
            keep = _equal_parts(analysis, (culprit, partner), length)
            if all(len(units) for units in keep.values()) and _problem(analysis, keep) is None:
                analysis.unite(_full_leaf(analysis, culprit, length), _full_leaf(analysis, partner, length))
                analysis.solve()
                return True
    return False


def _coupled_together(analysis: Analysis, names: Sequence[str]) -> bool:
    """Unite groups that the same code runs on, one after another, if the network can follow when all lose the same.

    They may share a number that the code keeps but once, as the heads of an attention do that are run in a loop.
    """
    lengths = set.intersection(*(_full_lengths(analysis, name) for name in names)) if len(names) > 1 else set()
    for length in sorted(lengths, reverse=True):
        keep = _equal_parts(analysis, names, length)
        if all(len(units) for units in keep.values()) and _problem(analysis, keep) is None:
            for name, other in itertools.pairwise(names):
                analysis.unite(_full_leaf(analysis, name, length), _full_leaf(analysis, other, length))
            analysis.solve()
            return True
    return False


def _partner(analysis: Analysis, name: str, event: Event, length: int) -> str | None:
    """Another group of as many channels that the operator or one shortly before it works on."""
    for run in analysis.runs:
        position = next((number for number, other in enumerate(run.events) if other is event), None)
        if position is None:
            continue
        for near in reversed(run.events[max(position - _NEARBY, 0) : position + 1]):
            for other in analysis.groups_at(near):
                if other != name and length in _full_lengths(analysis, other):
                    return other
    return None


def _full_lengths(analysis: Analysis, name: str) -> set[int]:
    """Lengths of the tensor dimensions that lie wholly in a group."""
    found = set()
    for slot in analysis.groups[name].slots:
        size = analysis.tensors[slot.tensor].shape[slot.dim]
        if slot.index.numel() == size:
            found.add(size)
    return found


def _full_leaf(analysis: Analysis, name: str, length: int) -> Tensor:
    """Labels of a tensor dimension of the given length that lies wholly in a group."""
    for slot in analysis.groups[name].slots:
        if slot.index.numel() == analysis.tensors[slot.tensor].shape[slot.dim] == length:
            return next(leaf.ids for leaf in analysis.leaves if (leaf.tensor, leaf.dim) == (slot.tensor, slot.dim))
    raise KeyError(length)


def _first_half(analysis: Analysis, names: Sequence[str], length: int) -> Tensor:
    """The first half of the channels that groups have in common, without a unit that lies partly in it."""
    if not analysis.inner:  # then units are made of neighbours
        block = math.lcm(*(length // analysis.groups[name].width for name in names))
        return torch.arange(max(length // 2 // block, 1) * block)
    edges = []
    for name in names:
        _, unit = torch.unique(analysis.root(_full_leaf(analysis, name, length)), return_inverse=True)
        first = torch.full((length,), length).scatter_reduce_(0, unit, torch.arange(length), "amin")
        edges.append((torch.arange(length), first[unit]))
    together = components(length, edges)
    blocks = torch.unique(together)
    return torch.isin(together, blocks[: max(len(blocks) // 2, 1)]).nonzero().flatten()


def _equal_parts(analysis: Analysis, names: Iterable[str], length: int) -> dict[str, Tensor]:
    """Units of each group that lie in the first half of their common channels, a whole number of each."""
    names = list(names)
    half = _first_half(analysis, names, length)
    parts = {}
    for name in names:
        roots = analysis.root(_full_leaf(analysis, name, length)[half])
        inside = (roots == analysis.units[name][:, None]).sum(1)
        parts[name] = (inside == length // analysis.groups[name].width).nonzero().flatten()
    return parts

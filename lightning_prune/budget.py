"""Which units have to go so that the network costs no more than it may."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from lightning_prune.choices import check_at_least, is_number, unknown_name
from lightning_prune.errors import BudgetError, ConfigurationError, PruneError

Scope = Literal["global", "group", "isomorphic"]
Widths = Mapping[str, int]
Cost = Callable[[Widths], float]


@dataclass(frozen=True)
class Limits:
    """What must be left of every group.

    Args:
        min_channels: Fewest units of a group: a number of at least 1, or a share of its original width in (0, 1).
        round_to: Widths that groups are cut to are multiples of this; fewer units are removed rather than more, and a
            group that is not above such a multiple stays as it is.

    Raises:
        ConfigurationError: If a number is out of range.

    Example:
        >>> Limits(min_channels=0.25, round_to=8).width(wanted=3, present=60, original=64)
        16
    """

    min_channels: int | float = 1
    round_to: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        fewest = self.min_channels if is_number(self.min_channels) else math.nan
        if not 0 < fewest < 1 and not (fewest >= 1 and fewest % 1 == 0):
            raise ConfigurationError(
                "min_channels must be a number of units of at least 1 or a share of the original width in (0, 1), but "
                f"is {self.min_channels!r}."
            )
        check_at_least(1, whole=True, round_to=self.round_to)

    def width(self, wanted: int, present: int, original: int) -> int:
        """The smallest width allowed that is not below ``wanted``, or ``present`` where nothing may be cut.

        Args:
            wanted: Number of units that the ordering would leave.
            present: Present number of units.
            original: Number of units before any pruning.
        """
        share = self.min_channels < 1
        # The allowance keeps products such as 0.07 * 100 = 7.000000000000001 from being rounded up to 8.
        floor = math.ceil(self.min_channels * original - 1e-9) if share else int(self.min_channels)
        multiple = math.ceil(max(wanted, floor, 1) / self.round_to) * self.round_to
        return min(multiple, present)


def check_fraction(remove: float, name: str = "remove") -> float:
    """Refuse a fraction to remove that is no number in [0, 1).

    Args:
        remove: The fraction.
        name: What to call it in the error.

    Returns:
        The fraction, as a plain number.

    Raises:
        ConfigurationError: If it is no number, or out of range.

    Example:
        >>> check_fraction(0.5)
        0.5
    """
    number = float(remove) if is_number(remove) else math.nan
    if not 0 <= number < 1:
        hint = f" Did you mean {number / 100:g}?" if 1 < number < 100 else ""
        raise ConfigurationError(f"{name} must be a fraction in [0, 1), but is {remove!r}.{hint}")
    return number


def reachable(
    groups: Collection[str],
    *,
    widths: Widths,
    original: Widths,
    cost: Cost,
    limits: Limits,
    ratios: Mapping[str, float] | None = None,
) -> float:
    """The least cost that can be reached.

    Args:
        groups: Names of the groups that may be cut.
        widths: Present number of kept units of every group.
        original: Number of units of every group before any pruning.
        cost: Cost of the network with given widths of every group.
        limits: What must be left of every group.
        ratios: Groups that lose a fixed fraction of their original width instead.

    Returns:
        The cost, in the measure of ``cost``.

    Example:
        >>> size = {"a": 10, "b": 10}
        >>> reachable(["a"], widths=size, original=size, cost=lambda w: w["a"] + w["b"], limits=Limits(min_channels=4))
        14
    """
    return cost(_narrowest(groups, widths, original, limits, ratios or {}))


def select(
    scores: Mapping[str, Tensor],
    *,
    widths: Widths,
    original: Widths,
    cost: Cost,
    allowed: float,
    scope: Scope = "global",
    limits: Limits | None = None,
    patterns: Mapping[str, Hashable] | None = None,
    ratios: Mapping[str, float] | None = None,
    keep: Mapping[str, Tensor] | None = None,
    dense: float | None = None,
    of: str = "cost",
) -> dict[str, Tensor]:
    """Choose the units to keep so that the network costs as nearly as possible what it may.

    All scopes come down to one ordering of the units: within each set of groups that are compared with each other, the
    units go by ascending score, and the sets lose equal fractions of their original widths side by side. The sets are
    all groups together (``"global"``), each group alone (``"group"``), or the groups of one shape pattern
    (``"isomorphic"``, Fang et al., 2024). The lowest units of the ordering go until the allowed cost is met; if one
    unit less comes nearer to it, that one stays. Of equal scores those go first that stand lower in their own group, of
    those the ones of the first group and unit.

    Args:
        scores: Scores of shape ``[units]`` of every group that may be cut, higher = keep; comparable across groups
            where the scope compares them.
        widths: Present number of units of every group of the network, counting those that are masked.
        original: Number of units of every group before any pruning.
        cost: Cost of the network with given widths of every group; must not rise when a width falls.
        allowed: Cost that the network may have, in the measure of ``cost``.
        scope: Which groups compete with each other.
        limits: What must be left of every group; default: one unit.
        patterns: Shape pattern by group, for the isomorphic scope. A group without one is compared with none.
        ratios: Groups that lose a fixed fraction of their original width, whatever the budget.
        keep: Present bool masks of shape ``[units]``; what is off in them stays off, whatever its score.
        dense: Cost before any pruning, for messages; default: the cost at the original widths.
        of: What the cost measures, for messages.

    Returns:
        Bool masks of shape ``[units]`` of the groups in ``scores``, True = keep, on the CPU.

    Raises:
        PruneError: If a score is not finite, or scores do not fit the width.
        BudgetError: If the allowed cost is out of reach.
        ConfigurationError: If the scope is unknown.

    Example:
        >>> size = {"a": 2, "b": 2}
        >>> scores = {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([3.0, 2.0])}
        >>> kept = select(scores, widths=size, original=size, cost=lambda w: sum(w.values()), allowed=3)
        >>> kept["a"].tolist(), kept["b"].tolist()
        ([True, False], [True, True])
    """
    limits, ratios, keep = limits or Limits(), ratios or {}, keep or {}
    if scope not in ("global", "group", "isomorphic"):
        raise unknown_name("scope", scope, ["global", "group", "isomorphic"])
    alive = {name: keep.get(name, torch.ones(width, dtype=torch.bool)).cpu() for name, width in widths.items()}
    values = {name: _checked(name, score, alive[name]) for name, score in scores.items()}
    present = {name: int(mask.sum()) for name, mask in alive.items()}
    free = [name for name in scores if name not in ratios]
    owners = _ordering({name: values[name][alive[name]] for name in free}, original, scope, patterns or {})
    fixed = _narrowest([name for name in scores if name in ratios], present, original, limits, ratios)

    def widths_without(lowest: int) -> dict[str, int]:
        gone = torch.bincount(owners[:lowest], minlength=len(free)).tolist()
        cut = {
            name: limits.width(present[name] - count, present[name], original[name])
            for name, count in zip(free, gone, strict=True)
        }
        return {**fixed, **cut}

    @cache
    def cost_without(lowest: int) -> float:
        return cost(widths_without(lowest))

    tolerance = 1e-9 * max(1.0, abs(allowed))
    counts = range(len(owners) + 1)
    lowest = bisect_left(counts, True, key=lambda count: cost_without(count) <= allowed + tolerance)
    if lowest == len(counts):
        whole = cost(original) if dense is None else dense
        raise _out_of_reach(list(scores), present, original, cost, limits, ratios, allowed, whole, of)
    if lowest > 0 and cost_without(lowest - 1) - allowed < allowed - cost_without(lowest) - tolerance:
        lowest -= 1
    final = widths_without(lowest)
    return {name: _keep_best(values[name], alive[name], final[name]) for name in scores}


def _narrowest(
    groups: Iterable[str], widths: Widths, original: Widths, limits: Limits, ratios: Mapping[str, float]
) -> dict[str, int]:
    """All widths, with the given groups cut to their fixed ratio or, without one, as far as the limits allow."""
    result = dict(widths)
    for name in groups:
        wanted = original[name] - math.floor(ratios[name] * original[name] + 0.5) if name in ratios else 0
        result[name] = limits.width(wanted, widths[name], original[name])
    return result


def _checked(name: str, scores: Tensor, alive: Tensor) -> Tensor:
    """Scores on the CPU in double precision, after a look at whether they can be used."""
    if scores.shape != alive.shape:
        raise PruneError(
            f"channel group {name!r} has {len(alive)} units, but its scores have shape {list(scores.shape)}. "
            "A criterion must return one score per unit."
        )
    values = scores.detach().cpu().double()
    broken = int((~torch.isfinite(values[alive])).sum())
    if broken:
        raise PruneError(
            f"{broken} of the {int(alive.sum())} scores of channel group {name!r} are NaN or infinite. Its weights or "
            "gradients have probably diverged: lower the learning rate, or use a criterion that needs no gradients, "
            'such as "l2".'
        )
    return values


def _ordering(values: Mapping[str, Tensor], original: Widths, scope: Scope, patterns: Mapping[str, Hashable]) -> Tensor:
    """Position in ``values`` of the group that loses a unit first, second, and so on: int64 of shape [units]."""
    rivals: dict[Hashable, list[str]] = {}
    for name in values:
        rivals.setdefault(_rivalry(name, scope, patterns), []).append(name)
    shares: dict[str, Tensor] = {}
    for names in rivals.values():
        width = sum(original[name] for name in names)
        sizes = [len(values[name]) for name in names]
        # Sorted by their standing in their own group first, so that no group loses all of its units to a tie.
        standing = torch.cat([_ranks(values[name]) / len(values[name]) for name in names]).argsort(stable=True)
        order = standing[torch.cat([values[name] for name in names])[standing].argsort(stable=True)]
        ranks = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
        # The middle of a unit's share of the original width makes equal fractions mean the same in wide and in narrow
        # groups, and in groups that have been cut before.
        share = (width - sum(sizes) + ranks.double() + 0.5) / width
        shares.update(zip(names, torch.split(share, sizes), strict=True))
    owners = [torch.full((len(shares[name]),), i) for i, name in enumerate(values)]
    if not owners:
        return torch.empty(0, dtype=torch.int64)
    return torch.cat(owners)[torch.cat([shares[name] for name in values]).argsort(stable=True)]


def _ranks(values: Tensor) -> Tensor:
    """Place of each value in ascending order; of equal ones the first comes first."""
    return values.argsort(stable=True).argsort().double()


def _rivalry(name: str, scope: Scope, patterns: Mapping[str, Hashable]) -> Hashable:
    if scope == "global":
        return ()
    pattern = patterns.get(name) if scope == "isomorphic" else None
    return ("group", name) if pattern is None else ("pattern", pattern)


def _keep_best(values: Tensor, alive: Tensor, width: int) -> Tensor:
    """Mask of the ``width`` highest-scored units among those alive; of equal ones the later stay."""
    units = alive.nonzero().flatten()
    lowest_first = units[values[units].argsort(stable=True)]
    mask = torch.zeros_like(alive)
    mask[lowest_first[len(units) - width :]] = True
    return mask


def _out_of_reach(
    groups: list[str],
    present: Widths,
    original: Widths,
    cost: Cost,
    limits: Limits,
    ratios: Mapping[str, float],
    allowed: float,
    dense: float,
    of: str,
) -> BudgetError:
    """The error that says how much can be reached and what holds back the rest."""

    def removed(with_limits: Limits) -> float:
        return 1 - cost(_narrowest(groups, present, original, with_limits, ratios)) / dense

    best = removed(limits)
    relaxed = {
        f"min_channels={limits.min_channels}": removed(replace(limits, min_channels=1)),
        f"round_to={limits.round_to}": removed(replace(limits, round_to=1)),
    }
    held = [f"{limit} ({_percent(share)} without it)" for limit, share in relaxed.items() if share > best + 1e-9]
    held.append("the parts that stay whole because they are refused, excluded or given a ratio")
    return BudgetError(
        f"cannot remove {_percent(1 - allowed / dense)} of the {of}: at most {_percent(best)} can be reached. "
        f"Held back by {'; '.join(held)}. Lower remove, or loosen these limits."
    )


def _percent(share: float) -> str:
    # Rounded down, so that a fraction taken from the message can be reached.
    return f"{math.floor(share * 1000 + 1e-6) / 10:.1f} %"

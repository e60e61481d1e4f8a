"""Which weights stay, when a given fraction of all of them goes."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_prune.budget import check_fraction
from lightning_prune.choices import unknown_name
from lightning_prune.errors import BudgetError, ConfigurationError, PruneError

Scope = Literal["global", "layer", "row", "erk"]


@dataclass(frozen=True)
class _Candidates:
    """The weights of one tensor that may stay, all tensors flat.

    Args:
        scores: Their scores, among those of the others.
        fixed: Weights that stay because the pattern leaves nothing better in their group.
        open: Weights that compete for the rest of the budget.
        fewest: Number of open weights that must stay for the floor's sake.
        row: Number of weights that compete with one another, side by side; 0 if all do.
    """

    scores: Tensor
    fixed: Tensor
    open: Tensor
    fewest: int
    row: int = 0

    @property
    def bounds(self) -> tuple[int, int]:
        """Fewest and most weights that can stay."""
        fixed = int(self.fixed.sum())
        return fixed + self.fewest, fixed + int(self.open.sum())

    def mask(self, count: int) -> Tensor:
        """Mask with the best ``count`` weights."""
        if self.row:
            parts = (part.split(self.row) for part in (self.scores, self.fixed, self.open))
            rows = [_Candidates(scores, fixed, free, 0) for scores, fixed, free in zip(*parts, strict=True)]
            counts = apportion(count, [self.row] * len(rows), [row.bounds for row in rows])
            return torch.cat([row.mask(count) for row, count in zip(rows, counts, strict=True)])
        return self.fixed | _highest(self.scores, self.open, count - int(self.fixed.sum()))


def select_weights(
    scores: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    remove: float,
    scope: Scope = "global",
    floor: float = 0.001,
    pattern: tuple[int, int] | None = None,
    regrow: bool = False,
) -> dict[str, Tensor]:
    """Choose the weights to keep, so that exactly ``round((1 - remove) * total)`` of them stay.

    Fewer stay only where what is off already leaves no choice. In each tensor it is those of the highest scores; of
    equal ones those of the earlier tensors, and in a tensor those at the earlier positions, go first. Whole rows of a
    tensor may go: what that does to a channel depends on the rest of the network.

    With a pattern ``(n, m)``, such as ``(2, 4)``, every ``m`` consecutive weights along the input dimension form a
    group: dimension 1, so in the weight of a convolution the input channels at each place of the kernel. At
    ``remove = 1 - n / m`` every group keeps ``n`` weights, and below that, on the way there, all groups keep the same
    number up to one: ``(1 - remove) * m`` rounded down or up. Who gets the one more is for the scope to say.

    Args:
        scores: Scores of all weights, by full name of the tensor; higher = keep. Finite, comparable across tensors
            where the scope compares them.
        keep: Present bool masks of the tensors' shapes, True = kept; a tensor without one is kept whole.
        remove: Fraction of all weights that is off in the end, in [0, 1); at most ``1 - n / m`` with a pattern.
        scope: ``"global"``: all weights compete. ``"layer"``: every tensor loses the same fraction, exact by largest
            remainder. ``"row"``: every row (index along the first dimension, so every output) of every tensor does.
            ``"erk"``: densities in proportion to the sum over the product of a tensor's sizes
            (Erdos-Renyi kernel, Evci et al., 2020); a tensor that would keep more than it has is kept whole, and the
            others share what that leaves.
        floor: Fewest weights of a tensor: a share in (0, 1), rounded up, or a number; 0 for none. What is off already
            may leave fewer. The default lets no tensor collapse, as any share means one weight at least, and is too
            low to bend the result at usual densities.
        pattern: ``(n, m)`` as above.
        regrow: Whether weights that are off may come back; they stay off otherwise, whatever their score.

    Returns:
        Bool masks of the tensors' shapes, True = kept, on the CPU.

    Raises:
        PruneError: If scores are not finite, or scores and masks do not fit each other.
        BudgetError: If the floors do not leave that little, or a tensor would be left without any weight.
        ConfigurationError: If an argument is out of range, or a tensor's shape does not fit the pattern.

    Example:
        >>> scores = {"a": torch.tensor([[4.0, 1.0]]), "b": torch.tensor([[3.0, 2.0]])}
        >>> kept = select_weights(scores, {}, remove=0.25)
        >>> kept["a"].tolist(), kept["b"].tolist()
        ([[True, False]], [[True, True]])
    """
    check_fraction(remove)
    if scope not in get_args(Scope):
        raise unknown_name("scope", scope, list(get_args(Scope)))
    if unscored := [name for name in keep if name not in scores]:
        raise PruneError(
            f"there are masks but no scores for {', '.join(unscored)}. A criterion must score every weight."
        )
    check_pattern(pattern, remove)
    candidates = {
        name: _candidates(name, score, keep.get(name), remove, floor, pattern, regrow, scope)
        for name, score in scores.items()
    }
    bounds = {name: candidate.bounds for name, candidate in candidates.items()}
    total = sum(score.numel() for score in scores.values())
    target = min(round((1 - remove) * total), sum(most for _, most in bounds.values()))
    if target < sum(fewest for fewest, _ in bounds.values()):
        raise _held_by_floors(bounds, remove, floor, total)

    def counts(count: int) -> list[int]:
        if scope == "global":
            return _counts_by_rank(list(candidates.values()), count)
        return apportion(count, [_share(score.shape, scope) for score in scores.values()], list(bounds.values()))

    chosen = dict(zip(scores, counts(target), strict=True))
    if empty := [name for name, count in chosen.items() if count == 0 and bounds[name][1] > 0]:
        raise _emptied(empty, remove, scope, total, bounds, counts)
    return {name: candidates[name].mask(count).view(scores[name].shape) for name, count in chosen.items()}


def check_pattern(pattern: tuple[int, int] | None, remove: float, final: bool = False) -> None:
    """Refuse a pattern that is none, or that does not go together with the fraction to remove.

    Args:
        pattern: ``(n, m)``, or None, which goes together with everything.
        remove: The fraction.
        final: Whether it is the fraction in the end, which the pattern determines, and not one on the way there.

    Raises:
        ConfigurationError: If they do not fit.

    Example:
        >>> check_pattern((2, 4), remove=0.5, final=True)
    """
    if pattern is None:
        return
    whole = isinstance(pattern, (tuple, list)) and [type(number) for number in pattern] == [int, int]
    if not whole or not 0 < pattern[0] < pattern[1]:
        raise ConfigurationError(f"pattern must be two whole numbers (n, m) with 0 < n < m, but is {pattern!r}.")
    kept, size = pattern
    end = 1 - kept / size
    if remove > end + 1e-9 or (final and remove < end - 1e-9):
        raise ConfigurationError(
            f"a {kept}:{size} pattern removes {end:g} of the weights, but remove is {remove}. Set remove={end}."
        )


def apportion(target: int, shares: Sequence[int], bounds: Sequence[tuple[int, int]]) -> list[int]:
    """Whole numbers in proportion to shares, within bounds, that add up to a target.

    What a bound gives or takes is spread over the others in proportion. The fractions that are left are settled by
    largest remainder; of equal ones the earlier gets the more.

    Args:
        target: The sum; within the sums of the bounds.
        shares: Positive share of each.
        bounds: Least and largest value of each.

    Example:
        >>> apportion(10, [1, 1, 2], [(0, 9), (0, 1), (0, 9)])
        [3, 1, 6]
    """

    def at(level: Fraction) -> list[Fraction]:
        within = zip(shares, bounds, strict=True)
        return [min(max(level * share, Fraction(low)), Fraction(high)) for share, (low, high) in within]

    # The sum grows with the level, along straight lines between the levels at which a bound begins or ceases to hold.
    bends = sorted({Fraction(bound, share) for share, pair in zip(shares, bounds, strict=True) for bound in pair})
    after = bisect_left(bends, Fraction(target), key=lambda level: sum(at(level), Fraction()))
    exact = at(bends[after]) if bends else []
    if after > 0:
        below = at(bends[after - 1])
        start, end = sum(below, Fraction()), sum(exact, Fraction())
        part = (target - start) / (end - start)
        exact = [low + part * (high - low) for low, high in zip(below, exact, strict=True)]
    result = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: result[i] - exact[i])
    for i in by_remainder[: target - sum(result)]:
        result[i] += 1
    return result


def _share(shape: torch.Size, scope: Scope) -> int:
    """Weights of a tensor in proportion to which it keeps weights."""
    return max(sum(shape) if scope == "erk" else shape.numel(), 1)


def _candidates(
    name: str,
    scores: Tensor,
    keep: Tensor | None,
    remove: float,
    floor: float,
    pattern: tuple[int, int] | None,
    regrow: bool,
    scope: Scope,
) -> _Candidates:
    keep = torch.ones(scores.shape, dtype=torch.bool) if keep is None else keep.detach().cpu()
    if keep.dtype != torch.bool or keep.shape != scores.shape:
        raise PruneError(
            f"the mask of {name!r} must be bool of shape {list(scores.shape)} like its scores, but is {keep.dtype} of "
            f"shape {list(keep.shape)}. A criterion must return scores of the weight's shape."
        )
    alive = torch.ones_like(keep) if regrow else keep
    values = scores.detach().cpu()
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    broken = int((~torch.isfinite(values[alive])).sum())
    if broken:
        raise PruneError(
            f"{broken} of the {int(alive.sum())} scores of {name!r} are NaN or infinite. Its weights or gradients "
            "have probably diverged: lower the learning rate, or use a criterion that needs no gradients, such as "
            '"magnitude".'
        )
    fixed = torch.zeros_like(alive)
    if pattern is not None:
        fixed, alive = _in_groups(name, values, alive, remove, pattern)
    least = _least(name, scores.numel(), floor, pattern)
    fixed, alive = fixed.flatten(), alive.flatten()
    fewest = max(min(least, int(alive.sum())) - int(fixed.sum()), 0)
    row = math.prod(values.shape[1:]) if scope == "row" and values.dim() > 1 else 0
    return _Candidates(values.flatten(), fixed, alive & ~fixed, fewest, row)


def _least(name: str, size: int, floor: float, pattern: tuple[int, int] | None) -> int:
    """Fewest weights that a tensor of the given size keeps."""
    share = 0 < floor < 1
    if not share and not (floor >= 0 and floor == int(floor)):
        raise ConfigurationError(f"floor must be 0, a share in (0, 1) or a number of weights, but is {floor}.")
    # The allowance keeps products such as 0.07 * 100 = 7.000000000000001 from being rounded up to 8.
    least = math.ceil(floor * size - 1e-9) if share else min(int(floor), size)
    if pattern is not None and least * pattern[1] > size * pattern[0]:
        raise BudgetError(
            f"a floor of {floor} keeps {least} of the {size} weights of {name!r}, but a {pattern[0]}:{pattern[1]} "
            "pattern leaves fewer. Lower the floor."
        )
    return least


def _in_groups(
    name: str, values: Tensor, alive: Tensor, remove: float, pattern: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Masks of the weights that the pattern keeps at least and at most."""
    size = pattern[1]
    shape = list(values.shape)
    length = shape[1] if len(shape) > 1 else 0
    if length == 0 or length % size:
        inputs = f"it has {length} inputs, no multiple of {size}" if length else "it has no inputs to divide"
        raise ConfigurationError(
            f"{name!r} of shape {shape} cannot take a {pattern[0]}:{size} pattern: {inputs}. Exclude it, or give the "
            "layer an input width that divides."
        )
    inputs_last = values.masked_fill(~alive, -math.inf).movedim(1, -1)
    by_group = inputs_last.reshape(-1, size).argsort(dim=1, stable=True).argsort(dim=1)
    rank = by_group.view(inputs_last.shape).movedim(-1, 1)
    # Rounded, so that a 1:9 pattern does not end at 1.0000000000000004 per group, which would allow for 2.
    per_group = round((1 - remove) * size, 9)
    return (rank >= size - math.floor(per_group)) & alive, (rank >= size - math.ceil(per_group)) & alive


def _counts_by_rank(candidates: Sequence[_Candidates], target: int) -> list[int]:
    """Number of weights that each tensor keeps if, above the floors, all weights compete."""
    if not candidates:
        return []
    forced = [_highest(c.scores, c.open, c.fewest) for c in candidates]
    rivals = torch.cat([c.open & ~held for c, held in zip(candidates, forced, strict=True)])
    lowest = [c.bounds[0] for c in candidates]
    winners = _highest(torch.cat([c.scores for c in candidates]), rivals, target - sum(lowest))
    won = winners.split([len(c.scores) for c in candidates])
    return [low + int(part.sum()) for low, part in zip(lowest, won, strict=True)]


def _highest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` highest scores among the given positions; of equal ones the later stay."""
    positions = among.nonzero().flatten()
    mask = torch.zeros_like(among)
    if count == 0:
        return mask
    values = scores[positions]
    threshold = values.kthvalue(len(values) - count + 1).values
    above = positions[values > threshold]
    equal = positions[values == threshold]
    mask[above] = True
    mask[equal[len(equal) - (count - len(above)) :]] = True
    return mask


def _held_by_floors(bounds: Mapping[str, tuple[int, int]], remove: float, floor: float, total: int) -> BudgetError:
    held = sum(fewest for fewest, _ in bounds.values())
    most = max(bounds, key=lambda name: bounds[name][0])
    return BudgetError(
        f"cannot remove {100 * remove:.2f} % of the {total} weights: a floor of {floor} keeps {held} of them, "
        f"{bounds[most][0]} in {most!r}, so at most {_percent(1 - held / total)} can be reached. "
        "Lower remove or the floor."
    )


def _emptied(
    empty: Sequence[str],
    remove: float,
    scope: Scope,
    total: int,
    bounds: Mapping[str, tuple[int, int]],
    counts: Callable[[int], list[int]],
) -> BudgetError:
    """The error for tensors left without any weight; it says what each way out can reach."""
    capacity = sum(most for _, most in bounds.values())

    def whole(count: int) -> bool:
        return all(kept > 0 for kept, (_, most) in zip(counts(count), bounds.values(), strict=True) if most > 0)

    enough = bisect_left(range(capacity + 1), True, key=whole)
    with_floor = sum(1 for _, most in bounds.values() if most > 0)
    return BudgetError(
        f"removing {100 * remove:.2f} % of the weights would leave {', '.join(map(repr, empty))} without any. With "
        f"scope={scope!r} at most {_percent(1 - enough / total)} can be reached, with floor=1 "
        f"{_percent(1 - with_floor / total)}. Lower remove, or set a floor."
    )


def _percent(share: float) -> str:
    # Rounded down, so that a fraction taken from the message can be reached.
    return f"{math.floor(share * 10000 + 1e-6) / 100:.2f} %"

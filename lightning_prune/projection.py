"""Onto the budget: masks of a given sum, exact and relaxed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Curve = Callable[[float], tuple[float, float]]
"""A falling function: its value and slope at a point."""


def top(scores: Tensor, count: int) -> Tensor:
    """Ones at the ``count`` highest scores, zeros elsewhere; of equal scores the later count as higher.

    Args:
        scores: Flat scores.
        count: Number of ones.

    Example:
        >>> top(torch.tensor([3.0, 1.0, 2.0]), 2).tolist()
        [1.0, 0.0, 1.0]
    """
    if count <= 0:
        return torch.zeros_like(scores)
    threshold = scores.kthvalue(len(scores) - count + 1).values
    mask = scores >= threshold
    surplus = int(mask.sum()) - count
    if surplus:
        mask[(scores == threshold).nonzero().flatten()[:surplus]] = False
    return mask.to(scores.dtype)


def euclidean(values: Tensor, budget: float) -> Tensor:
    """The nearest point of ``{0 <= m <= 1, sum m <= budget}``.

    Args:
        values: Flat values.
        budget: The sum, in (0, number of values].

    Example:
        >>> euclidean(torch.tensor([1.5, 0.5, 0.5]), 1.5).tolist()
        [1.0, 0.25, 0.25]
    """
    clipped, counted = values.clamp(0, 1), _countable(values)
    if float(counted.clamp(0, 1).sum(dtype=torch.float64)) <= budget:
        return clipped

    def sum_at(shift: float) -> tuple[float, float]:
        moved = counted - shift
        inside = (moved > 0) & (moved < 1)
        return float(moved.clamp(0, 1).sum(dtype=torch.float64)), -float(inside.sum())

    return (values - _crossing(sum_at, budget, 0.0, float(values.max()))).clamp(0, 1)


def entropic(scores: Tensor, budget: float, temperature: float) -> Tensor:
    """The point of ``{0 <= m <= 1, sum m = budget}`` with the greatest ``<scores, m> + temperature * entropy(m)``.

    It is ``sigmoid((scores - shift) / temperature)`` with the one shift that meets the budget, and goes to the
    :func:`top` scores as the temperature goes to zero.

    Args:
        scores: Flat scores.
        budget: The sum, strictly between 0 and the number of scores.
        temperature: Above 0.

    Example:
        >>> entropic(torch.tensor([1.0, 0.0, -1.0]), 1.5, 0.1)[1].item()
        0.5
    """
    counted = _countable(scores)

    def sum_at(shift: float) -> tuple[float, float]:
        mask = torch.sigmoid((counted - shift) / temperature)
        total = float(mask.sum(dtype=torch.float64))
        return total, -(total - float(mask.square().sum(dtype=torch.float64))) / temperature

    share = torch.logit(torch.tensor(budget / len(scores), dtype=torch.float64)).item()
    low, high = (float(bound) - temperature * share for bound in torch.aminmax(scores))
    return torch.sigmoid((scores - _crossing(sum_at, budget, low, high)) / temperature)


def _countable(values: Tensor) -> Tensor:
    """The values on a device that can add them up in double precision."""
    return values.cpu() if values.device.type == "mps" else values


def _crossing(curve: Curve, level: float, low: float, high: float) -> float:
    """Where a falling function takes a value, between two points on either side: Newton's method in a bracket."""
    at = (low + high) / 2
    for _ in range(60):
        value, slope = curve(at)
        if abs(value - level) <= 1e-7 * max(level, 1.0) or high - low <= 1e-12 * max(abs(low), abs(high)):
            break
        low, high = (at, high) if value > level else (low, at)
        at = at - (value - level) / slope if slope else low
        if not low < at < high:
            at = (low + high) / 2
    return at

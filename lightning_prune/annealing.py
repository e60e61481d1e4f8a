"""Soft gates under a budget: which units are alive, a threshold that meets the budget, and weights behind gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_REACH = 40.0
"""Temperatures beyond the last unit at which all gates are shut, or open, to the last bit that matters."""
_HALVINGS = 60
_LEAST_SPREAD = 1e-4
"""Variance of a component relative to that of all values, below which it is not let fall: it would end at zero."""
_LEAST_SCALE, _COLDEST = 1e-9, 1e-6
"""Where all units are zero, or equal, there is no scale or temperature to go by."""


def gaussian_scales(weights: Tensor, shape: float = 1.0, scale: float = 0.0) -> Tensor:
    """Most probable variances of the weights of units under a Gaussian scale mixture.

    The weights of a unit are a Gaussian vector times a scale of their own, whose square has an inverse gamma prior.

    Args:
        weights: All weights of each unit, shape ``[units, weights]``.
        shape: Of the prior.
        scale: Of the prior: what the variances do not fall below, times half of the number of weights.

    Example:
        >>> gaussian_scales(torch.tensor([[2.0, 2.0, -2.0, 0.0, 0.0, 0.0]]), shape=1.0, scale=4.0)
        tensor([2.])
    """
    return (weights.square().sum(1) + 2 * scale) / (weights.shape[1] + 2 * shape + 2)


class Mixture(NamedTuple):
    """Two Gaussians, the one of the lower mean first; each a tensor of shape ``[2]``, in double precision."""

    shares: Tensor
    means: Tensor
    variances: Tensor

    def joint(self, values: Tensor) -> Tensor:
        """Log of share times density of each value, shape ``[values, 2]``; less a constant."""
        distance = (values.double()[:, None] - self.means) ** 2 / self.variances
        return self.shares.log() - 0.5 * (self.variances.log() + distance)


def fit_mixture(values: Tensor, iterations: int = 30) -> Mixture:
    """Two Gaussians fitted by expectation maximisation, starting at the 20 % and 80 % quantiles.

    Args:
        values: What to fit, shape ``[values]``.
        iterations: Number of iterations.

    Example:
        >>> mixture = fit_mixture(torch.tensor([-1.0, 0.0, 1.0, 99.0, 100.0, 101.0]))
        >>> mixture.shares.tolist(), mixture.means.tolist()
        ([0.5, 0.5], [0.0, 100.0])
    """
    values = values.cpu().double()
    whole = values.var(unbiased=False).clamp_min(torch.finfo(values.dtype).tiny)
    half = torch.full((2,), 0.5, dtype=values.dtype)
    quantiles = torch.quantile(values, torch.tensor([0.2, 0.8], dtype=values.dtype))
    mixture = Mixture(half, quantiles, whole.expand(2))
    for _ in range(iterations):
        parts = mixture.joint(values).softmax(1)
        sizes = parts.sum(0).clamp_min(1e-9)
        means = (parts * values[:, None]).sum(0) / sizes
        variances = (parts * (values[:, None] - means) ** 2).sum(0) / sizes
        mixture = Mixture(sizes / len(values), means, variances.clamp_min(_LEAST_SPREAD * whole))
    order = mixture.means.argsort(stable=True)
    return Mixture(*(field[order] for field in mixture))


def log_odds(values: Tensor, mixture: Mixture) -> Tensor:
    """Posterior log odds that a value belongs to the higher of two Gaussians, made to rise with the value everywhere.

    Beyond some value on one side the wider Gaussian is the more probable one again, however far off its mean. There
    the odds are mirrored at the turning point, so that the order of the values stays.

    Args:
        values: Shape ``[values]``.
        mixture: The two Gaussians.

    Example:
        >>> even = Mixture(torch.tensor([0.5, 0.5]), torch.tensor([-1.0, 1.0]), torch.tensor([1.0, 1.0]))
        >>> log_odds(torch.tensor([-2.0, 0.0, 3.0]), even).tolist()
        [-4.0, 0.0, 6.0]
    """
    values = values.double()

    def plain(at: Tensor) -> Tensor:
        joint = mixture.joint(at)
        return joint[:, 1] - joint[:, 0]

    (low_mean, high_mean), (low, high) = mixture.means, mixture.variances
    slopes = (values - low_mean) / low - (values - high_mean) / high
    bend = 1 / low - 1 / high
    turn = (low_mean / low - high_mean / high) / torch.where(bend == 0, torch.ones_like(bend), bend)
    return torch.where(slopes < 0, 2 * plain(turn[None]) - plain(values), plain(values))


def weighed(scales: Mapping[str, Tensor], alive: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """How much speaks for each unit among all of a network, from its scale relative to the median of its group.

    Args:
        scales: What :func:`gaussian_scales` gives, by group name.
        alive: Bool masks ``[units]`` of the units that count.

    Returns:
        Log odds that a unit is active, on the CPU, minus infinity where it does not count; and for each group the scale
        of the prior that says what is usual for the dormant units of the network.

    Example:
        >>> scales = {"a": torch.tensor([1.0, 1.1, 9.0, 9.9]), "b": torch.tensor([0.1, 0.11, 0.9, 0.99])}
        >>> found, _ = weighed(scales, {name: torch.ones(4, dtype=torch.bool) for name in scales})
        >>> (found["a"] > 0).tolist(), (found["b"] > 0).tolist()
        ([False, False, True, True], [False, False, True, True])
    """
    own = {name: values.detach().cpu().double() for name, values in scales.items()}
    middles = {name: values[alive[name]].median().clamp_min(_LEAST_SCALE) for name, values in own.items()}
    ratios = {name: (values / middles[name]).clamp_min(_LEAST_SCALE).log() for name, values in own.items()}
    mixture = fit_mixture(torch.cat([ratio[alive[name]] for name, ratio in ratios.items()]))
    dormant = float(mixture.means[0].exp())
    evidence = {name: log_odds(r, mixture).masked_fill(~alive[name], -torch.inf) for name, r in ratios.items()}
    return evidence, {name: 0.5 * dormant * float(middle) for name, middle in middles.items()}


def soft_gates(
    evidence: Mapping[str, Tensor], threshold: float, temperature: float, least: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Gates in [0, 1]: the probability that a unit stays, at some temperature.

    Args:
        evidence: How much speaks for each unit, shape ``[units]`` by group name.
        threshold: Evidence of a unit that stays or goes alike.
        temperature: How gently gates shut around the threshold, above 0.
        least: Number of units of each group that stay whatever comes, so their gates are open: with nothing but nearly
            shut gates in it, a group would cut the network in two. Default: none.
    """
    gates = {name: torch.sigmoid((values - threshold) / temperature) for name, values in evidence.items()}
    return {
        name: gate.masked_fill(best(evidence[name], (least or {}).get(name, 0)), 1.0) for name, gate in gates.items()
    }


def threshold_for(
    evidence: Mapping[str, Tensor],
    temperature: float,
    cost: Callable[[Mapping[str, float]], float],
    allowed: float,
    least: Mapping[str, int] | None = None,
) -> float:
    """The lowest threshold at which the expected number of open gates costs no more than allowed, by bisection.

    Args:
        evidence: As for :func:`soft_gates`.
        temperature: As for :func:`soft_gates`.
        cost: Cost of expected numbers of units by group name; must not rise when a number falls.
        allowed: What it may be. Where even all shut gates cost more, the threshold shuts all.
        least: As for :func:`soft_gates`.

    Example:
        >>> found = threshold_for({"a": torch.ones(4)}, 0.1, lambda widths: widths["a"], allowed=2.0)  # all half open
        >>> round(found, 6)
        1.0
    """
    finite = torch.cat([values[values.isfinite()].double() for values in evidence.values()])
    low = float(finite.min()) - _REACH * temperature
    high = float(finite.max()) + _REACH * temperature

    def fits(threshold: float) -> bool:
        gates = soft_gates(evidence, threshold, temperature, least)
        return cost({name: float(gate.sum()) for name, gate in gates.items()}) <= allowed

    if fits(low):
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def annealed(
    evidence: Mapping[str, Tensor],
    progress: float,
    cost: Callable[[Mapping[str, float]], float],
    allowed: float,
    least: Mapping[str, int],
) -> dict[str, Tensor]:
    """Gates at some progress of the annealing, which begins at the temperature at which the evidence spreads.

    Args:
        evidence: As for :func:`soft_gates`.
        progress: From 0 to 1.
        cost: As for :func:`threshold_for`.
        allowed: As for :func:`threshold_for`.
        least: As for :func:`soft_gates`.
    """
    known = torch.cat([values[values.isfinite()] for values in evidence.values()])
    temperature = max(cooled(float(known.std(unbiased=False)), progress), _COLDEST)
    return soft_gates(evidence, threshold_for(evidence, temperature, cost, allowed, least), temperature, least)


def best(evidence: Tensor, count: int) -> Tensor:
    """Bool mask of the units for which most speaks; of equal ones the first.

    Example:
        >>> best(torch.tensor([0.1, 0.9, 0.5]), 2)
        tensor([False,  True,  True])
    """
    return torch.zeros(len(evidence), dtype=torch.bool).index_fill_(
        0, evidence.argsort(descending=True, stable=True)[:count], True
    )


def cooled(spread: float, progress: float, last: float = 0.02) -> float:
    """Temperature that falls from a spread to a small share of it, by equal factors over equal progress.

    Args:
        spread: Temperature at the start.
        progress: From 0 to 1.
        last: Share of the start at the end.

    Example:
        >>> round(cooled(2.0, 0.5, last=0.01), 9)
        0.2
    """
    return float(spread * last**progress)


def falling(start: float, end: float, progress: float) -> float:
    """What may be left on the way from one cost to another: much goes at first, ever less towards the end.

    Example:
        >>> falling(100.0, 20.0, 0.5)
        30.0
    """
    return end + (start - end) * (1 - progress) ** 3

"""Minimising a function of a real vector in a box by trying points: for functions that have no gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_prune.choices import chosen
from lightning_prune.errors import ConfigurationError

SearchName = Literal["genetic", "particle_swarm", "annealing", "cross_entropy"]
Evaluate = Callable[[Tensor], Tensor]
"""Values of the rows of a matrix, each a point of the unit box; what lies outside counts as its nearest point."""


class Found(NamedTuple):
    """The best point that was tried, and its value."""

    point: Tensor
    value: float


@dataclass(frozen=True)
class Search(ABC):
    """Tries ``population`` points, and then as many better ones for each generation.

    The result is never worse than any starting point, and the same for the same generator. A value that is not a
    number counts as infinite.

    Args:
        population: Points in each generation, at least 2.
        generations: Generations after the first points, at least 1.

    Raises:
        ConfigurationError: If there are too few of them.

    Example:
        >>> class Chance(Search):
        ...     def improve(self, evaluate, points, values, generator):
        ...         for _ in range(self.generations):
        ...             evaluate(torch.rand(points.shape, generator=generator, dtype=points.dtype))
        >>> start, zero, one = torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([1.0])
        >>> found = Chance().minimise(lambda x: float(x.abs()), [start], zero, one, torch.Generator().manual_seed(0))
        >>> found.value < 0.1
        True
    """

    population: int = 20
    generations: int = 15

    def __post_init__(self) -> None:
        """Refuse to search without points."""
        for name, least in (("population", 2), ("generations", 1)):
            if getattr(self, name) < least:
                raise ConfigurationError(
                    f"{type(self).__name__}: {name} must be at least {least}, but is {getattr(self, name)}."
                )

    @abstractmethod
    def improve(self, evaluate: Evaluate, points: Tensor, values: Tensor, generator: torch.Generator) -> None:
        """Try ``generations`` times as many points as given.

        Args:
            evaluate: Gives the values of points, shape ``[n, dimensions]``, and remembers the best one.
            points: First points in the unit box, shape ``[population, dimensions]``.
            values: Their values.
            generator: The only source of randomness.
        """

    def minimise(
        self,
        function: Callable[[Tensor], float],
        starts: Sequence[Tensor],
        lower: Tensor,
        upper: Tensor,
        generator: torch.Generator,
    ) -> Found:
        """Look for the smallest value between ``lower`` and ``upper``.

        Args:
            function: Value of a point, shape ``[dimensions]``.
            starts: Points that are tried before anything else, the first of equal value being the result; at most
                ``population`` of them have a descendant.
            lower: Least value of each coordinate.
            upper: Largest value of each coordinate.
            generator: Source of randomness.
        """
        low, size = lower.double(), (upper - lower).double()
        best = Found(starts[0] if starts else lower, math.inf)

        def evaluate(points: Tensor) -> Tensor:
            nonlocal best
            values = []
            for row in points:
                point = low + row.clamp(0, 1) * size
                value = function(point)
                values.append(math.inf if math.isnan(value) else value)
                if values[-1] < best.value:
                    best = Found(point, values[-1])
            return torch.tensor(values, dtype=torch.float64)

        drawn = torch.rand(max(self.population - len(starts), 0), len(low), generator=generator, dtype=torch.float64)
        scale = size.where(size > 0, torch.ones_like(size))
        points = torch.stack([*((start.double() - low) / scale for start in starts), *drawn])
        values = evaluate(points)
        self.improve(evaluate, points[: self.population], values[: self.population], generator)
        return best


@dataclass(frozen=True)
class Genetic(Search):
    """The better of some random points have children, which lie on the line through two parents, a little off it.

    Args:
        population: As for :class:`Search`.
        generations: As for :class:`Search`.
        elite: Best points that live on as they are.
        tournament: Random points of which the best becomes a parent.
        crossover: Share of the children that have two parents.
        mutation: Standard deviation of what is added to a child, as a share of the box; declines to 0.

    Example:
        >>> Genetic(population=10).generations
        15
    """

    elite: int = 2
    tournament: int = 3
    crossover: float = 0.9
    mutation: float = 0.1

    def improve(self, evaluate: Evaluate, points: Tensor, values: Tensor, generator: torch.Generator) -> None:
        """Replace all but the elite in each generation."""
        children = max(len(points) - self.elite, 1)
        for generation in range(self.generations):
            rivals = torch.randint(len(points), (2, children, self.tournament), generator=generator)
            winners = rivals.gather(2, values[rivals].argmin(2, keepdim=True)).squeeze(2)
            one, other = points[winners[0]], points[winners[1]]
            shares = 2 * _uniform(one, generator) - 0.5  # BLX: somewhat beyond either parent too
            crossed = torch.rand(children, 1, generator=generator) < self.crossover
            spread = self.mutation * (1 - generation / self.generations)
            born = (one + crossed * shares * (other - one) + spread * _normal(one, generator)).clamp(0, 1)
            elders = values.argsort(stable=True)[: len(points) - children]
            values = torch.cat([values[elders], evaluate(born)])
            points = torch.cat([points[elders], born])


@dataclass(frozen=True)
class ParticleSwarm(Search):
    """Points fly on, drawn to the best place each has seen and to the best that any has (Kennedy & Eberhart, 1995).

    Args:
        population: As for :class:`Search`.
        generations: As for :class:`Search`.
        inertia: Share of the velocity that is kept.
        own: Pull of the best place of the point itself.
        common: Pull of the best place of all.

    Example:
        >>> ParticleSwarm(inertia=0.6).common
        1.5
    """

    inertia: float = 0.7
    own: float = 1.5
    common: float = 1.5

    def improve(self, evaluate: Evaluate, points: Tensor, values: Tensor, generator: torch.Generator) -> None:
        """Move all points once in each generation."""
        velocity, best, best_values = torch.zeros_like(points), points, values
        for _ in range(self.generations):
            to_own, to_common = best - points, best[best_values.argmin()] - points
            pulls = self.own * _uniform(points, generator) * to_own
            pulls = pulls + self.common * _uniform(points, generator) * to_common
            velocity = self.inertia * velocity + pulls
            points = (points + velocity).clamp(0, 1)
            values = evaluate(points)
            better = values < best_values
            best, best_values = points.where(better[:, None], best), values.where(better, best_values)


@dataclass(frozen=True)
class Annealing(Search):
    """One point wanders from the best start on, and goes uphill ever more rarely (Kirkpatrick et al., 1983).

    Args:
        population: As for :class:`Search`; the number of steps in a generation.
        generations: As for :class:`Search`.
        temperature: Rise that is taken with probability 1/e at first, as a share of the spread of the first values;
            falls to a thousandth of it.
        step: Standard deviation of a step at first, as a share of the box; falls to a tenth.

    Example:
        >>> Annealing(step=0.1).temperature
        0.1
    """

    temperature: float = 0.1
    step: float = 0.2

    def improve(self, evaluate: Evaluate, points: Tensor, values: Tensor, generator: torch.Generator) -> None:
        """Take ``population * generations`` steps."""
        finite = values[values.isfinite()]
        heat = self.temperature * float(finite.std(correction=0)) if len(finite) else 0.0
        steps = len(points) * self.generations
        point, value = points[values.argmin()], float(values.min())
        for number in range(steps):
            cooled = number / steps
            moved = (point + self.step * 0.1**cooled * _normal(point, generator)).clamp(0, 1)
            changed = float(evaluate(moved[None]))
            luck = float(torch.rand((), generator=generator, dtype=torch.float64))
            if changed <= value - heat * 0.001**cooled * math.log(max(luck, 1e-300)):
                point, value = moved, changed


@dataclass(frozen=True)
class CrossEntropy(Search):
    """A search by the cross-entropy method (Rubinstein & Kroese, 2004), not a loss.

    Points are drawn from a normal distribution, which is fitted to the best of them again and again.

    Args:
        population: As for :class:`Search`.
        generations: As for :class:`Search`.
        elite: Share of the points that the distribution is fitted to.
        smoothing: Share of the fitted distribution in the next one.

    Example:
        >>> CrossEntropy(elite=0.2).smoothing
        0.8
    """

    elite: float = 0.25
    smoothing: float = 0.8

    def improve(self, evaluate: Evaluate, points: Tensor, values: Tensor, generator: torch.Generator) -> None:
        """Fit and draw once in each generation."""
        count = max(2, round(self.elite * len(points)))
        mean, deviation = points.mean(0), points.std(0, correction=0)
        for _ in range(self.generations):
            best = points[values.argsort(stable=True)[:count]]
            mean = mean.lerp(best.mean(0), self.smoothing)
            deviation = deviation.lerp(best.std(0, correction=0), self.smoothing)
            points = (mean + deviation * _normal(points, generator)).clamp(0, 1)
            values = evaluate(points)


_BY_NAME: dict[str, type[Search]] = {
    "genetic": Genetic,
    "particle_swarm": ParticleSwarm,
    "annealing": Annealing,
    "cross_entropy": CrossEntropy,
}


def search_from(search: SearchName | Search) -> Search:
    """The search of that name with its defaults, or the given search itself.

    Raises:
        ConfigurationError: If no search has that name.

    Example:
        >>> search_from("genetic")
        Genetic(population=20, generations=15, elite=2, tournament=3, crossover=0.9, mutation=0.1)
    """
    return chosen("optimizer", search, Search, _BY_NAME)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=like.dtype)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)

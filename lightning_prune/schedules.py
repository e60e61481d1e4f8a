"""When rounds are due, and how much of the budget each of them must have reached."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lightning_prune.choices import chosen, unknown_name
from lightning_prune.errors import ConfigurationError

_LEAST = 1e-6
"""What stands for nothing at all where a share of what is to be removed is asked for."""

Unit = Literal["epoch", "step", "fraction"]
ScheduleName = Literal["one_shot", "linear", "cubic", "geometric", "cosine"]


@dataclass(frozen=True)
class Position:
    """How far a fit has come, or, for a whole fit, how long it is.

    Args:
        epoch: Epochs done, fractional inside an epoch; ``inf`` as a length means that no end is set.
        step: Optimizer steps done; ``inf`` as a length means that no end is set.
        fraction: Share of the fit done, 0 to 1.

    Example:
        >>> Position(epoch=2.5, step=250, fraction=0.25).along("step")
        250.0
    """

    epoch: float
    step: float
    fraction: float

    def along(self, unit: Unit) -> float:
        """The position measured in the given unit."""
        return float({"epoch": self.epoch, "step": self.step, "fraction": self.fraction}[unit])


def _slack(value: float) -> float:
    """Rounding allowance, so that a point computed as 2.9999999999 counts as 3."""
    return 1e-9 * max(1.0, abs(value))


@dataclass(frozen=True)
class Schedule(ABC):
    """Rounds on the grid ``start, start + interval, ...`` up to ``end``, which is always the last round.

    Whatever is due can be asked for at any time and any number of times: :meth:`level` depends on the position alone,
    so a caller that missed a point, or that was killed and resumed, catches up by itself.

    A subclass gives the curve by overriding :meth:`removed`. It is asked with ``x = (i + 1) / n`` at round ``i``
    (counted from 0) of ``n``, so the first round already removes something and the last one reaches the whole budget.

    Args:
        start: Position of the first round, in ``unit``.
        end: Position of the last round, in ``unit``.
        interval: Distance between rounds, in ``unit``. The last distance may be shorter.
        unit: ``"epoch"``, ``"step"`` (optimizer steps) or ``"fraction"`` (of the fit, 0 to 1).

    Raises:
        ConfigurationError: If the numbers make no grid.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Squared(Schedule):
        ...     def removed(self, x: float, remove: float) -> float:
        ...         return remove * x**2
        >>> schedule = Squared(start=1, end=4, interval=1, unit="epoch")
        >>> schedule.rounds()
        [1.0, 2.0, 3.0, 4.0]
        >>> schedule.level(Position(epoch=2, step=200, fraction=0.2), remove=0.5)
        0.25
    """

    start: float = 0.1
    end: float = 0.6
    interval: float = 0.1
    unit: Unit = "fraction"

    def __post_init__(self) -> None:
        """Refuse numbers that make no grid."""
        if self.unit not in ("epoch", "step", "fraction"):
            raise unknown_name("schedule unit", self.unit, ["epoch", "step", "fraction"])
        name = type(self).__name__
        if not (math.isfinite(self.interval) and self.interval > 0):
            raise ConfigurationError(f"{name}: interval must be a finite number above 0, but is {self.interval}.")
        if not (0 <= self.start <= self.end < math.inf):
            raise ConfigurationError(
                f"{name}: rounds must satisfy 0 <= start <= end, but start is {self.start} and end is {self.end}."
            )
        if self.unit == "fraction" and self.end > 1:
            raise ConfigurationError(
                f'{name}: a fraction of the fit lies between 0 and 1, but end is {self.end}. Did you mean unit="epoch"?'
            )

    @abstractmethod
    def removed(self, x: float, remove: float) -> float:
        """Fraction removed at share ``x`` of the way to ``remove``; must be ``remove`` at ``x = 1``."""

    def rounds(self) -> list[float]:
        """The positions of all rounds, in ``unit``, ascending."""
        inner = [self.start + i * self.interval for i in range(self._count() - 1)]
        return [*map(float, inner), float(self.end)]

    def level(self, position: Position, remove: float) -> float:
        """Share of the budget that must be reached by this position.

        Args:
            position: Present position of the fit.
            remove: Fraction to have been removed at the end of the schedule, in [0, 1).

        Returns:
            A number in [0, 1]: 0 before the first round, 1 from the last one on, never falling in between.
        """
        fired = self._fired(position.along(self.unit))
        if fired == 0:
            return 0.0
        if fired == self._count():
            return 1.0
        remove = max(remove, _LEAST)
        return min(max(self.removed(fired / self._count(), remove) / remove, 0.0), 1.0)

    def check(self, total: Position) -> str | None:
        """Compare the schedule with the length of a fit.

        Args:
            total: Length of the fit in each unit; ``inf`` where no end is set.

        Returns:
            A warning to print if only some of the rounds lie inside the fit, else ``None``.

        Raises:
            ConfigurationError: If no round at all can happen in this fit.
        """
        if self.unit == "fraction" and math.isinf(total.epoch) and math.isinf(total.step):
            raise ConfigurationError(
                f"{self} counts in fractions of the fit, but this fit has no set end. "
                'Set max_epochs or max_steps of the Trainer, or give the schedule unit="epoch" or unit="step".'
            )
        length = total.along(self.unit)
        steps = f" ({total.step:g} optimizer steps)" if math.isfinite(total.step) else ""
        length_text = f"{total.epoch:g} epochs{steps}" if math.isfinite(total.epoch) else f"{total.step:g} steps"
        inside = self._fired(length - 3 * _slack(length)) if math.isfinite(length) else self._count()
        if inside == 0:
            remedy = "Train longer, or give the schedule an earlier start."
            if self.unit == "fraction":  # then it is the whole fit, or what was meant for an epoch
                remedy = 'Give it an earlier start, or did you mean unit="epoch"?'
            raise ConfigurationError(
                f"{self} can never fire: its first round is at {self.unit} {self.start:g}, but the fit ends after "
                f"{length_text}. {remedy}"
            )
        if inside < self._count():
            return (
                f"{self} is only partly reached: {inside} of its {self._count()} rounds lie inside the fit, which ends "
                f"after {length_text}. To reach the whole budget, train longer or give the schedule an earlier end."
            )
        return None

    def _regular(self, value: float) -> int:
        """Number of regular grid points at or before ``value``, which must not lie before ``start``."""
        return math.floor((value + _slack(value) - self.start) / self.interval) + 1

    def _count(self) -> int:
        regular = self._regular(self.end)
        last = self.start + (regular - 1) * self.interval
        return regular + (last < self.end - _slack(self.end))

    def _fired(self, value: float) -> int:
        """Number of rounds due at or before ``value``."""
        if value < self.start - _slack(self.start):
            return 0
        if value >= self.end - _slack(self.end):
            return self._count()
        return max(self._regular(value), 1)


class OneShot(Schedule):
    """Everything in one round.

    Args:
        at: Position of the round, in ``unit``. Pruning at initialisation is ``at=0``.
        unit: ``"epoch"``, ``"step"`` or ``"fraction"``.

    Example:
        >>> OneShot(at=5, unit="epoch").level(Position(epoch=5, step=50, fraction=0.5), remove=0.7)
        1.0
    """

    def __init__(self, at: float = 0.3, unit: Unit = "fraction") -> None:
        super().__init__(start=at, end=at, interval=1.0, unit=unit)

    def __repr__(self) -> str:
        return f"OneShot(at={self.start}, unit={self.unit!r})"

    def removed(self, x: float, remove: float) -> float:
        """All of it."""
        return remove


@dataclass(frozen=True)
class Linear(Schedule):
    """The same share of the budget in every round.

    Example:
        >>> Linear(start=0, end=3, interval=1, unit="epoch").level(Position(0, 0, 0.0), remove=0.8)
        0.25
    """

    def removed(self, x: float, remove: float) -> float:
        """A straight line from 0 to ``remove``."""
        return remove * x


@dataclass(frozen=True)
class Cubic(Schedule):
    """Much at first, while the network has spare capacity, and ever less towards the end (Zhu & Gupta, 2017).

    Example:
        >>> Cubic(start=0, end=1, interval=1, unit="epoch").level(Position(0, 0, 0.0), remove=0.8)
        0.875
    """

    def removed(self, x: float, remove: float) -> float:
        """Remaining share of the budget falls with the third power."""
        return remove * (1 - (1 - x) ** 3)


@dataclass(frozen=True)
class Geometric(Schedule):
    """Every round keeps the same share of what is left, as in iterative magnitude pruning (Frankle & Carbin, 2019).

    Example:
        >>> schedule = Geometric(start=0, end=1, interval=1, unit="epoch")
        >>> round(0.75 * schedule.level(Position(0, 0, 0.0), remove=0.75), 9)
        0.5
    """

    def removed(self, x: float, remove: float) -> float:
        """The kept share is ``(1 - remove) ** x``."""
        return float(1 - (1 - remove) ** x)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Slow at first, fastest half way, slow at the end.

    Example:
        >>> schedule = Cosine(start=0, end=1, interval=1, unit="epoch")
        >>> round(schedule.level(Position(0, 0, 0.0), remove=0.8), 9)
        0.5
    """

    def removed(self, x: float, remove: float) -> float:
        """Half a period of a cosine from 0 to ``remove``."""
        return remove * (1 - math.cos(math.pi * x)) / 2


_BY_NAME: dict[str, Callable[[], Schedule]] = {
    "one_shot": OneShot,
    "linear": Linear,
    "cubic": Cubic,
    "geometric": Geometric,
    "cosine": Cosine,
}


def schedule_from(schedule: ScheduleName | Schedule) -> Schedule:
    """The schedule of that name with its default grid, or the given schedule itself.

    Named schedules have rounds at 0.1, 0.2, ... 0.6 of the fit; ``"one_shot"`` has its only round at 0.3.

    Raises:
        ConfigurationError: If no schedule has that name.

    Example:
        >>> schedule_from("one_shot")
        OneShot(at=0.3, unit='fraction')
    """
    return chosen("schedule", schedule, Schedule, _BY_NAME)

"""Coefficients that grow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_prune.errors import ConfigurationError


@dataclass(frozen=True)
class Growth:
    """A coefficient that grows by ``delta`` every so many steps up to a ceiling (Wang et al., 2021).

    Args:
        delta: Growth each time; the first time at the very beginning.
        every: Steps from one time to the next.
        ceiling: Where it ends.
        start: Where it comes from.

    Raises:
        ConfigurationError: If it does not grow.

    Example:
        >>> growth = Growth(delta=0.25, every=2, ceiling=0.6)
        >>> [growth.after(step) for step in range(6)], growth.steps
        ([0.25, 0.25, 0.5, 0.5, 0.6, 0.6], 6)
    """

    delta: float
    every: int
    ceiling: float
    start: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what does not grow."""
        if not (self.delta > 0 and self.every >= 1 and self.ceiling > self.start >= 0):
            raise ConfigurationError(
                f"a growing coefficient needs a delta above 0, every of at least 1 and a ceiling above where it starts "
                f"({self.start:g}), but delta is {self.delta}, every is {self.every} and the ceiling is {self.ceiling}."
            )

    @classmethod
    def within(cls, steps: int, delta: float | None, every: int, ceiling: float, start: float = 0.0) -> Growth:
        """One that reaches its ceiling within so many steps: with the given delta, or the smallest one that does.

        Raises:
            ConfigurationError: If there are too few steps.

        Example:
            >>> Growth.within(steps=9, delta=None, every=2, ceiling=1.0).delta
            0.25
        """
        even = (ceiling - start) / max(steps // max(every, 1), 1)
        growth = cls(even if delta is None else delta, every, ceiling, start)
        if growth.steps > steps:
            raise ConfigurationError(
                f"a coefficient that grows from {start:g} to {ceiling:g} by {growth.delta:g} every {every} steps takes "
                f"{growth.steps} optimizer steps, but only {steps} are known to be there for it. Prune later, raise "
                f"delta or lower every; or, if the fit has no known length, set unit='step' and at to a step."
            )
        return growth

    @property
    def steps(self) -> int:
        """Number of steps from its start until it has been at its ceiling for ``every`` steps."""
        return math.ceil((self.ceiling - self.start) / self.delta - 1e-9) * self.every

    def after(self, steps: float) -> float:
        """The coefficient when so many steps have been done."""
        return min(self.start + self.delta * (steps // self.every + 1), self.ceiling)

"""The record of a search for the number of units: what was tried, what came of it, as a table and a figure."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from lightning_prune.budget import check_fraction
from lightning_prune.choices import check_at_least, unknown_name
from lightning_prune.errors import ConfigurationError
from lightning_prune.figures import new_figure, save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class WidthSearch:
    """A search for the smallest number of units that still does: train, measure, prune a step, and again.

    It ends after some cycles in a row whose value falls short of the best by more than the tolerance, and with the fit
    at the latest. The network then goes back to the smallest width within the tolerance, with the weights of that time.

    Args:
        cycle: Epochs of training at each width, at least 1.
        monitor: What is measured, by its name in ``trainer.callback_metrics``. Measure it on validation data: a width
            that is chosen by test data makes these worthless as a test.
        mode: Whether more of it is better (``"max"``) or less (``"min"``).
        step: Fraction of the units that are left that goes after each cycle, in (0, 1).
        tolerance: How much worse than the best a value may be, in the unit of what is measured.
        patience: Number of cycles in a row that may be worse than that.
        most: Fraction of the units that may go in all, in [0, 1).

    Raises:
        ConfigurationError: If an argument is wrong.

    Example:
        >>> WidthSearch(cycle=3).step
        0.1
    """

    cycle: int = 2
    monitor: str = "val_accuracy"
    mode: Literal["max", "min"] = "max"
    step: float = 0.1
    tolerance: float = 0.005
    patience: int = 2
    most: float = 0.95

    def __post_init__(self) -> None:
        """Refuse what cannot be searched with."""
        if self.mode not in ("max", "min"):
            raise unknown_name("mode", self.mode, ["max", "min"])
        check_at_least(1, whole=True, cycle=self.cycle, patience=self.patience)
        if not 0 < self.step < 1:
            raise ConfigurationError(f"step of a search must be a fraction in (0, 1), but is {self.step}.")
        if not self.tolerance >= 0:
            raise ConfigurationError(f"tolerance of a search must be at least 0, but is {self.tolerance}.")
        check_fraction(self.most, "most")

    def next(self, removed: float) -> float:
        """Fraction of all units to have been removed after the next step."""
        return min(1 - (1 - removed) * (1 - self.step), self.most)

    def falls_short(self, values: Sequence[float]) -> bool:
        """Whether the last value is worse than the best so far by more than the tolerance, or no number."""
        sign = 1 if self.mode == "max" else -1
        best = max((sign * value for value in values if not math.isnan(value)), default=math.inf)
        return not sign * values[-1] >= best - self.tolerance

    def misses(self, values: Sequence[float]) -> int:
        """How many of the last values in a row have fallen short, when they were measured."""
        short = [self.falls_short(values[: count + 1]) for count in range(len(values))]
        return next((count for count, one in enumerate(reversed(short)) if not one), len(short))

    def chosen(self, values: Sequence[float]) -> int | None:
        """Place of the smallest width within the tolerance of the best so far."""
        return next((i for i in reversed(range(len(values))) if not self.falls_short(values[: i + 1])), None)


class Trial(NamedTuple):
    """One cycle of a search.

    Attributes:
        widths: Number of units of each group.
        value: What was measured.
        seconds: Time that its training and validation took; in a fit that was resumed in it, since then.
    """

    widths: dict[str, int]
    value: float
    seconds: float

    @property
    def units(self) -> int:
        """Number of units of all groups."""
        return sum(self.widths.values())


@dataclass(frozen=True)
class WidthRecord:
    """All cycles of a search.

    Args:
        monitor: Name of what was measured.
        trials: The cycles, in order.
        chosen: Place of the one that the network went back to, if any.

    Example:
        >>> trials = [Trial({"0": 8}, 0.9, 2.0), Trial({"0": 6}, 0.8, 1.5)]
        >>> print(WidthRecord("val_accuracy", trials, 0))
        units  val_accuracy  seconds
            8        0.9000     2.00  chosen
            6        0.8000     1.50
        minimum 0.8000, maximum 0.9000, spread 0.1000; 1.75 seconds per cycle on average
    """

    monitor: str
    trials: Sequence[Trial]
    chosen: int | None = None

    def __str__(self) -> str:
        return self.table()

    def summary(self) -> dict[str, tuple[float, float]]:
        """Minimum, maximum, mean and spread (maximum minus minimum) of values and of seconds."""
        values, seconds = [trial.value for trial in self.trials], [trial.seconds for trial in self.trials]
        return {
            "minimum": (min(values), min(seconds)),
            "maximum": (max(values), max(seconds)),
            "mean": (statistics.fmean(values), statistics.fmean(seconds)),
            "spread": (max(values) - min(values), max(seconds) - min(seconds)),
        }

    def table(self) -> str:
        """The record as plain text."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"units  {self.monitor}  seconds"
        for place, trial in enumerate(self.trials):
            mark = "  chosen" if place == self.chosen else ""
            yield f"{trial.units:5}  {trial.value:{len(self.monitor)}.4f}  {trial.seconds:7.2f}{mark}"
        summary = self.summary()
        numbers = ", ".join(f"{name} {summary[name][0]:.4f}" for name in ("minimum", "maximum", "spread"))
        yield f"{numbers}; {summary['mean'][1]:.2f} seconds per cycle on average"

    def to_csv(self, path: str | Path) -> None:
        """Write one row for each cycle, then minimum, maximum, mean and spread."""
        groups = list(self.trials[0].widths)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["kind", "units", *groups, self.monitor, "seconds"])
            for place, trial in enumerate(self.trials):
                widths = [trial.widths[name] for name in groups]
                kind = "chosen" if place == self.chosen else "cycle"
                writer.writerow([kind, trial.units, *widths, trial.value, round(trial.seconds, 6)])
            for kind, (value, seconds) in self.summary().items():
                writer.writerow([kind, "", *[""] * len(groups), value, round(seconds, 6)])

    def figure(self) -> Figure:
        """Values and seconds against the number of units.

        Raises:
            ConfigurationError: If matplotlib is not installed.
        """
        units = [trial.units for trial in self.trials]
        figure = new_figure(7, 5)
        above, below = figure.subplots(2, 1, sharex=True)
        above.plot(units, [trial.value for trial in self.trials], "o-", color="#2f6db5")
        if self.chosen is not None:
            trial = self.trials[self.chosen]
            above.plot([trial.units], [trial.value], "o", color="#c65d21", markersize=11, label=f"{trial.units} units")
            above.legend(frameon=False)
        above.set_ylabel(self.monitor)
        below.bar(units, [trial.seconds for trial in self.trials], color="#d9dee7", width=0.5 + 0.02 * max(units))
        below.set(xlabel="units", ylabel="seconds per cycle")
        return figure

    def save(self, directory: str | Path) -> None:
        """Write ``width_search.csv``, and ``width_search.png`` where matplotlib is installed.

        Args:
            directory: Where to; made if it does not exist.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_csv(folder / "width_search.csv")
        save_picture(self.figure, folder / "width_search.png")

"""What was asked, what was reached, and what it cost before and after: as text, CSV, JSON and a figure."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_prune.errors import ConfigurationError
from lightning_prune.figures import TALLEST, new_figure, save_picture
from lightning_prune.graph.channels import Refusal
from lightning_prune.text import BYTES, COUNTS, SECONDS, aligned, in_units, removed, shortened, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_VERSION = 1


class GroupWidth(NamedTuple):
    """Width of one channel group before and after."""

    name: str
    before: int
    after: int


class Request(NamedTuple):
    """How much was to go: a fraction in [0, 1) of a measure such as ``"macs"``."""

    fraction: float
    measure: str


class Round(NamedTuple):
    """One round: when it was, and the fraction of the requested measure that was gone after it."""

    epoch: int
    step: int
    removed: float


@dataclass(frozen=True)
class Totals:
    """What the whole network costs; ``None`` where it was not measured.

    Args:
        channels: Sum of the widths of all channel groups.
        parameters: Number of parameters.
        macs: Multiply-accumulates for one sample: of ``forward`` on ``example_input_array`` where the module has one,
            else of the training step in evaluation mode, with all that it runs.
        checkpoint_bytes: Size of the saved weights.
        latency_seconds: Measured time of one forward.
    """

    channels: int
    parameters: int
    macs: int | None = None
    checkpoint_bytes: int | None = None
    latency_seconds: float | None = None


_LABELS = {
    "channels": "channels",
    "parameters": "parameters",
    "macs": "MACs",
    "checkpoint_bytes": "checkpoint",
    "latency_seconds": "latency",
}
_UNITS = {"checkpoint_bytes": BYTES, "latency_seconds": SECONDS}
_MEASURES = {"macs": "MACs", "params": "parameters"}


@dataclass(frozen=True)
class PruneReport:
    """The result of one fit with pruning.

    Args:
        groups: Width of every channel group before and after.
        before: Costs of the network as it came.
        after: Costs of the network as it is now.
        requested: What was asked for, or ``None`` where nothing was.
        reached: The fraction of the requested measure that went, in [0, 1].
        refused: Parts that stayed whole, with the reason.
        notes: Remarks that the reader must not miss.
        history: The rounds, in order.
        weights: Number of weights of every tensor with single weights off, before and after.

    Example:
        >>> report = PruneReport(
        ...     groups=(GroupWidth("net.0", 16, 6),),
        ...     before=Totals(channels=16, parameters=1210),
        ...     after=Totals(channels=6, parameters=460),
        ...     requested=Request(0.6, "channels"),
        ...     reached=0.625,
        ...     refused=(Refusal("net.2.weight (dim 0)", "is an output of the network"),),
        ...     history=(Round(epoch=3, step=40, removed=0.625),),
        ... )
        >>> print(report)
        channel group  before  after  removed
        net.0              16      6    62.5%
        <BLANKLINE>
        whole network   before    after  removed
        channels            16        6    62.5%
        parameters     1.210 k  0.460 k    62.0%
        <BLANKLINE>
        requested 60.0% of channels, reached 62.5%
        in 1 round, epoch 3 (step 40)
        <BLANKLINE>
        stays whole
          net.2.weight (dim 0): is an output of the network
    """

    groups: tuple[GroupWidth, ...]
    before: Totals
    after: Totals
    requested: Request | None = None
    reached: float = 0.0
    refused: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    history: tuple[Round, ...] = ()
    weights: tuple[GroupWidth, ...] = ()

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The report as plain text, at most 100 columns wide."""
        return "\n\n".join(self._paragraphs())

    def _paragraphs(self) -> Iterator[str]:
        if self.groups:
            yield "\n".join(aligned([("channel group", "before", "after", "removed"), *map(_row, self.groups)]))
        elif not self.weights:
            yield "no channel group: nothing in this network can be pruned"
        if self.weights:
            yield "\n".join(aligned([("weights of", "before", "kept", "removed"), *map(_row, self.weights)]))
        yield "\n".join(aligned([("whole network", "before", "after", "removed"), *self._totals()]))
        if outcome := list(self._outcome()):
            yield "\n".join(outcome)
        if self.refused:
            yield "\n".join(["stays whole", *(wrapped(f"{path}: {reason}") for path, reason in self.refused)])
        if self.notes:
            yield "\n".join(["notes", *map(wrapped, self.notes)])

    def _totals(self) -> Iterator[tuple[str, str, str, str]]:
        for key, before, after in self._measured():
            units = _UNITS.get(key, COUNTS)
            cells = in_units(before, units, before), in_units(after, units, before)
            yield _LABELS[key], *cells, removed(before, after)

    def _measured(self) -> Iterator[tuple[str, float, float]]:
        """Each cost that is known before and after."""
        for key in _LABELS:
            before, after = getattr(self.before, key), getattr(self.after, key)
            if before is not None and after is not None:
                yield key, before, after

    def _outcome(self) -> Iterator[str]:
        if self.requested:
            measure = _MEASURES.get(self.requested.measure, self.requested.measure)
            yield f"requested {self.requested.fraction:.1%} of {measure}, reached {self.reached:.1%}"
        if self.history:
            first, last = self.history[0], self.history[-1]
            rounds = "1 round" if len(self.history) == 1 else f"{len(self.history)} rounds"
            until = "" if first == last else f" to epoch {last.epoch} (step {last.step})"
            yield f"in {rounds}, epoch {first.epoch} (step {first.step}){until}"

    def to_csv(self, path: str | Path) -> None:
        """Write one row per channel group and one per cost: ``kind,name,before,after,removed`` in plain units."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["kind", "name", "before", "after", "removed"])
            rows: list[tuple[str, str, float, float]] = [("group", *group) for group in self.groups]
            rows += [("weights", *row) for row in self.weights]
            rows += [("total", *row) for row in self._measured()]
            for kind, name, before, after in rows:
                writer.writerow([kind, name, before, after, round(1 - after / before, 6) if before else ""])

    def to_dict(self) -> dict[str, Any]:
        """The report in lists, dictionaries, strings and numbers only, for JSON and for checkpoints."""
        return {
            "version": _VERSION,
            "groups": [group._asdict() for group in self.groups],
            "before": asdict(self.before),
            "after": asdict(self.after),
            "requested": self.requested._asdict() if self.requested else None,
            "reached": self.reached,
            "refused": [refusal._asdict() for refusal in self.refused],
            "notes": list(self.notes),
            "history": [event._asdict() for event in self.history],
            "weights": [row._asdict() for row in self.weights],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruneReport:
        """The report that :meth:`to_dict` described.

        Raises:
            ConfigurationError: If the values are not those of a report of this version.
        """
        if values.get("version") != _VERSION:
            raise ConfigurationError(
                f"This is not a pruning report of version {_VERSION}: its version is {values.get('version')!r}. "
                "Read it with the release of lightning-prune that wrote it."
            )
        try:
            return cls(
                groups=tuple(GroupWidth(**group) for group in values["groups"]),
                before=Totals(**values["before"]),
                after=Totals(**values["after"]),
                requested=Request(**values["requested"]) if values["requested"] else None,
                reached=values["reached"],
                refused=tuple(Refusal(**refusal) for refusal in values["refused"]),
                notes=tuple(values["notes"]),
                history=tuple(Round(**event) for event in values["history"]),
                weights=tuple(GroupWidth(**row) for row in values.get("weights", ())),
            )
        except (KeyError, TypeError) as error:
            raise ConfigurationError(f"This pruning report is damaged: {error}.") from error

    def to_json(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> PruneReport:
        """Read what :meth:`to_json` wrote.

        Raises:
            ConfigurationError: If the file cannot be read, or does not hold a report.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigurationError(
                f"cannot read a pruning report from {path}: {error.strerror}. A fit writes report.json into the "
                f"callback's directory, or beside its checkpoints."
            ) from error
        except (ValueError, AttributeError) as error:  # also of what is neither JSON nor text
            reason = "it is no text" if isinstance(error, UnicodeDecodeError) else error
            raise ConfigurationError(
                f"{path} does not hold a pruning report: {reason}. Give the report.json that a fit writes into the "
                f"callback's directory, or beside its checkpoints."
            ) from error

    def figure(self) -> Figure:
        """Bars of every width and every cost, before and after.

        Raises:
            ConfigurationError: If matplotlib is not installed.
        """
        costs = list(self._totals())
        kept = [after / before if before else 1.0 for _, before, after in self._measured()]
        heights = [0.9 + 0.3 * len(costs), 0.9 + min(0.24 * len(self.groups), TALLEST)]
        figure = new_figure(8, sum(heights))
        above, below = figure.subplots(2, 1, height_ratios=heights)
        _draw_bars(above, [row[0] for row in costs], [1.0] * len(costs), kept, [_arrow(*row[1:3]) for row in costs])
        above.set_title("whole network", loc="left", fontsize=10, fontweight="bold")
        above.legend(["before", "after"], loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8)
        above.xaxis.set_major_formatter("{x:.0%}")
        _draw_bars(
            below,
            [shortened(group.name, 32) for group in self.groups],
            [group.before for group in self.groups],
            [group.after for group in self.groups],
            [_arrow(str(group.before), str(group.after)) for group in self.groups],
        )
        title = "channels of each group" if self.groups else "no channel group: nothing can be pruned"
        below.set_title(title, loc="left", fontsize=10, fontweight="bold")
        if not self.groups:
            below.xaxis.set_visible(False)
            below.spines["bottom"].set_visible(False)
        return figure

    def save(self, directory: str | Path) -> list[str]:
        """Write ``report.txt``, ``report.csv``, ``report.json`` and ``widths.png``.

        Args:
            directory: Where to; made if it does not exist.

        Returns:
            A note for each file that was left out, with the reason.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.txt").write_text(self.table() + "\n", encoding="utf-8")
        self.to_csv(folder / "report.csv")
        self.to_json(folder / "report.json")
        return save_picture(self.figure, folder / "widths.png")


def _row(entry: GroupWidth) -> tuple[str, str, str, str]:
    return shortened(entry.name, 60), str(entry.before), str(entry.after), removed(entry.before, entry.after)


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} → {after}"


def _draw_bars(
    axes: Axes, names: Sequence[str], before: Sequence[float], after: Sequence[float], labels: Sequence[str]
) -> None:
    """Horizontal bars from top to bottom: what is left in front of what there was."""
    positions = range(len(names))
    colours = ["#c65d21" if now > once else "#2f6db5" for once, now in zip(before, after, strict=True)]
    axes.barh(positions, before, height=0.72, color="#d9dee7")
    axes.barh(positions, after, height=0.72, color=colours)
    for position, end, label in zip(positions, map(max, before, after), labels, strict=True):
        axes.annotate(label, (end, position), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(positions, names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, max([1.0, *before, *after]) * 1.22)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)

"""What came of measuring how much each channel group matters: as text, CSV, figure, and as ratios to prune with."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lightning_prune.compiled import uncompiled_name
from lightning_prune.errors import ConfigurationError
from lightning_prune.figures import new_figure, save_picture
from lightning_prune.text import aligned, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Curve(NamedTuple):
    """What the loss is with ever fewer units of some groups.

    Attributes:
        name: Name of the group, or the pattern of the groups that were cut together.
        width: Number of their units.
        kept: How many were kept, for each share that was removed.
        losses: The losses then.
    """

    name: str
    width: int
    kept: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """The loss of a network when some units of one group are off and all others on, for every group.

    Args:
        dense: Loss with nothing off.
        shares: Shares that were removed, rising.
        curves: A curve for each group or pattern.

    Example:
        >>> found = Sensitivity(0.5, (0.25, 0.5), (Curve("net.0", 8, (6, 4), (0.51, 0.6)),))
        >>> print(found)
        channel group  width     25%     50%
        net.0              8  0.5100  0.6000
        <BLANKLINE>
        loss with these shares of one group off; 0.5000 with nothing off
        >>> found.ratios(0.05), found.ratios(0.5, relative=True)
        ({'net.0': 0.25}, {'net.0': 0.5})
    """

    dense: float
    shares: tuple[float, ...]
    curves: tuple[Curve, ...]

    def __str__(self) -> str:
        return self.table()

    def ratios(self, rise: float, relative: bool = False) -> dict[str, float]:
        """The share of each group that can go alone before the loss has risen by more than is tolerated.

        It is the largest one that was measured such that neither it nor a smaller one costs more; 0 if there is none.
        Li et al. (2017) prune layers by such ratios. With all groups cut at once the loss rises further. Give them to
        ``ChannelPruning(ratios=...)``: ratios of all groups leave nothing for ``remove`` to decide. Where patterns
        leave groups out, ``include=list(ratios)`` keeps these whole; else ``remove`` is what they must help to reach.

        Args:
            rise: How much the loss may rise, at least 0.
            relative: Whether that is a share of the loss with nothing off.

        Raises:
            ConfigurationError: If the rise is negative or no number.
        """
        if not rise >= 0:
            raise ConfigurationError(f"the rise of the loss that is tolerated must be at least 0, but is {rise}.")
        most = self.dense + (rise * abs(self.dense) if relative else rise)
        return {uncompiled_name(curve.name): self._largest(curve.losses, most) for curve in self.curves}

    def _largest(self, losses: Sequence[float], most: float) -> float:
        within = 0.0
        for share, loss in zip(self.shares, losses, strict=True):
            if not loss <= most:
                break
            within = share
        return within

    def table(self) -> str:
        """The losses as plain text, a row for each group."""
        rows = [("channel group", "width", *(f"{share:.0%}" for share in self.shares))]
        for curve in self.curves:
            rows.append((shortened(curve.name, 40), str(curve.width), *(f"{loss:.4f}" for loss in curve.losses)))
        outcome = f"loss with these shares of one group off; {self.dense:.4f} with nothing off"
        return "\n".join([*aligned(rows), "", outcome])

    def to_csv(self, path: str | Path) -> None:
        """Write one row for each group and share, the first with nothing off."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["group", "width", "removed", "kept", "loss", "rise"])
            for curve in self.curves:
                points = [(0.0, curve.width, self.dense), *zip(self.shares, curve.kept, curve.losses, strict=True)]
                for share, kept, loss in points:
                    writer.writerow([curve.name, curve.width, share, kept, loss, loss - self.dense])

    def figure(self) -> Figure:
        """A small plot of the loss against the width for each group, all on one scale.

        Raises:
            ConfigurationError: If matplotlib is not installed.
        """
        lines = math.ceil(len(self.curves) / 4)
        figure = new_figure(10, 0.6 + 1.9 * lines)
        panels = figure.subplots(lines, 4, sharey=True, squeeze=False).flat
        for panel, curve in zip(panels, self.curves, strict=False):
            panel.plot([curve.width, *curve.kept], [self.dense, *curve.losses], "o-", color="#2f6db5", markersize=3)
            panel.axhline(self.dense, color="#d9dee7", zorder=0)
            panel.set_title(shortened(curve.name, 26), loc="left", fontsize=8)
            panel.set_xlim(curve.width * 1.04, 0)
            panel.tick_params(labelsize=7)
        for panel in panels[len(self.curves) :]:
            panel.set_axis_off()
        figure.supxlabel("width", fontsize=8)
        figure.supylabel("loss", fontsize=8)
        return figure

    def save(self, directory: str | Path) -> list[str]:
        """Write ``sensitivity.txt``, ``sensitivity.csv`` and ``sensitivity.png``.

        Args:
            directory: Where to; made if it does not exist.

        Returns:
            A note for each file that was left out, with the reason.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sensitivity.txt").write_text(self.table() + "\n", encoding="utf-8")
        self.to_csv(folder / "sensitivity.csv")
        return save_picture(self.figure, folder / "sensitivity.png")

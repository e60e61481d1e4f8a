"""Figures, drawn with matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_prune.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TALLEST = 300.0
"""Greatest height in inches; matplotlib draws no picture of more than 65536 pixels."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that belongs to no window.

    Args:
        width: In inches.
        height: In inches; at most :data:`TALLEST` is taken.

    Raises:
        ConfigurationError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            'The figure is drawn with matplotlib: pip install "lightning-prune[plots]".'
        ) from error
    return Figure(figsize=(width, min(height, TALLEST)), layout="constrained")


def save_picture(draw: Callable[[], Figure], path: Path) -> list[str]:
    """Write a figure to a file, if it can be drawn.

    Args:
        draw: Draws it.
        path: Where to.

    Returns:
        A note with the reason if it was left out.
    """
    try:
        figure = draw()
    except ConfigurationError as error:
        return [f"{path.name} was left out. {error}"]
    figure.savefig(path, dpi=120)
    return []

"""Choosing among named things, with help for the mistyped name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from lightning_prune.errors import ConfigurationError

_MOST = 12
"""Most names that a message lists."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ConfigurationError:
    """The error to raise for a name that is not among the known ones.

    Args:
        kind: What the name should have named, for example ``"criterion"``.
        name: What was given.
        known: Every name that would have worked.

    Returns:
        An error that lists the known names and suggests the nearest one.

    Example:
        >>> print(unknown_name("criterion", "talor", ["l1", "taylor"]))
        unknown criterion 'talor': did you mean 'taylor'? Known: 'l1', 'taylor'.
    """
    by_lower = {known_name.lower(): known_name for known_name in known}
    close = [by_lower[found] for found in difflib.get_close_matches(str(name).lower(), by_lower, n=_MOST, cutoff=0.5)]
    hint = f" did you mean {close[0]!r}?" if close else ""
    if len(by_lower) <= _MOST:
        listed = f" Known: {', '.join(map(repr, by_lower.values()))}."
    else:
        shown = close[1:] or list(by_lower.values())[:_MOST]
        listed = f" Among the {len(by_lower)} known: {', '.join(map(repr, shown))}."
    return ConfigurationError(f"unknown {kind} {name!r}:{hint}{listed}")

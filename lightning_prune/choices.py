"""Choosing among named things, with help for the mistyped name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from lightning_prune.errors import ConfigurationError


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
    names = list(known)
    nearest = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    hint = f" did you mean {nearest[0]!r}?" if nearest else ""
    return ConfigurationError(f"unknown {kind} {name!r}:{hint} Known: {', '.join(map(repr, names))}.")

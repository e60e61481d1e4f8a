"""Checking arguments: names among known ones, with help for the mistyped, and numbers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from lightning_prune.errors import ConfigurationError

Thing = TypeVar("Thing")
_MOST = 12
"""Most names that a message lists."""
_SYNONYMS = {"flops": "macs", "filters": "channels", "magnitude": "l2"}
"""What others call the same, and no spelling resembles."""


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
    word = str(name).lower()
    similar = [w for w in (_SYNONYMS.get(word),) if w in by_lower]
    similar += difflib.get_close_matches(word, by_lower.keys() - set(similar), n=_MOST, cutoff=0.5)
    close = [by_lower[found] for found in similar]
    hint = f" did you mean {close[0]!r}?" if close else ""
    if len(by_lower) <= _MOST:
        listed = f" Known: {', '.join(map(repr, by_lower.values()))}."
    else:
        shown = close[1:] or list(by_lower.values())[:_MOST]
        listed = f" Among the {len(by_lower)} known: {', '.join(map(repr, shown))}."
    return ConfigurationError(f"unknown {kind} {name!r}:{hint}{listed}")


def check_at_least(least: float, **values: float | None) -> None:
    """Refuse numbers that are too small, or not finite.

    Args:
        least: What each must be at least.
        **values: The numbers by the name of their argument; None is left to its default.

    Raises:
        ConfigurationError: For the first that is not.

    Example:
        >>> check_at_least(1, rounds=3, batches=None)
    """
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ConfigurationError(f"{name} must be a finite number of at least {least:g}, but is {value}.")


def chosen(kind: str, choice: object, base: type[Any], known: Mapping[str, Callable[[], Thing]]) -> Thing:
    """The thing of a name with its defaults, or the given thing itself.

    Args:
        kind: What is chosen, for example ``"criterion"``.
        choice: A name, or an instance of ``base``.
        base: The class of such things.
        known: Makes the thing of each known name.

    Raises:
        ConfigurationError: If there is no such name, or it is neither a name nor such a thing.

    Example:
        >>> chosen("number", "two", int, {"one": lambda: 1, "two": lambda: 2})
        2
    """
    if isinstance(choice, base):
        return choice  # type: ignore[no-any-return]
    if isinstance(choice, type) and issubclass(choice, base):
        name = choice.__name__
        raise ConfigurationError(f"the {kind} is the class {name}: give an instance, such as {name}().")
    if isinstance(choice, (int, float)):
        raise ConfigurationError(
            f"unknown {kind} {choice!r}: give a name or a {base.__name__}. If the number is for another argument, name "
            f"that, as in remove={choice!r}."
        )
    if not isinstance(choice, str) or choice not in known:
        raise unknown_name(kind, choice, known)
    return known[choice]()

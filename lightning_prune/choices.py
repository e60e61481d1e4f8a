"""Checking arguments: names among known ones, with help for the mistyped, and numbers."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from lightning_prune.errors import ConfigurationError

Thing = TypeVar("Thing")
_MOST = 12
"""Most names that a message lists."""
_SYNONYMS = {"flops": "macs", "filters": "channels", "magnitude": "l2", "l1": "magnitude", "l2": "magnitude"}
"""What others call the same, and no spelling resembles."""


def nearest_names(name: object, known: Iterable[str]) -> list[str]:
    """The known names that a name may have been meant for, nearest first.

    Args:
        name: What was given.
        known: Every name that would have worked.

    Example:
        >>> nearest_names("flops", ["channels", "params", "macs"])
        ['macs']
    """
    by_lower = {known_name.lower(): known_name for known_name in known}
    word = str(name).lower()
    similar = [w for w in (_SYNONYMS.get(word),) if w in by_lower]
    similar += difflib.get_close_matches(word, by_lower.keys() - set(similar), n=_MOST, cutoff=0.5)
    return [by_lower[found] for found in similar]


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
    every = list(dict.fromkeys(known))
    close = nearest_names(name, every)
    hint = f" did you mean {close[0]!r}?" if close else ""
    if len(every) <= _MOST:
        listed = f" Known: {', '.join(map(repr, every))}."
    else:
        shown = close[1:] or every[:_MOST]
        listed = f" Among the {len(every)} known: {', '.join(map(repr, shown))}."
    return ConfigurationError(f"unknown {kind} {name!r}:{hint}{listed}")


def is_number(value: object, whole: bool = False) -> bool:
    """Whether something is a real number, as numpy's are too; a truth value is none, though Python counts it as one.

    Args:
        value: Anything.
        whole: Whether it must be of a whole number's type.

    Example:
        >>> is_number(0.5), is_number("0.5"), is_number(True), is_number(8.0, whole=True)
        (True, False, False, False)
    """
    return isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)


def is_pair(value: object) -> bool:
    """Whether something is a tuple or list of two numbers.

    Example:
        >>> is_pair((1, 0.5)), is_pair(0.5)
        (True, False)
    """
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(map(is_number, value))


def check_at_least(least: float, *, whole: bool = False, optional: bool = False, **values: object) -> None:
    """Refuse what is no number, too small, or not finite.

    Args:
        least: What each must be at least.
        whole: Whether each must be a whole number.
        optional: Whether None is allowed, for what has a default elsewhere.
        **values: The numbers by the name of their argument.

    Raises:
        ConfigurationError: For the first that is not.

    Example:
        >>> check_at_least(1, whole=True, optional=True, rounds=3, batches=None)
    """
    kind = "whole" if whole else "finite"
    for name, value in values.items():
        if optional and value is None:
            continue
        number: Any = value if is_number(value, whole) else math.nan
        if not least <= number < math.inf:
            raise ConfigurationError(f"{name} must be a {kind} number of at least {least:g}, but is {value!r}.")


def check_switches(**values: object) -> None:
    """Refuse what is neither True nor False.

    Args:
        **values: The switches by the name of their argument.

    Raises:
        ConfigurationError: For the first that is not.

    Example:
        >>> check_switches(verify=True)
    """
    for name, value in values.items():
        if value not in (True, False):
            raise ConfigurationError(f"{name} must be True or False, but is {value!r}.")


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
    if not isinstance(choice, str):
        raise ConfigurationError(
            f"unknown {kind}: {type(choice).__name__} is none. Give a {base.__name__}, or one of the names "
            f"{', '.join(map(repr, known))}."
        )
    if choice not in known:
        raise unknown_name(kind, choice, known)
    return known[choice]()

"""Which weights a user means."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Union

from torch import nn

from lightning_prune.choices import unknown_name
from lightning_prune.compiled import uncompiled_name
from lightning_prune.errors import ConfigurationError

Patterns = Union[Sequence[str], str]  # noqa: UP007 - jsonargparse takes what is no list as one pattern
"""Patterns of names, or a single one."""


def as_patterns(argument: str, given: Patterns | None) -> Sequence[str] | None:
    """A list of patterns, where a single one stands for a list of it.

    Args:
        argument: What to call it in the error.
        given: The patterns, one of them, or None.

    Raises:
        ConfigurationError: If it is none of these.

    Example:
        >>> as_patterns("include", "layer1.*"), as_patterns("include", ["a", "b"]), as_patterns("include", None)
        (['layer1.*'], ['a', 'b'], None)
    """
    if given is None:
        return None
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Collection) or not all(isinstance(pattern, str) for pattern in given):
        raise ConfigurationError(
            f"{argument} must be a pattern of names or a list of patterns, such as ['layer1.*'], but is {given!r}."
        )
    return given


def maskable_names(module: nn.Module) -> list[str]:
    """Parameters of two or more dimensions; biases and the scales of norms are not worth a mask."""
    return [name for name, p in module.named_parameters() if p.dim() > 1 and p.is_floating_point()]


def chosen_names(names: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str] | None) -> list[str]:
    """The names that a user lets in and does not keep out.

    Args:
        names: Full names of parameters.
        include: Patterns (as in ``fnmatch``) of names of parameters or of their modules; None lets all in.
        exclude: Patterns of those that are kept out.

    Example:
        >>> chosen_names(["conv.weight", "head.weight"], None, ["head"])
        ['conv.weight']
    """
    inside = [name for name in names if include is None or _matches(name, include)]
    return [name for name in inside if not _matches(name, exclude or ())]


def check_names(names: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str] | None) -> None:
    """Refuse patterns that match nothing, or that leave nothing.

    Raises:
        ConfigurationError: If there are such; names what there is.
    """
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(_matches(name, [pattern]) for name in names):
                raise unknown_name(f"parameter in {option}", pattern, names)
    if not chosen_names(names, include, exclude):
        raise ConfigurationError(
            f"include={include} and exclude={exclude} leave no weight to prune; there are: {', '.join(names)}."
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    path = uncompiled_name(name)
    return any(fnmatchcase(candidate, p) for p in patterns for candidate in (path, path.rpartition(".")[0]))

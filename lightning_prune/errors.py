"""The errors this library raises on purpose: each says what was wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class PruneError(RuntimeError):
    """Base of every error raised on purpose by this library."""


class TraceError(PruneError):
    """The network could not be run, or nothing could be learnt from running it."""


class ShrinkError(PruneError):
    """A resize could not be proven exact; the network was left as it was.

    Attributes:
        groups: The channel groups that are to blame, as far as that is known.
    """

    def __init__(self, message: str, groups: Iterable[str] = ()) -> None:
        """See the class."""
        super().__init__(message)
        self.groups = tuple(groups)


class BudgetError(PruneError, ValueError):
    """The requested budget cannot be reached with the given limits."""


class ConfigurationError(PruneError, ValueError):
    """An argument is wrong or cannot work in this run."""

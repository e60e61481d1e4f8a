"""The errors this library raises on purpose: each says what was wrong, where, and what to do."""


class PruneError(RuntimeError):
    """Base of every error raised on purpose by this library."""


class TraceError(PruneError):
    """The network could not be run, or nothing could be learnt from running it."""


class ShrinkError(PruneError):
    """A resize could not be proven exact; the network was left as it was."""


class BudgetError(PruneError, ValueError):
    """The requested budget cannot be reached with the given limits."""


class ConfigurationError(PruneError, ValueError):
    """An argument is wrong or cannot work in this run."""

"""How much a run executes."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.errors import PruneError


class TooManyOperatorsError(PruneError):
    """A run has executed more operators than it may."""


class OperatorCount(TorchDispatchMode):
    """Counts the operators that are executed inside.

    Args:
        most: How many may be; None for any number.

    Raises:
        TooManyOperatorsError: By the operator that is one too many.

    Attributes:
        total: How many there were so far.

    Example:
        >>> import torch
        >>> with OperatorCount() as count:
        ...     _ = torch.ones(2) + torch.ones(2)
        >>> count.total
        3
    """

    def __init__(self, most: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = most
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and run the operator."""
        self.total += 1
        if self.most is not None and self.total > self.most:
            raise TooManyOperatorsError(f"more than {self.most} operators were executed")
        return func(*args, **(kwargs or {}))

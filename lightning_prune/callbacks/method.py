"""What a pruning method decides; everything else is done for it."""

# ruff: noqa: B027 - hooks that do nothing unless a method overrides them are the point of this class

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.callbacks.network import Network
from lightning_prune.schedules import Position
from lightning_prune.surgery.resize import Cut


class PruningMethod(ABC):
    """What a pruning method gives to the lifecycle of :class:`~lightning_prune.PruningCallback`.

    A method does its rounds in :meth:`carry_out`; everything else has a default.

    Attributes:
        remove: Fraction to remove in all, in [0, 1).
    """

    remove: float
    provenance: str = "published"
    """Whether the algorithm is ``"published"``, or a ``"reconstruction"`` from what little is known of its source."""
    _record: dict[str, Any]

    rewind_to: int | None = None
    """Optimizer step to which optimizers and schedules go back after each round; None lets them go on."""
    always_finishes: bool = False
    """Whether the last round takes place when the fit ends, even if that is before the schedule says so."""

    @abstractmethod
    def carry_out(self, network: Network, level: float) -> None:
        """Choose what goes in this round, and remove or mask it, in all processes alike.

        Args:
            network: The network as it is.
            level: Share of the budget that must be reached by this round, in (0, 1].
        """

    @abstractmethod
    def removed(self, network: Network) -> float:
        """Fraction removed so far, in the measure of the budget."""

    def can_prune(self, network: Network) -> bool:
        """Whether there is anything in the network that may go."""
        return bool(network.graph.groups)

    def before_the_end(self, network: Network) -> None:
        """Last changes of the masks before what is masked is removed; only called with ``shrink="end"``."""

    def follow(self, keep: Mapping[str, Tensor], cuts: Mapping[str, Sequence[Cut]]) -> None:
        """Called after units were removed physically.

        Args:
            keep: Bool masks of the units that were kept, by group name.
            cuts: What was cut, by full tensor name.
        """

    def prepare(self, network: Network) -> None:
        """Look at the network once before training; raise if the budget cannot work on it."""

    def check_length(self, length: Position) -> None:
        """See whether the method fits into the fit; called before each fit in which a round is still to come.

        Args:
            length: Length of the fit; ``inf`` where no end is set or it is not known.

        Raises:
            ConfigurationError: If it does not.
        """

    def resume(self, network: Network) -> None:
        """Get ready for training, be it at its start or after a stop; called once in each fit, after ``prepare``."""

    @property
    def acts_at_steps(self) -> bool:
        """Whether it matters to the method that it is called before and after the steps of optimizers."""
        kind = type(self)
        return (
            kind.before_masking is not PruningMethod.before_masking
            or kind.before_step is not PruningMethod.before_step
            or kind.after_step is not PruningMethod.after_step
        )

    def before_batch(self, network: Network, position: Position) -> None:
        """Called before each batch of training, after a round that is due.

        Args:
            network: The network as it is.
            position: How far the fit has come.
        """

    def before_masking(self, network: Network, optimizer: Optimizer) -> None:
        """Called before each step of an optimizer, with the gradients of what is off still there."""

    def before_step(self, network: Network, optimizer: Optimizer) -> None:
        """Called before each step of an optimizer, with gradients there and those of what is off zeroed."""

    def after_step(self, network: Network, optimizer: Optimizer) -> None:
        """Called after each step of an optimizer, with what is off zeroed; not if half precision has left it out.

        A step that Lightning does not know of was not announced by :meth:`before_step`; of an optimizer that it does
        not know, the end of a step is not told either.
        """

    @property
    def goal(self) -> float:
        """Fraction that should be gone in the end, for the report."""
        return self.remove

    def notes(self, network: Network) -> list[str]:
        """Remarks for the report, in whole clauses."""
        return []

    @property
    def learnt(self) -> dict[str, Any]:
        """What the method has learnt and a resumed fit must know: tensors and plain types, saved in checkpoints.

        It lives on between fits of the same module, and is empty at the start of the first.
        """
        found: dict[str, Any] = self._record.setdefault("learnt", {})
        return found

"""Steps of optimizers: which one is announced, and whether half precision leaves it out."""

from __future__ import annotations

from lightning import Trainer
from torch.optim import Optimizer

from lightning_prune.callbacks.support import steps_with_plain_gradients


class Steps:
    """Follows the steps of a fit from their announcement to their end.

    Attributes:
        announced: The optimizer whose step was announced and has not come yet.
        seen: Whether any optimizer has stepped in this batch.
    """

    def __init__(self) -> None:
        self.announced: Optimizer | None = None
        self.seen = False
        self._left_out: Optimizer | None = None
        self._went_backward = False

    def begin_batch(self) -> None:
        """Take note that a batch begins, which has given no loss so far."""
        self._went_backward = self.seen = False

    def go_backward(self) -> None:
        """Take note that the batch has given a loss."""
        self._went_backward = True

    def announce(self, trainer: Trainer, optimizer: Optimizer) -> bool:
        """Take note of a step that is to come; whether it will move anything. Its gradients are plain from now on."""
        comes = steps_with_plain_gradients(trainer, optimizer, self._went_backward)
        if comes:
            self.announced = optimizer
        self._left_out = None if comes else optimizer
        return comes

    def end(self, optimizer: Optimizer) -> tuple[bool, bool]:
        """Take note that an optimizer was called; whether that was announced, and whether it was to move nothing."""
        was = self.announced is optimizer, self._left_out is optimizer
        self.seen = True
        if was[0]:
            self.announced = None
        if was[1]:
            self._left_out = None
        return was

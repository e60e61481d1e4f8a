"""The fit's callbacks that look for its best moment, which a round makes another network of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_prune.choices import unknown_name

Monitors = Literal["keep", "reset", "wait"]


class Monitoring:
    """What becomes of them in a fit whose network changes.

    Args:
        choice: Whether they keep what they have seen, forget it at each round, or wait for the last one.

    Raises:
        ConfigurationError: If there is no such choice.
    """

    def __init__(self, choice: Monitors) -> None:
        if choice not in ("keep", "reset", "wait"):
            raise unknown_name("choice for monitors", choice, ["keep", "reset", "wait"])
        self._choice = choice
        self._at_last_cut: dict[str, str] = {}

    def begin(self) -> None:
        """Forget the last fit."""
        self._at_last_cut = {}

    def hold_back(self, trainer: Trainer, level: float) -> None:
        """Keep the fit from being stopped before the last round, if that was asked for."""
        if self._choice == "wait" and level < 1:
            _wait_anew(trainer)

    def follow_round(self, trainer: Trainer, level: float, removed: bool) -> None:
        """Let them know of a round.

        Args:
            trainer: The trainer.
            level: Share of the budget that is reached by now.
            removed: Whether anything went.
        """
        if self._choice == "reset" or (self._choice == "wait" and level >= 1):
            _forget_best(trainer)
        if removed:
            self._at_last_cut = _best_paths(trainer)

    def outdated(self, trainer: Trainer) -> Iterator[tuple[str, str]]:
        """What a checkpoint is the best by, and its path, for those from before the last cut."""
        for monitor, path in _best_paths(trainer).items():
            if path and path == self._at_last_cut.get(monitor):
                yield monitor, path


def _wait_anew(trainer: Trainer) -> None:
    """Let the callbacks that stop early forget the best that they have seen, and wait from now on."""
    for callback in trainer.early_stopping_callbacks:
        if isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            worst = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
            callback.best_score = worst if callback.best_score is None else worst.to(callback.best_score.device)


def _forget_best(trainer: Trainer) -> None:
    """Let early stopping wait anew, and checkpoints of the best look for another one; files stay where they are."""
    _wait_anew(trainer)
    for callback in _keepers_of_the_best(trainer):
        callback.best_k_models, callback.best_model_score, callback.current_score = {}, None, None
        callback.best_model_path = callback.kth_best_model_path = ""


def _best_paths(trainer: Trainer) -> dict[str, str]:
    """The file of the best so far, by what it is the best of."""
    return {str(callback.monitor): callback.best_model_path for callback in _keepers_of_the_best(trainer)}


def _keepers_of_the_best(trainer: Trainer) -> list[ModelCheckpoint]:
    found = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return [callback for callback in found if callback.monitor is not None]

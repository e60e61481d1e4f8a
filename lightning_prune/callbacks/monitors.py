"""The fit's callbacks that look for its best moment, which a round makes another network of."""

from __future__ import annotations

from typing import Literal

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

Monitors = Literal["keep", "reset", "wait"]


def wait_anew(trainer: Trainer) -> None:
    """Let the callbacks that stop early forget the best that they have seen, and wait from now on."""
    for callback in trainer.early_stopping_callbacks:
        if isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            worst = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
            callback.best_score = worst if callback.best_score is None else worst.to(callback.best_score.device)


def forget_best(trainer: Trainer) -> None:
    """Let early stopping wait anew, and checkpoints of the best look for another one; files stay where they are."""
    wait_anew(trainer)
    for callback in _keepers_of_the_best(trainer):
        callback.best_k_models, callback.best_model_score, callback.current_score = {}, None, None
        callback.best_model_path = callback.kth_best_model_path = ""


def best_paths(trainer: Trainer) -> dict[str, str]:
    """The file of the best so far, by what it is the best of."""
    return {str(callback.monitor): callback.best_model_path for callback in _keepers_of_the_best(trainer)}


def _keepers_of_the_best(trainer: Trainer) -> list[ModelCheckpoint]:
    found = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return [callback for callback in found if callback.monitor is not None]

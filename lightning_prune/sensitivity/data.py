"""Validation batches as Lightning hands them to a module."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.program import copied


class _Collector(Callback):
    """Keeps copies of all batches of the first validation loader."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == 0:
            self.batches.append(copied(batch))


def validation_batches(model: LightningModule, data: LightningDataModule | None, count: int) -> list[Any]:
    """The first batches of the first validation loader, on the CPU.

    The module is validated on them once, so that its data are prepared and handed over as Lightning does it.

    Args:
        model: The module, which stays attached to the Trainer that validated it.
        data: Where they come from; None for the module's own ``val_dataloader``.
        count: How many at most, at least 1.

    Raises:
        ConfigurationError: If there are none, or the module cannot be validated.
    """
    if count < 1:
        raise ConfigurationError(f"the number of validation batches must be at least 1, but is {count}.")
    collector = _Collector()
    trainer = Trainer(
        accelerator="cpu", devices=1, limit_val_batches=count, callbacks=[collector], inference_mode=False,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    name = type(model).__name__
    try:
        trainer.validate(model, data, verbose=False)
    except MisconfigurationException as error:
        raise ConfigurationError(
            f"{name} cannot be validated: {str(error).rstrip('.')}. It needs a validation_step, and a val_dataloader "
            "of its own or of a data module, whose import path --data gives."
        ) from error
    if not collector.batches:
        raise ConfigurationError(f"the validation data of {type(data or model).__name__} has no batch.")
    return collector.batches

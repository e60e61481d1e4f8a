"""Real training batches that are not taken from the loader in use."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from lightning_prune.errors import TraceError
from lightning_prune.graph.observation import unobserved
from lightning_prune.graph.program import seed_everywhere

_ALL_SAMPLES = (SequentialSampler, RandomSampler, DistributedSampler)
"""Samplers that leave nothing out, in whatever order; exact classes, as one that is derived may."""


class NoBatchError(TraceError):
    """There is no real batch that could be had without touching the loader in use."""


def fresh_batches(trainer: Trainer, pl_module: LightningModule, count: int, seed: int) -> Iterator[Any]:
    """Shuffled training batches of new loaders over the data of the training loaders, on the right device.

    Args:
        trainer: The Trainer in use.
        pl_module: Its module.
        count: How many at most; there are no more than one epoch has.
        seed: Seed of the shuffling.

    Raises:
        NoBatchError: If there is no training loader, or one that only an iteration could read.
    """
    yield from _prepared(trainer, pl_module, CombinedLoader(*_training_loaders(trainer, pl_module)), count, seed)


def validation_batch(trainer: Trainer, pl_module: LightningModule, seed: int) -> Any:
    """One shuffled batch of a new loader over the data of the first validation loader, on the right device.

    Args:
        trainer: The Trainer in use.
        pl_module: Its module.
        seed: Seed of the shuffling.

    Raises:
        NoBatchError: If there is none, or one that only an iteration could read.
    """
    loaders: Any = trainer.val_dataloaders
    if loaders is None and is_overridden("val_dataloader", source := _source_of_data(trainer, pl_module)):
        loaders = source.val_dataloader()
    if loaders is None:
        raise NoBatchError("the Trainer has no validation loader")
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "sequential")
    for batch in _prepared(trainer, pl_module, CombinedLoader(combined.iterables, combined._mode), 1, seed):
        return batch
    raise NoBatchError("the validation loader is empty")


def _prepared(
    trainer: Trainer, pl_module: LightningModule, combined: CombinedLoader, count: int, seed: int
) -> Iterator[Any]:
    combined.flattened = [_rebuilt(loader, count, seed) for loader in combined.flattened]
    for batch, _, _ in islice(combined, count):
        converted = trainer.precision_plugin.convert_input(batch)
        prepared = pl_module._on_before_batch_transfer(converted, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(prepared, dataloader_idx=0)


def _training_loaders(trainer: Trainer, pl_module: LightningModule) -> tuple[Any, Any]:
    """The training loaders in the user's own arrangement, and how Lightning combines them."""
    loaders: Any = trainer.train_dataloader
    mode = getattr(getattr(trainer.fit_loop, "_combined_loader", None), "_mode", None)
    if loaders is None:
        try:
            loaders = _source_of_data(trainer, pl_module).train_dataloader()
        except MisconfigurationException as error:
            raise NoBatchError("the Trainer has no training loader yet") from error
    if isinstance(loaders, CombinedLoader):
        loaders, mode = loaders.iterables, loaders._mode
    return loaders, mode or "max_size_cycle"


def _source_of_data(trainer: Trainer, pl_module: LightningModule) -> Any:
    return pl_module if trainer.datamodule is None else trainer.datamodule  # type: ignore[attr-defined]


def _rebuilt(loader: Any, count: int, seed: int) -> DataLoader[Any]:
    if not isinstance(loader, DataLoader):
        raise NoBatchError(f"the training loader is a {type(loader).__name__}, and reading it would move its position")
    if isinstance(loader.dataset, IterableDataset):
        raise NoBatchError(
            f"the training data {type(loader.dataset).__name__} is iterable, and reading it would move its position"
        )
    shared = {id(loader.dataset): loader.dataset}
    if loader.batch_size is None and loader.batch_sampler is not None:
        # A batch sampler of the user's own knows which samples may meet; its copy shares the data.
        sampler = deepcopy(loader.batch_sampler, shared)
        return DataLoader(loader.dataset, batch_sampler=sampler, collate_fn=loader.collate_fn)
    every = type(loader.sampler) in _ALL_SAMPLES
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        shuffle=every,
        sampler=None if every else _drawn(deepcopy(loader.sampler, shared), count * (loader.batch_size or 1), seed),
        generator=torch.Generator().manual_seed(seed),
        drop_last=loader.drop_last,
        collate_fn=loader.collate_fn,
    )


def _drawn(sampler: Iterable[Any], count: int, seed: int) -> list[Any]:
    """The first samples of a sampler of the user's own, which knows which there are: often not those held out."""
    with unobserved(), isolate_rng():
        seed_everywhere(seed)
        if hasattr(sampler, "generator"):
            sampler.generator = torch.Generator().manual_seed(seed)
        return list(islice(sampler, min(count, sys.maxsize)))

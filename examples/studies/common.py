"""What the studies share: a quiet fit, what it cost, and floors; with the data, the nets and the tables."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from examples.studies.data import HELD_OUT, Data, Images, batches, load
from examples.studies.nets import SMALL, TASKS
from examples.studies.results import (
    Cells,
    add_precision,
    arguments,
    fit_arguments,
    grid,
    made_by,
    paired_table,
    publish,
    results,
)
from lightning_prune import Criterion, Norm, PruningCallback, WeightCriterion

__all__ = [
    "HELD_OUT", "SMALL", "TASKS", "Cells", "Data", "Images", "add_precision", "arguments", "batches", "fit_arguments",
    "grid", "load", "made_by", "paired_table", "publish", "results",
]  # fmt: skip

# Training ------------------------------------------------------------------------------------------------------------


class Classifier(L.LightningModule):
    """Trains a net by Adam with a cosine schedule over the fit."""

    def __init__(self, net: nn.Module, rate: float) -> None:
        super().__init__()
        self.net, self.rate = net, rate

    def forward(self, images: Tensor) -> Any:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.rate, fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fresh(task: str, seed: int, rate: float, kind: type[Classifier] = Classifier) -> Classifier:
    """The net at its initialisation, the same for all methods of a seed, as are batches after it."""
    L.seed_everything(seed, verbose=False)
    return kind(TASKS[task].net(), rate).to(memory_format=torch.channels_last)  # much faster where channels are few


def fit(
    module: L.LightningModule, part: Images, epochs: int, *callbacks: L.Callback, precision: Any = "32-true"
) -> None:
    """Train without a word and without files."""
    with quiet():
        trainer = L.Trainer(
            max_epochs=epochs, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, precision=precision,
        )  # fmt: skip
        trainer.fit(module, batches(part))


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor what Lightning tells."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def trained(
    module: Classifier,
    task: str,
    pruning: PruningCallback | None,
    options: Any,
    *callbacks: L.Callback,
    epochs: int | None = None,
) -> dict[str, Any]:
    """Train with a pruning callback, if any, and measure what came of it and what it cost."""
    data, spent = TASKS[task].load(options.data_dir, options.train), Spent()
    epochs, precision = (epochs or options.epochs) * TASKS[task].passes, getattr(options, "precision", "32-true")
    start, start_of_process = time.monotonic(), time.process_time()
    fit(module, data.train, epochs, *([pruning] if pruning else []), *callbacks, spent, precision=precision)
    seconds, of_process = time.monotonic() - start, time.process_time() - start_of_process
    return {
        "accuracy": accuracy(module, data.test if options.test else data.validation),
        "reached": pruning.report.reached if pruning else 0.0,
        "training GMACs": spent.macs / 1e9,
        "seconds": seconds,
        "CPU seconds": of_process,
    }


@torch.no_grad()
def accuracy(module: nn.Module, part: Images) -> float:
    """Percentage of the images that are classified right."""
    training = module.training
    module.eval()
    device = next(module.parameters()).device
    right = 0
    for images, labels in batches(part, 1000, shuffle=False):
        right += int((module(images.to(device)).argmax(1).cpu() == labels).sum())
    module.train(training)
    return 100 * right / len(part)


class Spent(L.Callback):
    """Multiply-accumulates of all training steps: forward and backward, three times those of a forward.

    What a method does besides, such as running the network to score channels, shows in the seconds alone.

    Args:
        forwards: How many forwards a step costs.
    """

    def __init__(self, forwards: float = 3.0) -> None:
        self.forwards, self.macs = forwards, 0.0
        self._known: dict[tuple[torch.Size, ...], float] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        widths = tuple(parameter.shape for parameter in pl_module.parameters())
        if widths not in self._known:
            self._known[widths] = macs(pl_module, batch[0][:1])
        self.macs += self.forwards * len(batch[0]) * self._known[widths]


@torch.no_grad()
def macs(module: nn.Module, image: Tensor) -> float:
    """Multiply-accumulates of a forward, as torch counts them."""
    training = module.training
    module.eval()
    with FlopCounterMode(display=False) as counter:
        module(image)
    module.train(training)
    return float(counter.get_total_flops()) / 2


# Floors --------------------------------------------------------------------------------------------------------------


class Shuffled(Criterion):
    """The scores of l2 in random order within each group: its ratios, without its choice."""

    def score(self, group: Any, tensors: Any, gradients: Any, generator: torch.Generator) -> Tensor:
        return in_random_order(Norm(2).score(group, tensors, gradients, generator), generator)


class ShuffledWeights(WeightCriterion):
    """The magnitudes of each tensor in random order: the ratios of magnitude pruning, without its choice."""

    def score(self, weights: Any, source: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: in_random_order(weight.abs(), generator) for name, weight in weights.items()}


def in_random_order(values: Tensor, generator: torch.Generator) -> Tensor:
    return values.flatten()[torch.randperm(values.numel(), generator=generator)].view(values.shape)

"""The demo: the main job from beginning to end, on data that ships with a dependency."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor

from lightning_prune.callbacks.channels import ChannelPruning
from lightning_prune.checkpoint import load_pruned
from lightning_prune.errors import ConfigurationError
from lightning_prune.lightning_cli import PruneCLI

RECIPE = Path(__file__).parent / "recipes" / "digits.yaml"


def run_demo(out: str = "prune-demo", epochs: int | None = None, seed: int = 0) -> None:
    """Train a small residual network on digits, once as it is and once pruned in the same fit, and compare.

    Args:
        out: Folder for the report, the figure and the checkpoint.
        epochs: Length of both fits; default: that of the recipe.
        seed: Seed of both fits.
    """
    _quiet()
    words = ["--config", str(RECIPE), "--seed_everything", str(seed)]
    words += ["--trainer.max_epochs", str(epochs)] if epochs is not None else []
    print(f"The dense network, {RECIPE.name} without its callback:")
    dense = PruneCLI(words, run=False)
    dense.trainer.callbacks = [c for c in _callbacks(dense.trainer) if not isinstance(c, ChannelPruning)]  # type: ignore[attr-defined]
    dense_accuracy = _train_and_test(dense.trainer, dense.model, dense.datamodule, seed)
    print("\nThe same fit with one callback added, ChannelPruning:")
    pruned = PruneCLI(words, run=False)
    callback = next(c for c in _callbacks(pruned.trainer) if isinstance(c, ChannelPruning))
    callback.directory = out
    accuracy = _train_and_test(pruned.trainer, pruned.model, pruned.datamodule, seed)
    for done in callback.report.history:
        print(f"  epoch {done.epoch}: {done.removed:.1%} of the {callback.of} gone")
    print(f"\n{callback.report.table()}")
    print(f"\ntest accuracy: dense {dense_accuracy:.2%}, pruned {accuracy:.2%}")
    _load_again(pruned.model, pruned.datamodule, Path(out) / "pruned.ckpt")
    print(f"\nwritten to {out}/: report.txt, report.csv, report.json, widths.png, pruned.ckpt")
    print(f"the same as a config: lightning-prune fit --config {RECIPE}")


def _quiet() -> None:
    """Leave the screen to the demo: none of Lightning's advice on hardware and loaders."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*does not have many workers.*", ".*LeafSpec.*"):
        warnings.filterwarnings("ignore", message=message)


def _callbacks(trainer: Trainer) -> list[Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _train_and_test(trainer: Trainer, model: LightningModule, data: LightningDataModule, seed: int) -> float:
    seed_everything(seed, verbose=False)
    start = time.perf_counter()
    trainer.fit(model, data)
    print(f"  trained for {trainer.current_epoch} epochs in {time.perf_counter() - start:.0f} s")
    result = trainer.test(model, data, verbose=False)
    return float(result[0]["test_accuracy"])


def _load_again(model: LightningModule, data: LightningDataModule, path: Path) -> None:
    """Load the checkpoint into a new module, without callback or Trainer, and compare its predictions."""
    again = load_pruned(path, type(model), map_location="cpu").eval()
    model.cpu().eval()
    images = torch.cat([batch[0] for batch in data.test_dataloader()])
    with torch.no_grad():
        expected, found = _scores(model, images), _scores(again, images)
    if not torch.equal(expected, found):
        raise ConfigurationError(f"{path} does not predict what the trained network predicts; please report this")
    print(f"{path} loaded without the callback: predicts the same on all {len(images)} test images")


def _scores(model: LightningModule, images: Tensor) -> Tensor:
    scores: Tensor = model(images)
    return scores

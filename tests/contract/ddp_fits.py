"""Run by two processes: fits a few rows under DDP and writes down what each process holds, to the folder given."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_prune import ChannelPruning, Linear, OneShot
from lightning_prune.probe import Probe
from tests.fits import BATCHES, Liveness, StiffNet, loader, parameters, small_net, trainer, widths

FITS = {
    "l1": {"criterion": "l1", "of": "macs", "schedule": OneShot(0, "step")},
    "random": {"criterion": "random", "of": "channels", "schedule": Linear(1, 5, 2, "step")},
    "taylor": {"criterion": "taylor", "of": "params", "schedule": Linear(0.3, 0.8, 0.2, "fraction"), "recalibrate": 1},
    "end": {"criterion": "taylor", "shrink": "end", "schedule": OneShot(1, "epoch")},
    "latency": {"criterion": "l2", "of": "latency", "schedule": OneShot(1, "epoch")},
    "stubborn": {"criterion": "random", "of": "channels", "schedule": OneShot(3, "step")},
    "accumulated": {"criterion": "random", "of": "channels", "schedule": OneShot(0.5, "epoch")},
    "static": {"criterion": "random", "of": "channels", "schedule": Linear(1, 5, 2, "step")},
    "stiff": {"criterion": "random", "of": "channels", "remove": 0.3, "schedule": OneShot(1, "epoch")},
    "unused": {"criterion": "l2", "of": "macs", "schedule": Linear(1, 5, 2, "step")},
}
REDUCERS = {"static": {"static_graph": True}, "unused": {"find_unused_parameters": True}}
RESUMED = ["random", "taylor", "end"]
STOPPED = BATCHES // 2 + 1  # in the middle of an epoch


class Observed(ChannelPruning):
    """Keeps the scores it computed."""

    def scores(self, network):
        self.seen_scores = super().scores(network)
        return self.seen_scores


class Stubborn(Observed):
    """Wants to keep other channels in each process."""

    def select(self, network, level):
        super().select(network, level)
        rank = network.module.global_rank
        return {name: torch.arange(group.width) % 2 == rank for name, group in network.graph.groups.items()}


class Diary(L.Callback):
    """Weights, optimizer state and masks of this process after every batch."""

    def __init__(self, pruning):
        self.pruning, self.pages = pruning, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.pages.append(
            {
                "weights": {name: value.clone() for name, value in pl_module.named_parameters()},
                "state": trainer.optimizers[0].state_dict()["state"],
                "masks": self.pruning._network.masks.state_dict(),
                "rounds": len(self.pruning._record["rounds"]),
            }
        )
        self.pages = torch.load(copied(self.pages), weights_only=True)


def copied(value):
    """A file in memory; what is read from it shares nothing with the fit."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def fit(name, *callbacks, seed=0, resume_from=None, **arguments):
    """One fit; returns the module, the callback, the diary and the Trainer."""
    pruning = (Stubborn if name == "stubborn" else Observed)(**FITS[name])
    diary, module = Diary(pruning), StiffNet(epoch=1, rank=1) if name == "stiff" else small_net(seed=seed)
    accumulate = 2 if name == "accumulated" else 1
    watch = [diary] if accumulate > 1 else [Liveness(), diary]
    used = trainer(pruning, *watch, *callbacks, epochs=2, accumulate_grad_batches=accumulate, **arguments)
    used.fit(module, loader(2 * BATCHES), ckpt_path=resume_from)
    return module, pruning, diary, used


def resumed(name, folder, **arguments):
    """What a fit ends with that was stopped in the middle of an epoch and taken up again by a fresh module."""
    saving = ModelCheckpoint(folder, filename=f"{name}-" + "{step}", every_n_train_steps=STOPPED, save_top_k=-1)
    fit(name, saving, enable_checkpointing=True, strategy="ddp", devices=2)
    file = Path(folder) / f"{name}-step={STOPPED}.ckpt"
    module, pruning, diary, _ = fit(name, seed=5, resume_from=file, strategy="ddp", devices=2)
    return {
        "pages": diary.pages,
        "widths": widths(module),
        "weights": module.state_dict(),
        "scores": pruning.seen_scores,
    }


def uneven_latency(probe):
    """Stands in for a measurement that comes out differently in each process."""
    return 1.0 if probe._trainer.global_rank else parameters(probe._module)


def main(folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    Probe.latency = uneven_latency
    for name in FITS:
        module, pruning, diary, used = fit(name, strategy=DDPStrategy(**REDUCERS.get(name, {})), devices=2)
        assert used.world_size == 2
        result = {"pages": diary.pages, "widths": widths(module), "weights": module.state_dict()}
        result["scores"] = pruning.seen_scores
        result["history"] = [list(entry) for entry in pruning.report.history]
        torch.save(result, Path(folder) / f"{name}-{used.global_rank}.pt")
        if name in RESUMED:
            torch.save(resumed(name, folder), Path(folder) / f"{name}-resumed-{used.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])

"""Run by two processes: one fit under DDP for every method, and what each process holds, to the folder given."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import lightning as L
import torch

from tests.contract.rows import ROWS
from tests.fits import BATCHES, Liveness, loader, small_net, trainer

METHODS = {row.method: row for row in reversed(ROWS)}.values()
"""The first row of each method."""


class Diary(L.Callback):
    """What this process holds after every batch."""

    def __init__(self, pruning):
        self.pruning, self.pages = pruning, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        held = {
            "weights": dict(pl_module.named_parameters()),
            "state": trainer.optimizers[0].state_dict()["state"],
            "masks": self.pruning._network.masks.state_dict(),
            "weight masks": self.pruning._network.weights.state_dict(),
            "learnt": self.pruning.learnt,
            "rounds": self.pruning._record["rounds"],
        }
        self.pages.append(copy.deepcopy(held))


def main(folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for row in METHODS:
        pruning = row.callback()
        diary, module = Diary(pruning), small_net()
        used = trainer(pruning, Liveness(row.trains), diary, strategy="ddp", devices=2)
        used.fit(module, loader(2 * BATCHES))
        assert used.world_size == 2
        result = {"pages": diary.pages, "reached": pruning.report.reached}
        torch.save(result, Path(folder) / f"{row.name}-{used.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])

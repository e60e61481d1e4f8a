"""From what values should a winning ticket start? Seven ways, with the same masks.

    python -m examples.studies.reinitialisations --data_dir DATA --work runs/reinitialisations --seeds 0 1 2 --test \\
        --out examples/results/reinitialisations.md

For each net, seed and sparsity a ticket is found by iterative magnitude pruning with rewinding to the initialisation
(`LotteryTicket`, or `ChannelLotteryTicket` for whole channels); 40 % of what is left goes in each round. Then the
ticket is trained from each reinitialisation of the *initial* weights, with the same batches in the same order; `keep`
goes on from the weights that the search ended with instead, and `random mask` is a random ticket of the same ratios per
layer, rewound. `steps to 95 %` is the number of optimizer steps until the accuracy on 5000 held-out images first
reaches 95 % of what the dense net reached in the end, looked at every `--look` steps; a run that never gets there
counts as its whole length. The learning rate is constant, so that all runs are alike up to the step of the look.

Defaults are modest: 20,000 images, for CIFAR-10 of half the size. For more, `--tasks conv-4 small-resnet --train 45000
--epochs 10`. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from examples.studies.common import (
    TASKS,
    Cells,
    Classifier,
    Data,
    Images,
    accuracy,
    arguments,
    fit,
    fresh,
    in_random_order,
    paired_table,
    publish,
)
from lightning_prune import (
    ChannelLotteryTicket,
    ChannelPruning,
    Criterion,
    LotteryTicket,
    OneShot,
    PruningCallback,
    WeightCriterion,
    WeightPruning,
)

REINITS = ["rewind", "random", "sign", "distribution", "magnitude", "sign+distribution", "keep"]
ORDER = ["dense", *REINITS, "random mask"]
SPARSITIES = {"weights": [0.8, 0.95, 0.98], "channels": [0.3, 0.5, 0.7]}
KEPT_IN_A_ROUND = 0.6


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["lenet-300-100", "cifar-conv"])
    parser.add_argument("--units", nargs="+", choices=SPARSITIES, default=list(SPARSITIES))
    parser.add_argument("--epochs", type=int, default=3, help="of each training")
    parser.add_argument("--rate", type=float, help="learning rate; default: that of the net")
    parser.add_argument("--look", type=int, default=20, help="steps between two looks at the accuracy")
    parser.set_defaults(seeds=[0, 1, 2], train=20_000)
    options = parser.parse_args()
    cells = Cells(options.work / "cells.jsonl")
    for task in options.tasks:
        data = TASKS[task].load(options.data_dir, options.train)
        for seed in options.seeds:
            study(task, seed, data, cells, options)
    rows = [row for row in cells if common(options).items() <= row.items()]
    rows = [row for row in rows if row["net"] in options.tasks and row["seed"] in options.seeds]
    rows = [row for row in rows if row["rate"] == rate(row["net"], options)]
    rows.sort(key=lambda row: (row["net"], row["units"], row["sparsity"], ORDER.index(row["method"])))
    table = paired_table(rows, ["net", "units", "sparsity"], "rewind", "accuracy", ["after 1 epoch", "steps to 95 %"])
    publish("Reinitialisations of tickets", __doc__, options, table)


def common(options: Any) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("epochs", "look", "train", "test")}


def rate(task: str, options: Any) -> float:
    return float(options.rate or TASKS[task].rate)


def study(task: str, seed: int, data: Data, cells: Cells, options: Any) -> None:
    def run(units: str, sparsity: float, method: str, found: dict[str, Any] | None, goal: float | None) -> None:
        key = {"net": task, "units": units, "sparsity": sparsity, "seed": seed, "method": method}
        key |= {"rate": rate(task, options)} | common(options)
        cells.run(key, lambda: trained(task, key, data, found, goal, options))

    for units in options.units:
        run(units, 0.0, "dense", None, None)
        goal = 0.95 * next(row["held out"] for row in cells if matches(row, task, units, seed, options))
        for sparsity in SPARSITIES[units]:
            found = ticket(task, units, sparsity, seed, data, options)
            for method in (*REINITS, "random mask"):
                run(units, sparsity, method, found, goal)


def matches(row: dict[str, Any], task: str, units: str, seed: int, options: Any) -> bool:
    dense = {"net": task, "units": units, "seed": seed, "method": "dense", "rate": rate(task, options)}
    dense |= common(options)
    return dense.items() <= row.items()


class Constant(Classifier):
    """Adam at a constant rate."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.rate, fused=True)


def ticket(task: str, units: str, sparsity: float, seed: int, data: Data, options: Any) -> dict[str, Any]:
    """The masks and weights that iterative magnitude pruning ends with, now or in an earlier run."""
    names = task, units, sparsity, seed, options.epochs, rate(task, options), options.train
    file: Path = options.work / f"{'-'.join(map(str, names))}.pt"
    if not file.exists():
        rounds = math.ceil(math.log(1 - sparsity) / math.log(KEPT_IN_A_ROUND))
        shared: dict[str, Any] = {"remove": sparsity, "rounds": rounds, "shrink": "never", "seed": seed}
        keeping = Keeping()
        callback = LotteryTicket(**shared) if units == "weights" else ChannelLotteryTicket(of="channels", **shared)
        module = fresh(task, seed, rate(task, options), Constant)
        fit(module, data.train, options.epochs * (rounds + 1), callback, keeping)
        torch.save({"masks": keeping.masks, "trained": module.state_dict()}, file)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


class Keeping(L.Callback):
    """The masks that a checkpoint of the end of the fit would hold."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        checkpoint: dict[str, Any] = {}
        pl_module.on_save_checkpoint(checkpoint)
        record = checkpoint["lightning_prune"]
        self.masks = record["weights"] or record["masks"]


class Given(WeightCriterion):
    """Keeps the weights of a mask."""

    def __init__(self, masks: dict[str, Tensor], shuffled: bool) -> None:
        self.masks, self.shuffled = masks, shuffled

    def score(self, weights: Any, source: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: moved(self.masks[name], self.shuffled, generator).float() for name in weights}


class GivenChannels(Criterion):
    """Keeps the channels of a mask."""

    normalised = False

    def __init__(self, masks: dict[str, Tensor], shuffled: bool) -> None:
        self.masks, self.shuffled = masks, shuffled

    def score(self, group: Any, tensors: Any, gradients: Any, generator: torch.Generator) -> Tensor:
        return moved(self.masks[group.name], self.shuffled, generator).float()


def moved(mask: Tensor, shuffled: bool, generator: torch.Generator) -> Tensor:
    return in_random_order(mask, generator) if shuffled else mask


def start(units: str, sparsity: float, method: str, masks: dict[str, Tensor], seed: int) -> PruningCallback:
    """Prunes to the ticket before the first step, and gives its weights new values."""
    random = method == "random mask"
    shared: dict[str, Any] = {"schedule": OneShot(0, "step"), "reinit": "rewind" if random else method, "seed": seed}
    if units == "weights":
        return WeightPruning(Given(masks, random), remove=sparsity, shrink="never", **shared)
    return ChannelPruning(GivenChannels(masks, random), remove=sparsity, of="channels", shrink="end", **shared)


def trained(
    task: str, key: dict[str, Any], data: Data, found: dict[str, Any] | None, goal: float | None, options: Any
) -> dict[str, Any]:
    """A training of a ticket, or, where none is given, of the dense net."""
    module = fresh(task, key["seed"], key["rate"], Constant)
    callbacks: list[L.Callback] = [looking := Looking(data.validation, goal, options.look)]
    if found is not None:
        callbacks.append(start(key["units"], key["sparsity"], key["method"], found["masks"], key["seed"]))
        if key["method"] == "keep":
            module.load_state_dict(found["trained"])
    L.seed_everything(key["seed"], verbose=False)
    fit(module, data.train, options.epochs, *callbacks)
    return {
        "accuracy": accuracy(module, data.test if options.test else data.validation),
        "held out": accuracy(module, data.validation),
        "after 1 epoch": looking.after_an_epoch,
        "steps to 95 %": looking.reached or looking.steps,
    }


class Looking(L.Callback):
    """When an accuracy is first reached."""

    def __init__(self, images: Images, goal: float | None, every: int) -> None:
        self.images, self.goal, self.every = images, goal, every
        self.reached: int | None = None
        self.steps, self.after_an_epoch = 0, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.steps = trainer.global_step
        if self.goal is None or self.reached is not None or self.steps % self.every:
            return
        if accuracy(pl_module, self.images) >= self.goal:
            self.reached = self.steps

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.after_an_epoch = accuracy(pl_module, self.images)


if __name__ == "__main__":
    main()

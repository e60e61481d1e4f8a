"""Which channels can go: criteria, penalties and searches of structured pruning side by side.

    python -m examples.studies.channels --data_dir DATA --work runs/channels --seeds 0 1 2 --test \\
        --out examples/results/channels.md

Every method has the same epochs, batches and learning rate schedule, and removes the same share of the
multiply-accumulates. `init`: pruned once before the first step. `post`: pruned once half way. `random` draws the
channels, as many of each group as `l2` takes at the same moment; `dense` is not pruned. Methods with rounds of their
own end them by seven tenths of the fit. `MACs` is what the epochs of a training cost, relative to those of the dense
one: a network that is small from the start trains cheaply. Seconds are those of a fit, with all that a method does for
its choice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from examples.studies.common import (
    TASKS,
    Cells,
    Classifier,
    Data,
    accuracy,
    arguments,
    fit,
    load,
    made_by,
    paired_table,
)
from lightning_prune import (
    BayesianPruning,
    ChannelPruning,
    Criterion,
    GReg,
    GrowAndPrune,
    Norm,
    OneShot,
    PruningCallback,
    RegularisedPruning,
    ScoringNetPruning,
    SearchAndTrain,
    SoftFilterPruning,
)

MOMENTS = {"init": OneShot(0, "step"), "post": OneShot(0.5)}
CRITERIA = ["l1", "l2", "bn_scale", "taylor", "fpgm", "apoz", "chip", "nisp", "thinet"]
PENALTIES = ["slimming", "bn_ista", "group_lasso", "group_norm"]


class Shuffled(Criterion):
    """The scores of l2 in random order within each group: its ratios, without its choice."""

    def score(self, group: Any, tensors: Any, gradients: Any, generator: torch.Generator) -> torch.Tensor:
        scores = Norm(2).score(group, tensors, gradients, generator)
        return scores[torch.randperm(len(scores), generator=generator)]


def by_criterion(criterion: Any, moment: str) -> Callable[..., PruningCallback]:
    return lambda **rest: ChannelPruning(criterion, schedule=MOMENTS[moment], **rest)


METHODS: dict[str, Callable[..., PruningCallback | None]] = {
    "dense": lambda **_: None,
    **{f"{name}, {moment}": by_criterion(name, moment) for moment in MOMENTS for name in CRITERIA},
    **{f"random, {moment}": by_criterion(Shuffled(), moment) for moment in MOMENTS},
    **{
        f"{name}, post": lambda name=name, **rest: RegularisedPruning(penalty=name, schedule=MOMENTS["post"], **rest)
        for name in PENALTIES
    },
    "greg-1": lambda seed, **rest: GReg(1, at=0.5, **rest),
    "greg-2": lambda seed, **rest: GReg(2, at=0.5, **rest),
    "soft filters": lambda seed, **rest: SoftFilterPruning(**rest),
    "scoring net, init": lambda **rest: ScoringNetPruning(mode="init", **rest),
    "scoring net, post": lambda **rest: ScoringNetPruning(mode="post", schedule=MOMENTS["post"], **rest),
    "bayesian": BayesianPruning,
    "bayesian, no handing over": lambda **rest: BayesianPruning(reparameterise=False, **rest),
    "grow and prune": GrowAndPrune,
    "grow and prune, no growth": lambda **rest: GrowAndPrune(expand=1.0, **rest),
    "search and train": SearchAndTrain,
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["small-conv", "small-resnet"])
    parser.add_argument("--removed", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.85], help="shares of the MACs")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.set_defaults(seeds=[0, 1, 2], train=20_000)
    options = parser.parse_args()
    common = {name: getattr(options, name) for name in ("epochs", "rate", "train", "test")}
    cells = Cells(options.work / "cells.jsonl")
    for task in options.tasks:
        data = load(TASKS[task].data, options.data_dir, options.train)
        for seed in options.seeds:
            for method in options.methods:
                for removed in options.removed if method != "dense" else [0.0]:
                    key = {"net": task, "removed": removed, "seed": seed, "method": method} | common
                    cells.run(key, lambda key=key, data=data: trained(key, data, options))
    asked = {"net": options.tasks, "removed": [0.0, *options.removed], "seed": options.seeds}
    rows = [row for row in cells if common.items() <= row.items() and all(row[k] in v for k, v in asked.items())]
    rows.sort(key=lambda row: (row["net"], row["removed"], list(METHODS).index(row["method"])))
    table = paired_table(rows, ["net", "removed"], "l2, post", "accuracy", ["reached", "MACs", "seconds"])
    text = f"# Structured pruning\n\n{(__doc__ or '').strip()}\n\n{made_by()}\n\n{table}\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


def trained(key: dict[str, Any], data: Data, options: Any) -> dict[str, Any]:
    L.seed_everything(key["seed"], verbose=False)
    module = Classifier(TASKS[key["net"]].net(), options.rate)
    callback = METHODS[key["method"]](remove=key["removed"], seed=key["seed"])
    spent = Spent()
    start = time.monotonic()
    fit(module, data.train, options.epochs, *([callback] if callback else []), spent)
    seconds = time.monotonic() - start
    images = data.test if options.test else data.validation
    found = {"accuracy": accuracy(module, images), "reached": 0.0, "MACs": 1.0, "seconds": seconds}
    if callback is not None and callback.report.before.macs:
        cost = sum(spent.found) / len(spent.found) / callback.report.before.macs
        found |= {"reached": callback.report.reached, "MACs": cost}
    return found


class Spent(L.Callback):
    """Multiply-accumulates of the network at the end of each epoch."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if "prune/macs" in trainer.callback_metrics:
            self.found.append(float(trainer.callback_metrics["prune/macs"]))


if __name__ == "__main__":
    main()

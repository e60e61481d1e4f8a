"""Does it help to keep some small weights that an optimizer picks, instead of the largest ones only?

    python -m examples.studies.small_weights --data_dir DATA --work runs/small_weights --test \\
        --out examples/results/small_weights.md

Each net is trained dense once for each seed. From there every method prunes in one go and trains on for the same
number of epochs, with the same batches in the same order. `dense` trains on without pruning; `random` keeps as many
weights of each tensor as `magnitude` does, chosen by chance; `swaps` exchanges small weights by estimated gain alone,
without an optimizer before. `before` is the accuracy right after pruning. Choices are made without `--test`, on the
last 5000 training images, which are never trained on; with it the test images are used. A run that was stopped goes on
where it was, and several processes may share the seeds of one `--work` folder.
"""

from __future__ import annotations

import copy
import time
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
from lightning_prune import OneShot, PruningCallback, SmallWeightSearch, WeightCriterion, WeightPruning

SEARCHES = ["genetic", "particle_swarm", "annealing", "cross_entropy"]
METHODS = ["dense", "random", "magnitude", "swaps", *SEARCHES]
OURS = ["small_fraction", "sweeps", "batches"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["lenet-300-100", "small-conv"])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS[:5])
    parser.add_argument("--epochs", type=int, default=8, help="of the dense training")
    parser.add_argument("--tuning", type=int, default=3, help="epochs after pruning")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of the dense training")
    parser.add_argument("--tuning_rate", type=float, default=5e-4, help="learning rate after pruning")
    parser.add_argument("--small_fraction", type=float, default=0.3)
    parser.add_argument("--sweeps", type=int, default=20)
    parser.add_argument("--batches", type=int, default=16, help="batches that the search looks at")
    options = parser.parse_args()
    cells = Cells(options.work / "cells.jsonl")
    for task in options.tasks:
        data = load(TASKS[task].data, options.data_dir, options.train)
        for seed in options.seeds:
            study(task, seed, data, cells, options)
    text = (
        f"# Small weights\n\n{(__doc__ or '').strip()}\n\n{made_by()}\n\n"
        + paired_table(wanted(cells, options), ["net", "sparsity"], "magnitude", "accuracy", ["before", "seconds"])
        + "\n"
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text)


def settings(options: Any) -> dict[str, Any]:
    """What results must have in common to be compared."""
    names = ("epochs", "tuning", "rate", "tuning_rate", "train", "test")
    return {name: getattr(options, name) for name in names}


def of_method(method: str, options: Any) -> dict[str, Any]:
    """What belongs to the results of a method alone."""
    names = OURS if method in ("swaps", *SEARCHES) else ()
    return {"method": method, **{name: getattr(options, name) for name in names}}


def wanted(cells: Cells, options: Any) -> list[dict[str, Any]]:
    """The results that these options ask for, in the order of the table."""
    found = [
        row
        for row in cells
        if (settings(options) | of_method(row["method"], options)).items() <= row.items()
        and (row["net"] in options.tasks and row["sparsity"] in [0.0, *options.sparsities])
        and (row["seed"] in options.seeds and row["method"] in options.methods)
    ]
    return sorted(found, key=lambda row: (row["net"], row["sparsity"], METHODS.index(row["method"]), row["seed"]))


def study(task: str, seed: int, data: Data, cells: Cells, options: Any) -> None:
    dense = trained(task, seed, data, options)
    for method in options.methods:
        for sparsity in options.sparsities if method != "dense" else [0.0]:
            key = {"net": task, "sparsity": sparsity, "seed": seed} | of_method(method, options) | settings(options)
            cells.run(
                key, lambda method=method, sparsity=sparsity: pruned(dense, method, sparsity, seed, data, options)
            )


def trained(task: str, seed: int, data: Data, options: Any) -> Classifier:
    """The dense net, trained now or by an earlier run."""
    file = options.work / f"{task}-{seed}-{options.epochs}-{options.rate}-{options.train}.pt"
    L.seed_everything(seed, verbose=False)
    module = Classifier(TASKS[task].net(), options.rate)
    if file.exists():
        module.load_state_dict(torch.load(file, weights_only=True))
    else:
        fit(module, data.train, options.epochs)
        torch.save(module.state_dict(), file)
    return module


def pruned(dense: Classifier, method: str, sparsity: float, seed: int, data: Data, options: Any) -> dict[str, Any]:
    """Accuracy right after pruning and in the end."""
    module = Classifier(copy.deepcopy(dense.net), options.tuning_rate)
    images = data.test if options.test else data.validation
    first = FirstAccuracy(images)
    callback = pruning(method, sparsity, seed, options)
    L.seed_everything(seed, verbose=False)
    start = time.monotonic()
    fit(module, data.train, options.tuning, *([callback] if callback else []), first)
    found = {"accuracy": accuracy(module, images), "before": first.found, "seconds": time.monotonic() - start}
    return found | {"reached": callback.report.reached if callback else 0.0}


def pruning(method: str, sparsity: float, seed: int, options: Any) -> PruningCallback | None:
    shared = {"remove": sparsity, "schedule": OneShot(0, "step"), "shrink": "never", "seed": seed}
    if method == "dense":
        return None
    if method in ("swaps", *SEARCHES):
        chosen = {name: getattr(options, name) for name in OURS}
        return SmallWeightSearch(optimizer=None if method == "swaps" else method, **chosen, **shared)
    return WeightPruning("magnitude" if method == "magnitude" else Shuffled(), **shared)


class Shuffled(WeightCriterion):
    """The magnitudes of each tensor in random order: the ratios of magnitude pruning, without its choice."""

    def score(self, weights: Any, source: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {
            name: weight.abs().flatten()[torch.randperm(weight.numel(), generator=generator)].view(weight.shape)
            for name, weight in weights.items()
        }


class FirstAccuracy(L.Callback):
    """Accuracy when the first batch comes, pruning at step 0 being done."""

    def __init__(self, images: Any) -> None:
        self.images, self.found = images, 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 0:
            self.found = accuracy(pl_module, self.images)


if __name__ == "__main__":
    main()

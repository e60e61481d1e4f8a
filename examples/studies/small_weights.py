"""Does it help to keep some small weights that an optimizer picks, instead of the largest ones only?

    python -m examples.studies.small_weights --data_dir DATA --work runs/small_weights --test \\
        --out examples/results/small_weights.md

Each net is trained dense once for each seed. From there every method prunes in one go and trains on for the same
number of epochs, with the same batches in the same order. `dense` trains on without pruning; `random` keeps as many
weights of each tensor as `magnitude` does, chosen by chance; `swaps` exchanges small weights by estimated gain alone,
without an optimizer before. `before` is the accuracy right after pruning. Choices are made without `--test`, on the
last 5000 training images, which are never trained on; with it the test images are used. A run that was stopped goes on
where it was, and several processes may share the seeds of one `--work` folder.

Defaults are modest: LeNet-300-100 on all of MNIST, and a small net for 10,000 images of CIFAR-10 of half the size. For
more, `--tasks conv-4 small-resnet --epochs 30 --tuning 10`.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from examples.studies.common import (
    Classifier,
    Images,
    ShuffledWeights,
    accuracy,
    fit,
    fit_arguments,
    fresh,
    grid,
    paired_table,
    publish,
    results,
    trained,
)
from examples.studies.nets import TASKS
from lightning_prune import OneShot, PruningCallback, SmallWeightSearch, WeightPruning

SEARCHES = ["genetic", "particle_swarm", "annealing", "cross_entropy"]
METHODS = ["dense", "random", "magnitude", "swaps", *SEARCHES]
OURS = ["small_fraction", "sweeps", "batches"]


def main() -> None:
    parser = fit_arguments(__doc__, METHODS, ["lenet-300-100", "cifar-conv"], epochs=8)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--tuning", type=int, default=3, help="epochs after pruning; --epochs are those before")
    parser.add_argument("--tuning_rate", type=float, default=0.5, help="that after pruning, as a share of that before")
    parser.add_argument("--small_fraction", type=float, default=0.3)
    parser.add_argument("--sweeps", type=int, default=20)
    parser.add_argument("--batches", type=int, default=16, help="batches that the search looks at")
    parser.set_defaults(methods=METHODS[:5], seeds=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    keys = [
        key | {name: getattr(options, name) for name in (OURS if key["method"] in ("swaps", *SEARCHES) else ())}
        for key in grid(options, "sparsity", options.sparsities, "tuning", "tuning_rate")
    ]
    rows = results(keys, lambda key: pruned(key, options), options)
    table = paired_table(rows, ["net", "sparsity"], "magnitude", "accuracy", ["before", "seconds"])
    publish("Small weights", __doc__, options, table)


def pruned(key: dict[str, Any], options: Any) -> dict[str, Any]:
    """Accuracy right after pruning and in the end."""
    module = dense(key["net"], key["seed"], key["rate"], options)
    data = TASKS[key["net"]].load(options.data_dir, options.train)
    first = FirstAccuracy(data.test if options.test else data.validation)
    L.seed_everything(key["seed"], verbose=False)
    callback = pruning(key["method"], key["sparsity"], key["seed"], options)
    return trained(module, key["net"], callback, options, first, epochs=options.tuning) | {"before": first.found}


def dense(task: str, seed: int, rate: float, options: Any) -> Classifier:
    """The dense net, trained now or by an earlier run."""
    file = options.work / f"{task}-{seed}-{options.epochs}-{rate}-{options.train}.pt"
    module = fresh(task, seed, rate)
    if not file.exists():
        fit(module, TASKS[task].load(options.data_dir, options.train).train, options.epochs)
        torch.save(module.state_dict(), file)
    module = fresh(task, seed, rate * options.tuning_rate)
    module.load_state_dict(torch.load(file, weights_only=True))
    return module


def pruning(method: str, sparsity: float, seed: int, options: Any) -> PruningCallback | None:
    shared: dict[str, Any] = {"remove": sparsity, "schedule": OneShot(0, "step"), "shrink": "never", "seed": seed}
    if method == "dense":
        return None
    if method in ("swaps", *SEARCHES):
        chosen = {name: getattr(options, name) for name in OURS}
        optimizer: Any = None if method == "swaps" else method
        return SmallWeightSearch(optimizer=optimizer, **chosen, **shared)
    return WeightPruning("magnitude" if method == "magnitude" else ShuffledWeights(), **shared)


class FirstAccuracy(L.Callback):
    """Accuracy when the first batch comes, pruning at step 0 being done."""

    def __init__(self, images: Images) -> None:
        self.images, self.found = images, 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 0:
            self.found = accuracy(pl_module, self.images)


if __name__ == "__main__":
    main()

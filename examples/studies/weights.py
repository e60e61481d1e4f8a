"""Which weights can go: criteria and schedules of unstructured pruning side by side.

    python -m examples.studies.weights --data_dir DATA --work runs/weights --seeds 0 1 2 --test \\
        --out examples/results/weights.md

Every method has the same epochs, batches and learning rate schedule. `at initialisation`: pruned once before the first
step. `gradual`: pruned in rounds while the net trains (cubic schedule). `sparse from the start`: a mask of fixed size
that moves while the net trains. `random` keeps random weights, as many in each tensor as magnitude pruning does at that
sparsity; `dense` is not pruned.
"""

from __future__ import annotations

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
from lightning_prune import SET, DynamicNetworkSurgery, OneShot, PruningCallback, RigL, WeightCriterion, WeightPruning

FIRST = OneShot(0, "step")


class Shuffled(WeightCriterion):
    """The magnitudes of each tensor in random order: the ratios of magnitude pruning, without its choice."""

    def score(self, weights: Any, source: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {
            name: weight.abs().flatten()[torch.randperm(weight.numel(), generator=generator)].view(weight.shape)
            for name, weight in weights.items()
        }


METHODS: dict[str, Callable[..., PruningCallback | None]] = {
    "dense": lambda **_: None,
    "random, at initialisation": lambda **rest: WeightPruning(Shuffled(), schedule=FIRST, **rest),
    "magnitude, at initialisation": lambda **rest: WeightPruning("magnitude", schedule=FIRST, **rest),
    "SNIP, at initialisation": lambda **rest: WeightPruning("snip", schedule=FIRST, **rest),
    "GraSP, at initialisation": lambda **rest: WeightPruning("grasp", schedule=FIRST, **rest),
    "SynFlow, at initialisation": lambda **rest: WeightPruning("synflow", schedule=FIRST, **rest),
    "random, gradual": lambda **rest: WeightPruning(Shuffled(), **rest),
    "magnitude, gradual": lambda **rest: WeightPruning("magnitude", **rest),
    "LAMP, gradual": lambda **rest: WeightPruning("lamp", **rest),
    "SNIP, gradual": lambda **rest: WeightPruning("snip", **rest),
    "movement, gradual": lambda **rest: WeightPruning("movement", **rest),
    "dynamic network surgery": DynamicNetworkSurgery,
    "SET, sparse from the start": SET,
    "RigL, sparse from the start": RigL,
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["lenet-300-100", "small-conv"])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.set_defaults(seeds=[0, 1, 2])
    options = parser.parse_args()
    common = {name: getattr(options, name) for name in ("epochs", "rate", "train", "test")}
    cells = Cells(options.work / "cells.jsonl")
    for task in options.tasks:
        data = load(TASKS[task].data, options.data_dir, options.train)
        for seed in options.seeds:
            for method in options.methods:
                for sparsity in options.sparsities if method != "dense" else [0.0]:
                    key = {"net": task, "sparsity": sparsity, "seed": seed, "method": method} | common
                    cells.run(key, lambda key=key, data=data: trained(key, data, options))
    asked = {"net": options.tasks, "sparsity": [0.0, *options.sparsities], "seed": options.seeds}
    rows = [row for row in cells if common.items() <= row.items() and all(row[k] in v for k, v in asked.items())]
    rows.sort(key=lambda row: (row["net"], row["sparsity"], list(METHODS).index(row["method"])))
    table = paired_table(rows, ["net", "sparsity"], "magnitude, gradual", "accuracy", ["reached"])
    text = f"# Unstructured pruning\n\n{(__doc__ or '').strip()}\n\n{made_by()}\n\n{table}\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


def trained(key: dict[str, Any], data: Data, options: Any) -> dict[str, Any]:
    L.seed_everything(key["seed"], verbose=False)
    module = Classifier(TASKS[key["net"]].net(), options.rate)
    callback = METHODS[key["method"]](remove=key["sparsity"], seed=key["seed"], shrink="never")
    fit(module, data.train, options.epochs, *([callback] if callback else []))
    images = data.test if options.test else data.validation
    return {"accuracy": accuracy(module, images), "reached": callback.report.reached if callback else 0.0}


if __name__ == "__main__":
    main()

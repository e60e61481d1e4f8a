"""Which weights can go: criteria and schedules of unstructured pruning side by side.

    python -m examples.studies.weights --data_dir DATA --work runs/weights --test \\
        --out examples/results/weights.md

Every method has the same epochs, batches and learning rate schedule. `at initialisation`: pruned once before the first
step. `gradual`: pruned in rounds while the net trains (cubic schedule). `sparse from the start`: a mask of fixed size
that moves while the net trains. `random` keeps random weights, as many in each tensor as magnitude pruning does at that
sparsity; `dense` is not pruned.

Defaults are modest: LeNet-300-100 on all of MNIST, and a small net for 10,000 images of CIFAR-10 of half the size. For
more, `--tasks conv-4 small-resnet --epochs 30`. Several processes may share the seeds of one `--work` folder, and a run
that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from examples.studies.common import (
    ShuffledWeights,
    fit_arguments,
    fresh,
    grid,
    paired_table,
    publish,
    results,
    trained,
)
from lightning_prune import SET, DynamicNetworkSurgery, OneShot, PruningCallback, RigL, WeightPruning

FIRST = OneShot(0, "step")

METHODS: dict[str, Callable[..., PruningCallback | None]] = {
    "dense": lambda **_: None,
    "random, at initialisation": lambda **rest: WeightPruning(ShuffledWeights(), schedule=FIRST, **rest),
    "magnitude, at initialisation": lambda **rest: WeightPruning("magnitude", schedule=FIRST, **rest),
    "SNIP, at initialisation": lambda **rest: WeightPruning("snip", schedule=FIRST, **rest),
    "GraSP, at initialisation": lambda **rest: WeightPruning("grasp", schedule=FIRST, **rest),
    "SynFlow, at initialisation": lambda **rest: WeightPruning("synflow", schedule=FIRST, **rest),
    "random, gradual": lambda **rest: WeightPruning(ShuffledWeights(), **rest),
    "magnitude, gradual": lambda **rest: WeightPruning("magnitude", **rest),
    "LAMP, gradual": lambda **rest: WeightPruning("lamp", **rest),
    "SNIP, gradual": lambda **rest: WeightPruning("snip", **rest),
    "movement, gradual": lambda **rest: WeightPruning("movement", **rest),
    "dynamic network surgery": DynamicNetworkSurgery,
    "SET, sparse from the start": SET,
    "RigL, sparse from the start": RigL,
}


def main() -> None:
    parser = fit_arguments(__doc__, list(METHODS), ["lenet-300-100", "cifar-conv"], epochs=10)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    options = parser.parse_args()

    def work(key: dict[str, Any]) -> dict[str, Any]:
        module = fresh(key["net"], key["seed"], key["rate"])
        pruning = METHODS[key["method"]](remove=key["sparsity"], seed=key["seed"], shrink="never")
        return trained(module, key["net"], pruning, options)

    rows = results(grid(options, "sparsity", options.sparsities), work, options)
    table = paired_table(rows, ["net", "sparsity"], "magnitude, gradual", "accuracy", ["reached"])
    publish("Unstructured pruning", __doc__, options, table)


if __name__ == "__main__":
    main()

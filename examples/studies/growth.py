"""High sparsity: does it help to grow a network before it is pruned?

    python -m examples.studies.growth --data_dir DATA --work runs/growth --test --out examples/results/growth.md

Whole channels go, until the given share of the original network's parameters is gone. Every method has the same epochs,
batches and learning rate schedule. `grow and prune` widens the network before the first step, `no growth` is the same
method without that. `group lasso` and `slimming` train under their penalty and prune once half way, by the norms of
channels and by batch-norm scales. `magnitude` prunes by the norms of channels in rounds, and `random` any channels, as
many of each group as `magnitude`. `dense` is not pruned. `training GMACs` is what the steps of a training cost, forward
and backward, at the widths that the network has at each of them: wider at first where it grows.

Defaults are modest: small nets, images of half the size, and 10,000 of them. For more, `--tasks small-conv
small-resnet --train 45000 --epochs 30`, and `--precision bf16-mixed` where the processor has instructions for it.
Several processes may share the seeds of one `--work` folder, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from examples.studies.common import (
    SMALL,
    Shuffled,
    add_precision,
    fit_arguments,
    fresh,
    grid,
    paired_table,
    publish,
    results,
    trained,
)
from lightning_prune import ChannelPruning, GrowAndPrune, OneShot, PruningCallback, RegularisedPruning

HALF_WAY = OneShot(0.5)
METHODS: dict[str, Callable[..., PruningCallback | None]] = {
    "dense": lambda **_: None,
    "grow and prune": GrowAndPrune,
    "no growth": lambda **rest: GrowAndPrune(expand=1.0, **rest),
    "group lasso": lambda **rest: RegularisedPruning("group_lasso", schedule=HALF_WAY, **rest),
    "slimming": lambda **rest: RegularisedPruning("slimming", criterion="bn_scale", schedule=HALF_WAY, **rest),
    "magnitude": lambda **rest: ChannelPruning("l2", **rest),
    "random": lambda **rest: ChannelPruning(Shuffled(), **rest),
}


def main() -> None:
    parser = fit_arguments(__doc__, list(METHODS), SMALL, epochs=10, train=10_000)
    parser.add_argument("--removed", type=float, nargs="+", default=[0.8, 0.9, 0.95], help="shares of the parameters")
    add_precision(parser)
    options = parser.parse_args()

    def work(key: dict[str, Any]) -> dict[str, Any]:
        module = fresh(key["net"], key["seed"], key["rate"])
        pruning = METHODS[key["method"]](remove=key["removed"], seed=key["seed"], of="params")
        return trained(module, key["net"], pruning, options)

    rows = results(grid(options, "removed", options.removed, "precision"), work, options)
    more = ["reached", "training GMACs", "CPU seconds"]
    table = paired_table(rows, ["net", "removed"], "grow and prune", "accuracy", more)
    publish("Growing before pruning", __doc__, options, table)


if __name__ == "__main__":
    main()

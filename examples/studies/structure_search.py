"""Time and accuracy to a compact net: search and training in one fit, or pre-training, pruning and fine-tuning.

    python -m examples.studies.structure_search --data_dir DATA --work runs/structure_search --test \\
        --out examples/results/structure_search.md

`l1`, `slimming` and `group norm` train the whole net for `--epochs` epochs, the latter two under their penalty, prune
it in one round and fine-tune for `--tuning` epochs, each with a cosine schedule of its own. `search and train` cuts
before 0.15 of its fit are over, and takes `--one_fit` epochs in all; by default as many as 60 % of the training of the
others pay for. `robust` learns from teachers as well. `l1, one fit` prunes at the moment when the search ends and
trains for as many epochs, `random, one fit` does so at the ratios of l2. `dense` is not pruned, and trained for
`--epochs` and `--tuning`. All others remove the same share of the multiply-accumulates.

`training GMACs` are those of all training steps, at the widths that the network has at each of them: three times those
of a forward for each image. What is spent on evaluating subnets or channels, and on teachers, shows in the seconds
alone.

Defaults are modest: small nets, images of half the size, and 10,000 of them. For more, `--tasks small-conv
small-resnet --train 45000 --epochs 30 --tuning 30`, and `--precision bf16-mixed` where the processor has instructions
for it. Several processes may share the seeds of one `--work` folder, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from examples.studies.common import (
    SMALL,
    TASKS,
    Classifier,
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
from lightning_prune import (
    ChannelPruning,
    OneShot,
    PruningCallback,
    RegularisedPruning,
    SearchAndTrain,
)

AT = 0.15
METHODS: dict[str, Callable[..., PruningCallback | None]] = {
    "dense": lambda **_: None,
    "search and train": lambda schedule, **rest: SearchAndTrain(**rest),
    "search and train, robust": lambda schedule, **rest: SearchAndTrain(robust=True, **rest),
    "l1": lambda **rest: ChannelPruning("l1", **rest),
    "slimming": lambda **rest: RegularisedPruning("slimming", criterion="bn_scale", **rest),
    "group norm": lambda **rest: RegularisedPruning("group_norm", **rest),
    "l1, one fit": lambda schedule, **rest: ChannelPruning("l1", schedule=OneShot(AT), **rest),
    "random, one fit": lambda schedule, **rest: ChannelPruning(Shuffled(), schedule=OneShot(AT), **rest),
}
PRE_TRAINED = ["l1", "slimming", "group norm"]


def main() -> None:
    parser = fit_arguments(__doc__, list(METHODS), SMALL, epochs=10, train=10_000)
    parser.add_argument("--tuning", type=int, default=10, help="epochs after pruning a net that was trained before")
    parser.add_argument("--one_fit", type=int, help="epochs of those that prune as they train")
    parser.add_argument("--removed", type=float, nargs="+", default=[0.5, 0.7], help="shares of the MACs")
    add_precision(parser)
    options = parser.parse_args()
    in_two = {"tuning": options.tuning}
    keys = [
        key | (in_two if key["method"] in [*PRE_TRAINED, "dense"] else {"one fit": one_fit(key, options)})
        for key in grid(options, "removed", options.removed, "precision")
    ]
    rows = results(keys, lambda key: measured(key, options), options)
    more = ["reached", "epochs in all", "training GMACs", "seconds", "CPU seconds"]
    table = paired_table(rows, ["net", "removed"], "search and train", "accuracy", more)
    publish("Structure search", __doc__, options, table)


def measured(key: dict[str, Any], options: Any) -> dict[str, Any]:
    """The result of one way to a compact net."""
    task, before = key["net"], options.epochs * TASKS[key["net"]].passes
    pruning = METHODS[key["method"]](remove=key["removed"], seed=key["seed"], schedule=OneShot(before, "epoch"))
    if key["method"] in PRE_TRAINED:
        module: Classifier = fresh(task, key["seed"], key["rate"], TrainedTwice)
        epochs = options.epochs + options.tuning
        module.first = options.epochs / epochs
    else:
        module = fresh(task, key["seed"], key["rate"])
        epochs = options.epochs + options.tuning if pruning is None else one_fit(key, options)
    return trained(module, task, pruning, options, epochs=epochs) | {"epochs in all": epochs}


def one_fit(key: dict[str, Any], options: Any) -> int:
    """Epochs of a fit that prunes at `AT`, for 60 % of what it costs to train before pruning and after it."""
    left = 1 - key["removed"]
    affordable = 0.6 * (options.epochs + options.tuning * left) / (AT + (1 - AT) * left)
    return options.one_fit or math.floor(affordable)


class TrainedTwice(Classifier):
    """A training and a second one behind it, each with its own cosine schedule."""

    first = 0.5

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.rate, fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        border = round(self.first * steps)

        def factor(step: int) -> float:
            done = step / border if step < border else (step - border) / max(steps - border, 1)
            return (1 + math.cos(math.pi * done)) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    main()

"""Rounds of pruning with and without a memory, and with and without handing over what goes to what stays.

    python -m examples.studies.memory --data_dir DATA --work runs/memory --test --out examples/results/memory.md

`bayesian` prunes in rounds in the first 60 % of the fit, remembers the evidence of earlier rounds, and lets the
channels that stay take over what they can predict of those that go; `no memory` forgets after each round, `no handing
over` only removes, `neither` does both. `l2, same rounds` prunes by the norms of channels at the same moments, with the
same re-estimation of batch-norm statistics, and `l2, one shot` at once when the others begin, half way, or when they
end. Epochs, batches and learning rate schedule are the same for all.

`loss after a cut` is that on the held-out images right after a round, before any further step, as a mean over rounds,
and `rise` how much more that is than right before it; a second table has the loss after each round. `AUC` says how well
the probabilities that a round predicted tell the channels which the next round removed from those it left, as a mean
over rounds: 0.5 is by chance, 1 without an error.

Defaults are modest: small nets, images of half the size, and 10,000 of them. For more, `--tasks small-conv
small-resnet --train 45000 --epochs 30`. Several processes may share the seeds of one `--work` folder, and a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.studies.common import (
    SMALL,
    TASKS,
    Images,
    batches,
    fit_arguments,
    fresh,
    grid,
    paired_table,
    publish,
    results,
    trained,
)
from lightning_prune import BayesianPruning, ChannelPruning, Linear, OneShot
from lightning_prune.bayes import area_under_curve
from lightning_prune.callbacks.network import Network


class Watched:
    """Notes the loss before and after each round, on images that its study gives."""

    images: Images

    def __init__(self, *args: Any, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.before: list[float] = []
        self.after: list[float] = []

    def carry_out(self, network: Network, level: float) -> None:
        self.before.append(loss(network.module, self.images))
        super().carry_out(network, level)  # type: ignore[misc]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        super().on_train_batch_start(trainer, pl_module, *rest)  # type: ignore[misc]
        if len(self.after) < len(self.before):
            self.after.append(loss(pl_module, self.images))


class Bayesian(Watched, BayesianPruning):
    """Pruning with a memory, watched."""


class ByNorm(Watched, ChannelPruning):
    """Pruning by the norms of channels, watched."""


def in_rounds(number: int) -> Linear:
    return Linear(0.6 / number, 0.6, 0.6 / number)


METHODS: dict[str, Callable[..., Bayesian | ByNorm]] = {
    "bayesian": lambda rounds, **rest: Bayesian(schedule=in_rounds(rounds), **rest),
    "no memory": lambda rounds, **rest: Bayesian(schedule=in_rounds(rounds), memory=0.0, **rest),
    "no handing over": lambda rounds, **rest: Bayesian(schedule=in_rounds(rounds), reparameterise=False, **rest),
    "neither": lambda rounds, **rest: Bayesian(schedule=in_rounds(rounds), memory=0.0, reparameterise=False, **rest),
    "l2, same rounds": lambda rounds, **rest: ByNorm("l2", schedule=in_rounds(rounds), recalibrate=8, **rest),
    "l2, one shot, first": lambda rounds, **rest: ByNorm("l2", schedule=OneShot(0.6 / rounds), recalibrate=8, **rest),
    "l2, one shot, half way": lambda rounds, **rest: ByNorm("l2", schedule=OneShot(0.5), recalibrate=8, **rest),
    "l2, one shot, last": lambda rounds, **rest: ByNorm("l2", schedule=OneShot(0.6), recalibrate=8, **rest),
}


def main() -> None:
    parser = fit_arguments(__doc__, list(METHODS), SMALL, epochs=10, train=10_000)
    parser.add_argument("--removed", type=float, nargs="+", default=[0.5, 0.7], help="shares of the MACs")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    keys = grid(options, "removed", options.removed, "rounds")
    rows = results(keys, lambda key: measured(key, options), options)
    more = ["reached", "loss after a cut", "rise", "AUC", "CPU seconds"]
    of_rounds = [
        {**row, "round": number, "loss": value}
        for row in rows
        if "one shot" not in row["method"]
        for number, value in enumerate(row["losses"], 1)
    ]
    publish(
        "Pruning with a memory",
        __doc__,
        options,
        paired_table(rows, ["net", "removed"], "bayesian", "accuracy", more, digits=3),
        "Loss right after each round:",
        paired_table(of_rounds, ["net", "removed", "round"], "bayesian", "loss", digits=4),
    )


def measured(key: dict[str, Any], options: Any) -> dict[str, Any]:
    """The result of one fit."""
    pruning = METHODS[key["method"]](rounds=options.rounds, remove=key["removed"], seed=key["seed"])
    pruning.images = TASKS[key["net"]].load(options.data_dir, options.train).validation
    found = trained(fresh(key["net"], key["seed"], key["rate"]), key["net"], pruning, options)
    areas = areas_of(pruning.predictions) if isinstance(pruning, BayesianPruning) else []
    return found | {
        "loss after a cut": statistics.mean(pruning.after),
        "rise": statistics.mean(after - before for before, after in zip(pruning.before, pruning.after, strict=True)),
        "AUC": statistics.mean(areas) if areas else None,
        "AUCs": areas,
        "losses": pruning.after,
    }


@torch.no_grad()
def loss(module: nn.Module, images: Images) -> float:
    """Mean cross entropy, in evaluation mode."""
    training = module.training
    module.eval()
    found = sum(float(cross_entropy(module(x), y, reduction="sum")) for x, y in batches(images, 1000, shuffle=False))
    module.train(training)
    return found / len(images)


def areas_of(predictions: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> list[float]:
    """The area under the curve of each round that was predicted and removed anything, over all groups."""
    found = []
    for groups in predictions:
        if not groups:
            continue
        predicted, pruned = (torch.cat([group[name] for group in groups.values()]) for name in ("predicted", "pruned"))
        if 0 < int(pruned.sum()) < len(pruned):
            found.append(area_under_curve(predicted, pruned))
    return found


if __name__ == "__main__":
    main()

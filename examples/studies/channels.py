"""Which channels can go: criteria, penalties and searches of structured pruning side by side.

    python -m examples.studies.channels --data_dir DATA --work runs/channels --test --out examples/results/channels.md

Every method has its defaults, the same epochs, batches and learning rate schedule, and removes the same share of the
multiply-accumulates. `init`: pruned once before the first step. `post`: pruned once half way. `random` draws the
channels, as many of each group as `l2` takes at the same moment; `dense` is not pruned. Methods with rounds of their
own end them by seven tenths of the fit. `training GMACs` is what the steps of a training cost, forward and backward: a
network that is small from the start trains cheaply. CPU seconds are those of a fit, with all that a method does for its
choice. Decision patterns, which maps of a net that is little trained do not have, are in a study of their own.

Defaults are modest: a small plain net for MNIST and a small residual one for CIFAR-10, images of half the
size, and 4000 of them. `--tasks mnist-resnet cifar-conv` adds the other two. For more, `--tasks small-conv small-resnet
--train 45000 --epochs 30`, and `--precision bf16-mixed` where the processor has instructions for it. Several processes
may share the seeds of one `--work` folder, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from examples.studies.common import (
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
    BayesianPruning,
    ChannelPruning,
    EvolutionarySearch,
    GReg,
    GrowAndPrune,
    Linear,
    OneShot,
    PruningCallback,
    RegularisedPruning,
    ScoringNetPruning,
    SearchAndTrain,
    SoftFilterPruning,
)

MOMENTS = {"init": OneShot(0, "step"), "post": OneShot(0.5)}
CRITERIA = {
    name: name
    for name in ("l1", "l2", "bn_scale", "taylor", "hessian", "fpgm", "apoz", "hrank", "chip", "nisp", "thinet")
} | {"random": Shuffled()}
PENALTIES = {"slimming": "bn_scale", "bn_ista": "bn_scale", "group_lasso": "l2", "group_norm": "l2"}
"""With what they are pruned by."""
ROUNDS = Linear(0.12, 0.6, 0.12)


def by_criterion(criterion: Any, moment: str) -> Callable[..., PruningCallback]:
    return lambda **rest: ChannelPruning(criterion, schedule=MOMENTS[moment], **rest)


def by_penalty(penalty: Any, criterion: Any) -> Callable[..., PruningCallback]:
    return lambda **rest: RegularisedPruning(penalty, criterion=criterion, schedule=MOMENTS["post"], **rest)


METHODS: dict[str, Callable[..., PruningCallback | None]] = {
    "dense": lambda **_: None,
    **{f"{name}, {moment}": by_criterion(it, moment) for moment in MOMENTS for name, it in CRITERIA.items()},
    **{f"{penalty}, post": by_penalty(penalty, criterion) for penalty, criterion in PENALTIES.items()},
    "greg-1": lambda seed, **rest: GReg(1, at=0.5, **rest),
    "greg-2": lambda seed, **rest: GReg(2, at=0.5, **rest),
    "soft filters": lambda **rest: SoftFilterPruning(at=0.5, **rest),
    "scoring net, init": lambda **rest: ScoringNetPruning(mode="init", **rest),
    "scoring net, post": lambda **rest: ScoringNetPruning(mode="post", schedule=MOMENTS["post"], **rest),
    "evolutionary search, post": lambda **rest: EvolutionarySearch(at=0.5, **rest),
    "bayesian": lambda **rest: BayesianPruning(schedule=ROUNDS, **rest),
    "bayesian, no handing over": lambda **rest: BayesianPruning(schedule=ROUNDS, reparameterise=False, **rest),
    "grow and prune": GrowAndPrune,
    "grow and prune, no growth": lambda **rest: GrowAndPrune(expand=1.0, **rest),
    "search and train": SearchAndTrain,
}


def main() -> None:
    parser = fit_arguments(__doc__, list(METHODS), ["mnist-conv", "cifar-resnet"], epochs=6, train=4000)
    parser.add_argument("--removed", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.85], help="shares of the MACs")
    add_precision(parser)
    options = parser.parse_args()

    def work(key: dict[str, Any]) -> dict[str, Any]:
        module = fresh(key["net"], key["seed"], key["rate"])
        pruning = METHODS[key["method"]](remove=key["removed"], seed=key["seed"])
        return trained(module, key["net"], pruning, options)

    rows = results(grid(options, "removed", options.removed, "precision"), work, options)
    more = ["reached", "training GMACs", "CPU seconds"]
    publish(
        "Structured pruning", __doc__, options, paired_table(rows, ["net", "removed"], "l2, post", "accuracy", more)
    )


if __name__ == "__main__":
    main()

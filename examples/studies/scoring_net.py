"""The scoring net: are three stages better than one, does it transfer, and is it worth its time?

    python -m examples.studies.scoring_net --data_dir DATA --work runs/scoring_net --test \\
        --out examples/results/scoring_net.md

Each fit prunes once, at the start (`init`) or half way (`post`), and trains for the same number of epochs. All steps of
the scoring net are extra; they are among the seconds.

`stages`: the same number of steps of the scoring net in one stage (the loss of the task, by Adam) and in the default
three. `epochs to 95 %` is when the pruned network, looked at ten times in each epoch on 1000 held-out images, first
reaches 95 % of its final accuracy. `transfer`: a net is scored by one that was trained on another net or other data, as
it is (`zero-shot`) or after `--adapt` more steps (`adapted`), by one trained on itself (`native`), and at random at the
ratios that zero-shot and native gave. `time`: the scoring net against an evolutionary search, each at several lengths
and pruning half way, when the network has learnt something to be judged by; `choosing` are the seconds of the round.

Defaults are modest: small nets, images of half the size, and 4000 of them. For more, give `--train 45000
--epochs 30`. Several processes may share the seeds of one `--work` folder, and a run that was stopped goes on where it
was.
"""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from torch import Tensor

from examples.studies.common import (
    SMALL,
    TASKS,
    Images,
    accuracy,
    fit,
    fit_arguments,
    fresh,
    grid,
    in_random_order,
    paired_table,
    publish,
    results,
    trained,
)
from lightning_prune import ChannelPruning, EvolutionarySearch, OneShot, ScoringNetPruning, Stage
from lightning_prune.callbacks.network import Network

TRANSFERS = {
    "MNIST to CIFAR-10": ("mnist-conv", "cifar-conv"),
    "CIFAR-10 to digits": ("cifar-conv", "digits-conv"),
    "plain to residual": ("cifar-conv", "cifar-resnet"),
    "residual to plain": ("cifar-resnet", "cifar-conv"),
}
STAGED = ["one stage", "three stages"]
TRANSFERRED = ["native", "zero-shot", "adapted", "random as native", "random as zero-shot"]
TIMED = [*(f"scoring net, {n} steps" for n in (50, 100, 400)), *(f"evolution, {n} generations" for n in (2, 5, 20))]
PARTS = ["stages", "transfer", "time"]


def main() -> None:
    parser = fit_arguments(__doc__, [*STAGED, *TRANSFERRED, *TIMED], SMALL, epochs=6, train=4000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--modes", nargs="+", choices=["init", "post"], default=["init", "post"])
    parser.add_argument("--removed", type=float, default=0.5, help="share of the MACs")
    parser.add_argument("--steps", type=int, default=400, help="of a scoring net, except for `time`")
    parser.add_argument("--adapt", type=int, default=50, help="steps of a scoring net on another net or other data")
    options = parser.parse_args()
    shown = {part: results(keys(part, options), lambda key: measured(key, options), options) for part in options.parts}
    tables = {
        "stages": (["mode", "net"], ["one stage"], ["epochs to 95 %", "seconds"]),
        "transfer": (["mode", "transfer"], ["native", "random as zero-shot"], ["seconds"]),
        "time": (["net"], [TIMED[2]], ["choosing", "choosing, CPU", "seconds", "CPU seconds"]),
    }
    found = []
    for part, rows in shown.items():
        groups, references, more = tables[part]
        found.append(f"## {part.capitalize()}")
        found += [paired_table(rows, groups, reference, "accuracy", ["reached", *more]) for reference in references]
    publish("Scoring net", __doc__, options, *found)


def keys(part: str, options: Any) -> list[dict[str, Any]]:
    """What a part of the study consists of."""
    every = [key | {"part": part} for key in grid(options, "removed", [options.removed])]
    if part == "time":
        return [key for key in every if key["method"] in TIMED]
    every = [key | {"mode": mode, "steps": options.steps} for mode in options.modes for key in every]
    if part == "stages":
        return [key for key in every if key["method"] in STAGED]
    transfers = [(name, pair) for name, pair in TRANSFERS.items() if pair[0] in options.tasks]
    return [
        key | {"net": target, "transfer": name, "from": source, "adapt": options.adapt}
        for name, (source, target) in transfers
        for key in every
        if key["net"] == source and key["method"] in TRANSFERRED
    ]


def measured(key: dict[str, Any], options: Any) -> dict[str, Any]:
    """The result of one fit."""
    at = OneShot(0.5) if key.get("mode", "post") == "post" else OneShot(0, "step")
    shared: dict[str, Any] = {"remove": key["removed"], "seed": key["seed"]}
    if key["part"] == "time":
        pruning: ChannelPruning = of_length(key["method"], at, shared)
        found = of_fit(key, pruning, options)
        return found | {"choosing": pruning.seconds, "choosing, CPU": pruning.of_process}  # type: ignore[attr-defined]
    shared |= {"mode": key["mode"], "schedule": at}
    if key["part"] == "stages":
        stages = [Stage("task", "adam", steps=key["steps"])] if key["method"] == "one stage" else None
        held_out = TASKS[key["net"]].load(options.data_dir, options.train).validation
        curve = Curve(held_out.first(1000), key["mode"] == "post")
        found = of_fit(key, ScoringNetPruning(stages=stages, steps=key["steps"], **shared), options, curve)
        return found | {"epochs to 95 %": curve.reached(0.95)}
    kind = AtRandom if key["method"].startswith("random") else ScoringNetPruning
    if key["method"].endswith("native"):
        return of_fit(key, kind(steps=key["steps"], **shared), options)
    path = scorer(key, at, options)
    freeze = key["method"] != "adapted"
    return of_fit(key, kind(scorer_path=path, freeze=freeze, adapt_steps=key["adapt"], **shared), options)


def of_fit(key: dict[str, Any], pruning: ChannelPruning, options: Any, *callbacks: L.Callback) -> dict[str, Any]:
    return trained(fresh(key["net"], key["seed"], key["rate"]), key["net"], pruning, options, *callbacks)


def scorer(key: dict[str, Any], at: OneShot, options: Any) -> str:
    """File of a scoring net for the net it comes from, trained now or by an earlier run."""
    names = ("from", "mode", "seed", "removed", "steps", "epochs", "train")
    rate = options.rate or TASKS[key["from"]].rate
    file = options.work / f"{'-'.join(str(key[name]) for name in names)}-{rate}.pt"
    if not file.exists():
        module = fresh(key["from"], key["seed"], rate)
        pruning = ScoringNetPruning(
            key["removed"], mode=key["mode"], steps=key["steps"], schedule=at, seed=key["seed"], save_scorer=str(file)
        )
        fit(module, TASKS[key["from"]].load(options.data_dir, options.train).train, options.epochs, pruning)
    return str(file)


class AtRandom(ScoringNetPruning):
    """As many channels of each group as the scoring net keeps, but any."""

    def select(self, network: Network, level: float) -> dict[str, Tensor]:
        draw = self.generator("random")
        return {name: in_random_order(keep, draw) for name, keep in super().select(network, level).items()}


def of_length(method: str, at: OneShot, shared: dict[str, Any]) -> Any:
    """The scoring net or the evolutionary search at one of its lengths, with a watch."""
    length = int(method.split()[-2])
    if method.startswith("scoring"):
        return timed(ScoringNetPruning)(mode="post", schedule=at, steps=length, **shared)
    return timed(EvolutionarySearch)(at=at.start, generations=length, **shared)


def timed(kind: type[ChannelPruning]) -> Any:
    """The same, which notes the seconds of its rounds, by the clock and of the processor."""

    class Timed(kind):  # type: ignore[misc, valid-type]
        seconds = of_process = 0.0

        def carry_out(self, network: Network, level: float) -> None:
            start, start_of_process = time.monotonic(), time.process_time()
            super().carry_out(network, level)
            self.seconds += time.monotonic() - start
            self.of_process += time.process_time() - start_of_process

    return Timed


class Curve(L.Callback):
    """Accuracy ten times in each epoch; with ``halfway`` from the middle of the fit on."""

    def __init__(self, images: Images, halfway: bool) -> None:
        self.images, self.halfway = images, halfway
        self.found: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        batches, first = int(trainer.num_training_batches), (trainer.max_epochs or 0) / 2 if self.halfway else 0.0
        epochs = trainer.global_step / batches - first
        if epochs > 0 and trainer.global_step % max(batches // 10, 1) == 0:
            self.found.append((epochs, accuracy(pl_module, self.images)))

    def reached(self, share: float) -> float:
        """Epochs since pruning until accuracy first was such a share of the last one."""
        return next(epochs for epochs, value in self.found if value >= share * self.found[-1][1])


if __name__ == "__main__":
    main()

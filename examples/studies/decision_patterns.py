"""Decision patterns: how many neurons a fully connected net needs for MNIST, and whether patterns choose them well.

    python -m examples.studies.decision_patterns --data_dir DATA --work runs/decision_patterns --seeds 0 1 2 --test \\
        --out examples/results/decision_patterns.md

Nets have two hidden layers of equal width. `prune`: from the starting width to the given one in one round after three
tenths of the epochs, by decision patterns, by the size of the weights, or at random; what is left goes on from its
weights (`keep`) or is drawn anew (`random`), after which only the width matters, so that one way of choosing stands for
all. `search`: every cycle of epochs a tenth of the neurons goes by decision patterns and the rest is drawn anew, until
validation accuracy falls short; the net goes back to the smallest width that was good enough.

Presets: `source` is SGD with a constant learning rate of 0.01 and momentum 0.05, as the abstract of the source has it;
`sound` is Adam, whose rate falls from 0.001 along half a cosine over the fit, or, that each width of a search is
trained alike, over each of its cycles.

Accuracy and spread are percentages; the spread is that between the best and the worst seed, for a search between the
best and the worst width that it tried. Seconds are those of a fit, for a search those of one cycle. The source scored
its 10,000 test images in the search too; here widths are chosen on the last 5000 training images, which are never
trained on, patterns come from training images, and `--test` measures on the test images what was chosen without them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.studies.common import Cells, Data, accuracy, arguments, batches, load, publish, quiet
from lightning_prune import ChannelPruning, DecisionPatternPruning, PruningCallback, WidthSearch
from lightning_prune.callbacks.width_record import Trial, WidthRecord
from lightning_prune.figures import save_picture

PRESETS = ["source", "sound"]
METHODS = ["decision patterns", "magnitude", "random"]


class Perceptron(L.LightningModule):
    """A net with two hidden layers.

    Args:
        width: Neurons of each hidden layer.
        preset: How it is trained, one of `PRESETS`.
        period: Epochs after which the learning rate of `sound` begins anew.
    """

    def __init__(self, width: int, preset: str, period: int) -> None:
        super().__init__()
        hidden = nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        self.net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))
        self.preset, self.period = preset, period

    def forward(self, images: Tensor) -> Any:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), on_epoch=True)

    def configure_optimizers(self) -> Any:
        if self.preset == "source":
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.05)
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)
        steps = int(self.trainer.estimated_stepping_batches) * self.period // (self.trainer.max_epochs or 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--start", type=int, default=1000, help="width before pruning")
    parser.add_argument("--widths", type=int, nargs="+", default=[600, 300, 150, 75])
    parser.add_argument("--reinits", nargs="+", choices=["keep", "random"], default=["keep", "random"])
    parser.add_argument("--epochs", type=int, default=10, help="of a fit with one round")
    parser.add_argument("--cycle", type=int, default=3, help="epochs of each width of a search")
    parser.add_argument("--search_epochs", type=int, default=90, help="of a search, at most; 0 for none")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of a search, as a fraction of the images")
    parser.set_defaults(seeds=[0, 1, 2])
    options = parser.parse_args()
    data = load("MNIST", options.data_dir, options.train)
    common = {name: getattr(options, name) for name in ("start", "train", "test")}
    pruned = common | {"kind": "prune", "epochs": options.epochs}
    searched = common | {"kind": "search"}
    searched |= {name: getattr(options, name) for name in ("cycle", "search_epochs", "tolerance")}
    cells = Cells(options.work / "cells.jsonl")
    for seed in options.seeds:
        for preset in options.presets:
            for reinit in options.reinits:
                for width in options.widths:
                    for method in options.methods if reinit == "keep" else options.methods[:1]:
                        own = {"method": method, "reinit": reinit, "asked": width}
                        key = pruned | own | {"seed": seed, "preset": preset}
                        cells.run(key, partial(pruned_once, key, data, options))
            if options.search_epochs:
                key = searched | {"seed": seed, "preset": preset}
                cells.run(key, partial(searched_for, key, data, options))
    mine = [row for row in cells if row["seed"] in options.seeds and row["preset"] in options.presets]
    once = [row for row in mine if pruned.items() <= row.items() and row["asked"] in options.widths]
    shown = [row for row in once if row["method"] in options.methods and row["reinit"] in options.reinits]
    searches = [row for row in mine if searched.items() <= row.items()]
    publish("Decision patterns", __doc__, options, table(shown, searches), *records(searches, options))


def pruned_once(key: dict[str, Any], data: Data, options: Any) -> dict[str, Any]:
    budget: dict[str, Any] = {
        "remove": 1 - key["asked"] / options.start,
        "of": "channels",
        "scope": "group",
        "seed": key["seed"],
    }
    how = budget | {"reinit": key["reinit"], "schedule": "one_shot"}
    by_score: dict[str, Any] = {"magnitude": "l2", "random": "random"}
    patterns = key["method"] not in by_score
    callback = DecisionPatternPruning(**how) if patterns else ChannelPruning(by_score[key["method"]], **how)
    started = time.monotonic()
    module = trained(key, data, options.epochs, options.epochs, callback, options.start)
    seconds = time.monotonic() - started
    return {"width": width_of(module), "accuracy": measured(module, data, options), "seconds": seconds}


def searched_for(key: dict[str, Any], data: Data, options: Any) -> dict[str, Any]:
    search = WidthSearch(options.cycle, "val_accuracy", tolerance=options.tolerance)
    callback = DecisionPatternPruning(search=search, seed=key["seed"])
    module = trained(key, data, options.search_epochs, options.cycle, callback, options.start)
    record = callback.widths_tried
    assert record is not None
    summary = record.summary()
    return {
        "width": width_of(module),
        "accuracy": measured(module, data, options),
        "spread": 100 * summary["spread"][0],
        "seconds": summary["mean"][1],
        "tried": [[trial.units // 2, trial.value, trial.seconds] for trial in record.trials],
        "chosen": record.chosen,
    }


def trained(
    key: dict[str, Any], data: Data, epochs: int, period: int, callback: PruningCallback, width: int
) -> Perceptron:
    L.seed_everything(key["seed"], verbose=False)
    module = Perceptron(width, key["preset"], period)
    with quiet():
        trainer = L.Trainer(
            max_epochs=epochs, callbacks=[callback], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, batches(data.train), batches(data.validation, 1000, shuffle=False))
    return module


def width_of(module: Perceptron) -> int:
    """Neurons of the wider hidden layer."""
    return max(layer.out_features for layer in module.net[:-1] if isinstance(layer, nn.Linear))


def measured(module: Perceptron, data: Data, options: Any) -> float:
    return accuracy(module, data.test if options.test else data.validation)


def table(pruned: Sequence[dict[str, Any]], searched: Sequence[dict[str, Any]]) -> str:
    """A line for each preset, way and width: neurons in each layer, accuracy, spread and seconds, means over seeds."""
    lines = [
        "| preset | way | reinit | width | seeds | accuracy | spread | seconds |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    groups: dict[tuple[str, str, str, int], list[dict[str, Any]]] = {}
    for row in pruned:
        groups.setdefault((row["preset"], row["reinit"], row["method"], row["asked"]), []).append(row)
    for (preset, reinit, method, _), rows in sorted(groups.items()):
        values = [row["accuracy"] for row in rows]
        lines.append(line(rows, preset, f"prune, {method}", reinit, max(values) - min(values)))
    for preset in sorted({row["preset"] for row in searched}):
        rows = [row for row in searched if row["preset"] == preset]
        lines.append(line(rows, preset, "search", "random", statistics.fmean(row["spread"] for row in rows)))
    return "\n".join(lines)


def records(searched: Sequence[dict[str, Any]], options: Any) -> Iterator[str]:
    """What the searches of the first seed tried, as text and, beside the table, as figures."""
    for row in searched:
        if row["seed"] != options.seeds[0]:
            continue
        tried = [Trial({"each hidden layer": width}, value, seconds) for width, value, seconds in row["tried"]]
        record = WidthRecord("accuracy, held out", tried, row["chosen"])
        yield f"What the search of seed {row['seed']} tried with the preset `{row['preset']}`, in units of a layer:"
        yield f"```\n{record}\n```"
        if options.out is not None:
            picture = options.out.with_name(f"{options.out.stem}-{row['preset']}.png")
            if not save_picture(record.figure, picture):
                yield f"![Accuracy and seconds of each width]({picture.name})"


def line(rows: Sequence[dict[str, Any]], preset: str, way: str, reinit: str, spread: float) -> str:
    width, value, seconds = (statistics.fmean(row[name] for row in rows) for name in ("width", "accuracy", "seconds"))
    return f"| {preset} | {way} | {reinit} | {width:.0f} | {len(rows)} | {value:.2f} | {spread:.2f} | {seconds:.1f} |"


if __name__ == "__main__":
    main()

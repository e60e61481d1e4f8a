"""How good a network can be of which no weight is ever trained: masks over random weights, CIFAR-10.

    python -m examples.studies.random_networks --data_dir DATA --work runs/random_networks --tune
    python -m examples.studies.random_networks --data_dir DATA --work runs/random_networks --seeds 1 2 3 --test \\
        --out examples/results/random_networks.md

Weights are drawn from the Kaiming normal law and frozen, biases are zero, norms have no learnt scale. All methods share
weights, data order and epochs of a seed. `plain` has five convolutions, `conv-4` is that of Ramanujan et al. (2020) at
half its width, both without batch-norm; `residual` has three residual blocks with batch-norm. With `--tune` every
setting of every method is run at the first of `--sparsities` with seed 0 and measured on the last 5000 training images,
which are never trained on, and the four best at the others. The best setting of each method, net and sparsity is then
used with the seeds of `--seeds` and, with `--test`, on the test images. Edge-popup is tuned over more settings than the
others. `random` is a
random mask at the same ratios (after one epoch, for the statistics of batch-norm), `trained` trains all weights of the
same net by Adam.

The defaults are a small setting: images of 16 x 16, 20,000 of them, 10 epochs. `--size 32 --train 45000 --width 2
--epochs 100` is that of the literature, for those who have a GPU, and with `--tuned_small` it takes the settings that
were the best in the small one. With `--precision bf16-mixed` training (never the
accuracy) uses half precision, which halves the time where the processor has instructions for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from examples.studies.common import (
    Cells,
    Classifier,
    Data,
    Images,
    accuracy,
    arguments,
    fit,
    load,
    made_by,
    paired_table,
)
from lightning_prune import EdgePopup, ProbMask, PruningCallback, SparseBinaryMask, Supermask

# Nets ----------------------------------------------------------------------------------------------------------------


def sequence(blocks: Sequence[Sequence[int]], hidden: Sequence[int], size: int) -> nn.Module:
    """Blocks of convolutions of the given widths, each block with a pool behind it, and linear layers."""
    layers: list[nn.Module] = []
    inputs = 3
    for block in blocks:
        for outputs in block:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
        size //= 2
    layers.append(nn.Flatten())
    inputs *= size**2
    for outputs in hidden:
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Linear(inputs, 10))


class Block(nn.Module):
    """Two convolutions with batch-norm beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(inputs, outputs, 3, stride), nn.ReLU(), convolution(outputs, outputs, 3, 1)
        )
        self.shortcut = convolution(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Module:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs, affine=False))


def residual(width: int, size: int) -> nn.Module:
    stem = convolution(3, 24 * width, 3, 1), nn.ReLU(), nn.MaxPool2d(2)
    blocks = Block(24 * width, 24 * width, 1), Block(24 * width, 48 * width, 2), Block(48 * width, 96 * width, 2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96 * width, 10))


NETS: dict[str, Callable[[int, int], nn.Module]] = {
    "plain": lambda w, size: sequence([[32 * w], [32 * w, 64 * w], [64 * w, 64 * w]], [128 * w], size),
    "conv-4": lambda w, size: sequence([[32 * w, 32 * w], [64 * w, 64 * w]], [128 * w, 128 * w], size),
    "residual": residual,
}

# Methods -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A method with the settings that it is tuned over.

    Args:
        callback: Makes the callback of a sparsity, a seed and a setting; None where all weights are trained.
        settings: The settings.
    """

    callback: Callable[..., PruningCallback | None]
    settings: list[dict[str, Any]] = field(default_factory=lambda: [{}])


def rates(optimizer: str, *values: float, **more: Any) -> list[dict[str, Any]]:
    return [{"optimizer": optimizer, "lr": value, **more} for value in values]


METHODS = {
    "trained": Method(lambda **_: None),
    "random": Method(lambda **rest: EdgePopup(lr=1e-12, **rest)),
    "edge-popup": Method(
        EdgePopup,
        [
            *rates("sgd", 0.3, 0.5, 1.0, weight_decay=0.0),
            *rates("sgd", 0.5, weight_decay=1e-4),
            *rates("adam", 1e-3, 3e-3, 1e-2, weight_decay=0.0),
            *rates("lion", 1e-3, 3e-3, weight_decay=0.0),
            *rates("normalised_sgd", 1e-3, 3e-3, 1e-2, weight_decay=0.0),
        ],
    ),
    "supermask": Method(Supermask, [*rates("sgd", 30.0, 100.0), *rates("adam", 0.03, 0.1)]),
    "prob-mask": Method(ProbMask, [*rates("adam", 6e-3, 2e-2), *rates("sgd", 1.0, 10.0)]),
    "binary": Method(
        lambda **rest: SparseBinaryMask(forward="binary", **rest),
        [*rates("sgd", 0.1, 0.3, 1.0), *rates("lion", 3e-4, 1e-3, 3e-3)],
    ),
    "sparse-binary-mask": Method(
        SparseBinaryMask,
        [*rates("normalised_sgd", 3e-3, 1e-2, 3e-2), *rates("sgd", 3.0, 10.0), *rates("lion", 0.003, 0.01)],
    ),
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "no variance match": {"variance_match": False},
    "no binary tail": {"anneal": 1.0},
    "one budget for all": {"scope": "global"},
    "no annealing": {"temperature": [0.3, 0.3]},
    "statistics anew": {"recalibrate": 20},
}
SMALL = {"epochs": 10, "size": 16, "train": 20_000, "width": 1}
DEFAULT = ["trained", "random", "edge-popup", "sparse-binary-mask"]

# The study -----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=DEFAULT)
    parser.add_argument("--tune", action="store_true", help="try settings with seed 0")
    parser.add_argument("--ablate", action="store_true", help="change an ingredient of sparse-binary-mask at a time")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--size", type=int, choices=[16, 32], help="of the images")
    parser.add_argument("--width", type=int, help="factor of all widths; 2 makes conv-4 that of the paper")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true", help="of the training")
    parser.add_argument("--tuned_small", action="store_true", help="use what was the best at the default size")
    parser.set_defaults(**SMALL, seeds=[1, 2, 3])
    options = parser.parse_args()
    cells = Cells(options.work / "cells.jsonl")
    data = shrunk(load("CIFAR10", options.data_dir, options.train), 32 // options.size)
    seeds = [0] if options.tune else options.seeds
    keys = []
    for net in options.nets:
        for sparsity in options.sparsities:
            for name, setting in planned(net, sparsity, cells, options):
                for seed in seeds:
                    key = cell(net, name, setting, 0.0 if name == "trained" else sparsity, seed, options)
                    cells.run(key, partial(measured, key, data, options))
                    keys.append(key)
    of_seed = [row for row in cells if row["seed"] == 0 and tried_alike(row, options)]
    tried = tuning_table([row for row in of_seed if row["sparsity"] in (0.0, *options.sparsities)])
    text = f"# Random networks\n\n{(__doc__ or '').strip()}\n\n{made_by()}\n\n"
    if not options.tune:
        rows = [row for row in cells if any(key.items() <= row.items() for key in keys)]
        rows.sort(key=lambda row: (options.nets.index(row["net"]), row["sparsity"]))
        text += paired_table(rows, ["net", "sparsity"], "edge-popup", "accuracy", ["loss", "seconds"]) + "\n\n"
    print(text + tried)
    if options.out is not None:
        options.out.write_text(text + tried)


def common(options: Any) -> dict[str, Any]:
    """What results must have in common to be compared."""
    return {name: getattr(options, name) for name in ("epochs", "size", "train", "width", "precision", "test")}


def tried_alike(row: dict[str, Any], options: Any) -> bool:
    """Whether a row is of the nets and the size at which settings are, or were, tuned."""
    size = common(options) | {"test": False} | (SMALL if options.tuned_small else {})
    return row["net"] in options.nets and size.items() <= row.items()


def cell(net: str, name: str, setting: dict[str, Any], sparsity: float, seed: int, options: Any) -> dict[str, Any]:
    used = {"net": net, "sparsity": sparsity, "seed": seed, "method": name, "setting": setting}
    return used | common(options)


def planned(net: str, sparsity: float, cells: Cells, options: Any) -> list[tuple[str, dict[str, Any]]]:
    """What to run on a net: settings to try when tuning, else the best one of each method."""
    first = options.sparsities[0]
    if options.tune and sparsity == first:
        return [(name, setting) for name in options.methods for setting in METHODS[name].settings]
    if options.tune:
        return [(name, setting) for name in options.methods for setting in ranked(net, first, name, cells, options)[:4]]
    chosen = [(name, ranked(net, sparsity, name, cells, options)[0]) for name in options.methods]
    if options.ablate:
        whole = ranked(net, sparsity, "sparse-binary-mask", cells, options)[0]
        chosen += [(name, whole | change) for name, change in ABLATIONS.items()]
    return chosen


def ranked(net: str, sparsity: float, name: str, cells: Cells, options: Any) -> list[dict[str, Any]]:
    """The settings of a method that were tried, the one of the highest accuracy on the images held out first."""
    wanted = {"net": net, "method": name, "seed": 0, "sparsity": 0.0 if name == "trained" else sparsity}
    tried = [row for row in cells if tried_alike(row, options) and wanted.items() <= row.items()]
    if len(tried) < min(len(METHODS[name].settings), 4):
        raise SystemExit(f"{name} has not been tuned on {net} at {sparsity:.0%}: run with --tune first")
    return [row["setting"] for row in sorted(tried, key=lambda row: -row["accuracy"])]


def measured(key: dict[str, Any], data: Data, options: Any) -> dict[str, Any]:
    """Accuracy and training loss of one fit."""
    L.seed_everything(key["seed"], verbose=False)
    module = Classifier(NETS[key["net"]](options.width, options.size), 1e-3)
    module.to(memory_format=torch.channels_last)
    method = METHODS["sparse-binary-mask" if key["method"] in ABLATIONS else key["method"]]
    callback = method.callback(remove=key["sparsity"], seed=key["seed"], shrink="never", **key["setting"])
    start, losses = time.monotonic(), LastLosses()
    epochs = 1 if key["method"] == "random" else options.epochs  # of which nothing is learnt but batch-norm statistics
    fit(module, data.train, epochs, *([callback] if callback else []), losses, precision=options.precision)
    images = data.test if options.test else data.validation
    found = {"accuracy": accuracy(module, images), "loss": losses.mean(), "seconds": time.monotonic() - start}
    return found | {"reached": callback.report.reached if callback else 0.0}


class LastLosses(L.Callback):
    """Mean training loss over the last epoch."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.found.clear()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.found.append(float(outputs["loss"]))

    def mean(self) -> float:
        return sum(self.found) / len(self.found)


def shrunk(data: Data, factor: int) -> Data:
    def smaller(part: Images) -> Images:
        pooled = avg_pool2d(part.images.float(), factor) if factor > 1 else part.images
        return Images(pooled, part.labels, part.mean, part.deviation, part.flip)

    return Data(smaller(data.train), smaller(data.validation), smaller(data.test))


def tuning_table(rows: Sequence[dict[str, Any]]) -> str:
    """All settings that were tried, on the images held out."""
    lines = ["Tried on the images held out (seed 0):", ""]
    lines += ["| net | sparsity | method | setting: accuracy |", "|---|---|---|---|"]
    tried: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in rows:
        tried.setdefault((row["net"], row["sparsity"], row["method"]), []).append(row)
    for (net, sparsity, method), found in sorted(tried.items(), key=lambda item: item[0][:2]):
        top = max(row["accuracy"] for row in found)
        shown = [
            f"{' '.join(map(str, row['setting'].values())) or '-'}: "
            + (f"**{row['accuracy']:.2f}**" if row["accuracy"] == top else f"{row['accuracy']:.2f}")
            for row in found
        ]
        lines.append(f"| {net} | {sparsity:g} | {method} | {'; '.join(shown)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

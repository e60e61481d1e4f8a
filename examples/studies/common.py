"""What the studies share: images in memory, nets, a quiet fit, cells that are not computed twice, and paired tables."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import os
import platform
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.io import ImageReadMode, decode_image

HELD_OUT = 5000
"""Training images, the last ones, on which every choice is made."""

# Data ----------------------------------------------------------------------------------------------------------------


class Images(Dataset):
    """Images in memory, handed out batch by batch with mean 0 and variance 1, flipped at random if told."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, deviation: Tensor, flip: bool) -> None:
        self.images, self.labels, self.mean, self.deviation, self.flip = images, labels, mean, deviation, flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(indices)
        images = (self.images[index].float() - self.mean) / self.deviation
        if self.flip:
            images = images.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1))
        return images, self.labels[index]


@dataclass(frozen=True)
class Data:
    """The parts of a data set."""

    train: Images
    validation: Images
    test: Images


def load(name: str, folder: Path, limit: int | None = None) -> Data:
    """MNIST or CIFAR10, from the first that ``folder`` holds: the files torchvision works with (as it downloads them),
    ``<name>/train/<class>/*`` and ``<name>/test/<class>/*``, or ``<name>*train.npz`` and ``<name>*test.npz`` with the
    arrays ``jpeg`` (all files end to end), ``offsets`` and ``labels``.

    Args:
        name: ``"MNIST"`` or ``"CIFAR10"``.
        folder: Where the data is.
        limit: Number of training images, the first ones; default all but those held out.
    """
    images, labels = _part(name, folder, True)
    seen = slice(min(limit or len(images), len(images) - HELD_OUT))
    sample = images[seen][:10_000].double()
    mean, deviation = (f(sample, (0, 2, 3)).float()[:, None, None] for f in (torch.mean, torch.std))

    def part(images: Tensor, labels: Tensor, flip: bool = False) -> Images:
        return Images(images, labels, mean, deviation, flip)

    return Data(
        part(images[seen], labels[seen], name != "MNIST"),
        part(images[-HELD_OUT:], labels[-HELD_OUT:]),
        part(*_part(name, folder, False)),
    )


def _part(name: str, folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    word = "train" if train else "test"
    files = sorted(folder.glob(f"{name.lower()}*{word}.npz"))
    if (folder / name / word).is_dir():
        return _from_classes(folder / name / word)
    if files:
        stored = np.load(files[0])
        packed, offsets = torch.from_numpy(stored["jpeg"]), stored["offsets"]
        images = [decode_image(packed[a:b]) for a, b in itertools.pairwise(offsets)]
        return torch.stack(images), torch.from_numpy(stored["labels"])
    known = getattr(datasets, name)(str(folder), train=train)
    images = torch.as_tensor(known.data)
    return images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2), torch.as_tensor(known.targets)


def _from_classes(folder: Path) -> tuple[Tensor, Tensor]:
    """Images of one folder for each class, in an order that has nothing to do with the class."""
    samples = datasets.ImageFolder(str(folder)).samples
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    images = [decode_image(samples[i][0], ImageReadMode.UNCHANGED) for i in order]
    return torch.stack(images), torch.tensor([samples[i][1] for i in order])


def batches(part: Images, size: int = 128, shuffle: bool = True) -> DataLoader:
    return DataLoader(part, size, shuffle, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch


# Nets ----------------------------------------------------------------------------------------------------------------


def lenet_300_100() -> nn.Module:
    """LeNet-300-100 (LeCun et al., 1998), for MNIST."""
    layers = nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def small_conv(width: int = 32) -> nn.Module:
    """Three convolutions with batch-norm and a linear layer, for CIFAR-10."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, width), (width, 2 * width), (2 * width, 2 * width)):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * width, 10))


def conv(depth: int) -> nn.Module:
    """Conv-2, Conv-4 or Conv-6 (Frankle & Carbin, 2019), for CIFAR-10."""
    layers: list[nn.Module] = []
    inputs = 3
    for block in range(depth // 2):
        outputs = 64 * 2**block
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        inputs = outputs
    flat = inputs * (32 // 2 ** (depth // 2)) ** 2
    dense = nn.Linear(flat, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    return nn.Sequential(*layers, nn.Flatten(), *dense)


class Residual(nn.Module):
    """Two convolutions with batch-norm beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def small_resnet(width: int = 16, blocks: int = 1) -> nn.Module:
    """A residual net of three stages with batch-norm, for CIFAR-10."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage in range(3):
        for block in range(blocks):
            outputs = width * 2**stage
            layers.append(Residual(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


@dataclass(frozen=True)
class Task:
    """A net and the data it is for."""

    data: str
    net: Callable[[], nn.Module]


TASKS = {
    "lenet-300-100": Task("MNIST", lenet_300_100),
    "small-conv": Task("CIFAR10", small_conv),
    "conv-2": Task("CIFAR10", lambda: conv(2)),
    "conv-4": Task("CIFAR10", lambda: conv(4)),
    "conv-6": Task("CIFAR10", lambda: conv(6)),
    "small-resnet": Task("CIFAR10", small_resnet),
}

# Training ------------------------------------------------------------------------------------------------------------


class Classifier(L.LightningModule):
    """Trains a net by Adam with a cosine schedule over the fit."""

    def __init__(self, net: nn.Module, rate: float) -> None:
        super().__init__()
        self.net, self.rate = net, rate

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    module: L.LightningModule, part: Images, epochs: int, *callbacks: L.Callback, precision: Any = "32-true"
) -> None:
    """Train without a word and without files."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            max_epochs=epochs, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, precision=precision,
        )  # fmt: skip
        trainer.fit(module, batches(part))


@torch.no_grad()
def accuracy(module: nn.Module, part: Images) -> float:
    """Percentage of the images that are classified right."""
    training = module.training
    module.eval()
    device = next(module.parameters()).device
    right = 0
    for images, labels in batches(part, 1000, shuffle=False):
        right += int((module(images.to(device)).argmax(1).cpu() == labels).sum())
    module.train(training)
    return 100 * right / len(part)


# Results -------------------------------------------------------------------------------------------------------------


class Cells:
    """Results in a file of JSON lines; what is in it is not computed again.

    Several processes may work on different cells of one file at the same time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            if line.endswith("}"):  # else it is empty, or the process that wrote it was killed in the middle
                yield json.loads(line)

    def run(self, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        """Do the work unless there is a result with this key."""
        if any(key.items() <= row.items() for row in self):
            return
        row = {**key, **work()}
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(row))  # a line of its own, whatever a killed process has left behind
        print(json.dumps(row), flush=True)


def paired_table(
    rows: Sequence[dict[str, Any]], groups: Sequence[str], reference: str, value: str, more: Sequence[str] = ()
) -> str:
    """A Markdown table with a line for each method in each group, and its paired difference to a reference method.

    Args:
        rows: Cells, each with a ``method``, a ``seed`` and numbers; pairs are those of equal group and seed.
        groups: Names of what makes a group, such as the sparsity.
        reference: The method to compare with.
        value: Name of the number that is compared.
        more: Names of further numbers whose means are shown.
    """
    head = [*groups, "method", "seeds", f"{value}, mean ± sd", f"minus {reference}, mean ± standard error", *more]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * (len(groups) + 1) + "--:|" * (len(head) - len(groups) - 1)]
    by_line: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_line.setdefault((*(row[name] for name in groups), row["method"]), {})[row["seed"]] = row
    for line, found in by_line.items():
        compared = by_line.get((*line[:-1], reference), {})
        pairs = [found[seed][value] - compared[seed][value] for seed in found if seed in compared]
        own = line[-1] == reference or not pairs
        cells = [*line, len(found), with_error([row[value] for row in found.values()], root=False)]
        cells += ["" if own else with_error(pairs, root=True, sign="+")]
        cells += [f"{statistics.mean(row[name] for row in found.values()):.2f}" for name in more]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def with_error(values: Sequence[float], root: bool, sign: str = "") -> str:
    """Mean ± standard deviation, or with ``root`` ± standard error of the mean."""
    mean = f"{statistics.mean(values):{sign}.2f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / (math.sqrt(len(values)) if root else 1):.2f}"


def made_by() -> str:
    """The command and the machine, as a sentence."""
    name = getattr(sys.modules["__main__"], "__spec__", None)
    command = f"python -m {name.name}" if name else f"python {sys.argv[0]}"
    return (
        f"Made by `{' '.join([command, *sys.argv[1:]])}` on {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores ({torch.get_num_threads()} threads used), Python {platform.python_version()}, torch "
        f"{torch.__version__}, lightning {L.__version__}."
    )


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every study has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with MNIST and CIFAR-10; see common.load")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of finished cells; what is there is not redone"
    )
    parser.add_argument("--out", type=Path, help="Markdown file for the table; it is printed otherwise")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--train", type=int, help="use only so many training images")
    parser.add_argument("--test", action="store_true", help="measure on the test images, not on those held out")
    return parser

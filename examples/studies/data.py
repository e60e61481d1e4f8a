"""Images in memory: MNIST and CIFAR-10 in several kinds of files, and the digits of scikit-learn."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets

HELD_OUT = 5000
"""Training images, the last ones, on which every choice is made; a fifth of them if there are fewer than 25,000."""


class Images(Dataset[tuple[Tensor, Tensor]]):
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

    def first(self, count: int) -> Images:
        """So many of them."""
        return Images(self.images[:count], self.labels[:count], self.mean, self.deviation, self.flip)


@dataclass(frozen=True)
class Data:
    """The parts of a data set."""

    train: Images
    validation: Images
    test: Images


@functools.lru_cache(maxsize=4)
def load(name: str, folder: Path, limit: int | None = None, pool: int = 1) -> Data:
    """MNIST or CIFAR10, from the first that ``folder`` holds: the files torchvision works with (as it downloads them),
    ``<name>/train/<class>/*`` and ``<name>/test/<class>/*``, or ``<name>*train.npz`` and ``<name>*test.npz`` with the
    arrays ``jpeg`` (all files end to end), ``offsets`` and ``labels``; or the digits of scikit-learn.

    Args:
        name: ``"MNIST"``, ``"CIFAR10"`` or ``"digits"``.
        folder: Where the data is.
        limit: Number of training images, the first ones; default all but those held out.
        pool: Factor by which images are made smaller.
    """
    images, labels = _part(name, folder, True)
    held_out = min(HELD_OUT, len(images) // 5)
    seen = slice(min(limit or len(images), len(images) - held_out))
    sample = images[seen][:10_000].double()
    mean, deviation = (f(sample, (0, 2, 3)).float()[:, None, None] for f in (torch.mean, torch.std))

    def part(images: Tensor, labels: Tensor, flip: bool = False) -> Images:
        smaller = avg_pool2d(images.float(), pool) if pool > 1 else images
        return Images(smaller, labels, mean, deviation, flip)

    return Data(
        part(images[seen], labels[seen], name == "CIFAR10"),
        part(images[-held_out:], labels[-held_out:]),
        part(*_part(name, folder, False)),
    )


def _part(name: str, folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    if name == "digits":
        digits = load_digits()
        chosen = slice(None, 1437) if train else slice(1437, None)
        return torch.from_numpy(digits.images[chosen]).float()[:, None], torch.from_numpy(digits.target[chosen])
    word = "train" if train else "test"
    files = sorted(folder.glob(f"{name.lower()}*{word}.npz"))
    if (folder / name / word).is_dir():
        return _from_classes(folder / name / word)
    if files:
        stored = np.load(files[0])
        packed, offsets = stored["jpeg"], stored["offsets"]
        images = _decoded(io.BytesIO(packed[a:b]) for a, b in itertools.pairwise(offsets))
        return images, torch.from_numpy(stored["labels"])
    known = getattr(datasets, name)(str(folder), train=train)
    return _channels_first(torch.as_tensor(known.data)), torch.as_tensor(known.targets)


def _from_classes(folder: Path) -> tuple[Tensor, Tensor]:
    """Images of one folder for each class, in an order that has nothing to do with the class."""
    samples = datasets.ImageFolder(str(folder)).samples
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    return _decoded(samples[i][0] for i in order), torch.tensor([samples[i][1] for i in order])


def _decoded(files: Iterable[Any]) -> Tensor:
    """Images of equal size from files, or from names of files."""
    return _channels_first(torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]))


def _channels_first(images: Tensor) -> Tensor:
    return images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)


def batches(part: Images, size: int = 128, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(part, size, shuffle, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch

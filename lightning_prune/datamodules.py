"""Data for the demo, the recipes and the examples: scikit-learn's digits and four sets of torchvision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from lightning_prune.choices import unknown_name
from lightning_prune.errors import ConfigurationError

Batch = tuple[Tensor, Tensor]
TorchvisionName = Literal["MNIST", "FashionMNIST", "CIFAR10", "CIFAR100"]


class _Statistics(NamedTuple):
    """Mean and standard deviation of each colour of a training set whose values lie in [0, 1]."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]


_AS_IT_IS = _Statistics((0.0,), (1.0,))
_TORCHVISION: dict[str, _Statistics] = {
    "MNIST": _Statistics((0.1307,), (0.3081,)),
    "FashionMNIST": _Statistics((0.2860,), (0.3530,)),
    "CIFAR10": _Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR100": _Statistics((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


class EpochShuffle(Sampler[int]):
    """Shuffles by seed and epoch alone, so a resumed fit sees its batches in the order it would have seen them.

    Lightning calls ``set_epoch`` at the start of each epoch, and replaces the sampler by torch's distributed one when
    several processes train.

    Args:
        size: Number of samples.
        seed: Seed of the whole sequence of orders.

    Example:
        >>> sampler = EpochShuffle(size=4, seed=0)
        >>> first = list(sampler)
        >>> sorted(first), first == list(sampler)
        ([0, 1, 2, 3], True)
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the given epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


def shift_randomly(images: Tensor, pixels: int) -> Tensor:
    """Move each image by up to ``pixels`` in both directions, filling with zeros.

    Args:
        images: Shape ``[N, C, H, W]``.
        pixels: Largest shift.

    Returns:
        Images of the same shape.

    Example:
        >>> shift_randomly(torch.ones(5, 1, 8, 8), pixels=2).shape
        torch.Size([5, 1, 8, 8])
    """
    count, _, height, width = images.shape
    padded = functional.pad(images, (pixels,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(2 * pixels + 1, (2, count))
    return windows[torch.arange(count), :, down, right]


@dataclass(frozen=True)
class _Collate:
    """Makes one normalised batch out of raw samples; a class at module level, so that worker processes can have it."""

    statistics: _Statistics
    shift: int = 0
    mirror: bool = False

    def __call__(self, samples: Sequence[Batch]) -> Batch:
        images = torch.stack([image for image, _ in samples])
        if images.dtype == torch.uint8:
            images = images / 255
        if self.shift:
            images = shift_randomly(images, self.shift)
        if self.mirror:
            images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
        mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in self.statistics)
        return (images - mean) / deviation, torch.stack([label for _, label in samples])


class _ImageDataModule(LightningDataModule):
    """Three sets of images held in memory, and the loaders over them."""

    train_set: Dataset[Any]
    val_set: Dataset[Any]
    test_set: Dataset[Any]

    def __init__(self, batch_size: int, seed: int, train_collate: _Collate, collate: _Collate) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigurationError(f"batch_size={batch_size} is not a size: give at least 1.")
        self.batch_size = batch_size
        self.seed = seed
        self._train_collate = train_collate
        self._collate = collate

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, in an order that depends on seed and epoch alone."""
        sampler = EpochShuffle(len(self.train_set), self.seed)  # type: ignore[arg-type]
        return DataLoader(self.train_set, batch_size=self.batch_size, sampler=sampler, collate_fn=self._train_collate)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches, in fixed order."""
        return DataLoader(self.val_set, batch_size=self.batch_size, collate_fn=self._collate)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches, in fixed order."""
        return DataLoader(self.test_set, batch_size=self.batch_size, collate_fn=self._collate)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test batches once more."""
        return self.test_dataloader()


class DigitsDataModule(_ImageDataModule):
    """The 1797 handwritten digits that ship inside scikit-learn, so nothing is downloaded.

    A batch is ``(images, labels)``: float32 of shape ``[N, 1, 8, 8]`` with values in [0, 1], and int64 of shape
    ``[N]``. The split is stratified by digit and fixed by ``seed``.

    Args:
        batch_size: Images in a batch.
        val_fraction: Fraction of all images held out for validation.
        test_fraction: Fraction of all images held out for the test.
        seed: Seed of the split and of the order of the training images.
        augment: Whether to move each training image by up to one pixel in both directions.

    Raises:
        ConfigurationError: If the fractions leave a set empty, or scikit-learn is not installed (at ``setup``).

    Example:
        >>> data = DigitsDataModule(batch_size=32)
        >>> data.setup()
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """

    num_classes = 10

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        seed: int = 0,
        augment: bool = False,
    ) -> None:
        super().__init__(
            batch_size, seed, train_collate=_Collate(_AS_IT_IS, shift=int(augment)), collate=_Collate(_AS_IT_IS)
        )
        if not (0 < val_fraction < 1 and 0 < test_fraction < 1 and val_fraction + test_fraction < 1):
            raise ConfigurationError(
                f"val_fraction={val_fraction} and test_fraction={test_fraction} leave one of the three sets empty: "
                "give two positive numbers that add up to less than 1."
            )
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.augment = augment

    def setup(self, stage: str | None = None) -> None:
        """Read the digits and split them; the same for every stage."""
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ConfigurationError(
                'DigitsDataModule reads the digits that ship with scikit-learn: pip install "lightning-prune[demo]".'
            ) from error
        digits = load_digits()
        labels = torch.from_numpy(digits.target).long()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        rest, test = train_test_split(
            range(len(labels)), test_size=self.test_fraction, stratify=labels, random_state=self.seed
        )
        train, val = train_test_split(
            rest, test_size=self.val_fraction / (1 - self.test_fraction), stratify=labels[rest], random_state=self.seed
        )
        self.train_set, self.val_set, self.test_set = (
            TensorDataset(images[part], labels[part]) for part in (train, val, test)
        )


class TorchvisionDataModule(_ImageDataModule):
    """MNIST, Fashion-MNIST, CIFAR-10 or CIFAR-100 through torchvision, held in memory and normalised.

    A batch is ``(images, labels)``: float32 of shape ``[N, C, H, W]`` with mean 0 and deviation 1 over the training
    set, and int64 of shape ``[N]``.

    Args:
        name: Name of the data set, as in ``torchvision.datasets``.
        data_dir: The folder that torchvision keeps its data sets in.
        download: Whether to fetch what is missing there.
        batch_size: Images in a batch.
        val_size: Number of training images held out for validation.
        seed: Seed of the split and of the order of the training images.
        augment: Whether to move each training image by up to three pixels (CIFAR: four) in both directions, and to
            mirror half of the CIFAR ones.

    Raises:
        ConfigurationError: If the name is not known, or the files are not in ``data_dir`` (at ``setup``).

    Example:
        >>> data = TorchvisionDataModule("MNIST", data_dir="data")
        >>> data.num_classes
        10
    """

    def __init__(
        self,
        name: TorchvisionName,
        data_dir: str = "data",
        download: bool = False,
        batch_size: int = 128,
        val_size: int = 5000,
        seed: int = 0,
        augment: bool = False,
    ) -> None:
        if name not in _TORCHVISION:
            raise unknown_name("data set", name, _TORCHVISION)
        statistics = _TORCHVISION[name]
        colour = len(statistics.mean) == 3
        shift = 4 if colour else 3
        augmented = _Collate(statistics, shift=shift * augment, mirror=colour and augment)
        super().__init__(batch_size, seed, train_collate=augmented, collate=_Collate(statistics))
        self.name = name
        self.data_dir = data_dir
        self.download = download
        self.val_size = val_size
        self.augment = augment
        self.num_classes = 100 if name == "CIFAR100" else 10

    def prepare_data(self) -> None:
        """Fetch the files, if that was asked for."""
        if self.download:
            for train in (True, False):
                self._read(train, download=True)

    def setup(self, stage: str | None = None) -> None:
        """Read the files and split the training images; the same for every stage."""
        images, labels = self._read(train=True)
        if not 0 < self.val_size < len(labels):
            raise ConfigurationError(
                f"val_size={self.val_size} does not split the {len(labels)} training images of {self.name}: "
                f"give a number between 1 and {len(labels) - 1}."
            )
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        val, train = order[: self.val_size], order[self.val_size :]
        self.train_set = TensorDataset(images[train], labels[train])
        self.val_set = TensorDataset(images[val], labels[val])
        self.test_set = TensorDataset(*self._read(train=False))

    def _read(self, train: bool, download: bool = False) -> Batch:
        from torchvision import datasets

        try:
            raw = getattr(datasets, str(self.name))(self.data_dir, train=train, download=download)
        except RuntimeError as error:
            raise ConfigurationError(
                f"{self.name} is not in {Path(self.data_dir).absolute()}: name its folder in data_dir, "
                f"or fetch it with download=True. torchvision said: {error}"
            ) from error
        return images_first(torch.as_tensor(raw.data)), torch.as_tensor(raw.targets)


def images_first(pixels: Tensor) -> Tensor:
    """Bring pixels as torchvision stores them into the layout that networks read.

    Args:
        pixels: Grey images of shape ``[N, H, W]`` or coloured ones of shape ``[N, H, W, C]``.

    Returns:
        The same pixels in shape ``[N, C, H, W]``.

    Example:
        >>> images_first(torch.zeros(5, 28, 28)).shape, images_first(torch.zeros(5, 32, 32, 3)).shape
        (torch.Size([5, 1, 28, 28]), torch.Size([5, 3, 32, 32]))
    """
    return pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)

"""The nets of the studies, and the data they are for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from examples.studies.data import Data, load


def lenet_300_100() -> nn.Module:
    """LeNet-300-100 (LeCun et al., 1998), for MNIST."""
    layers = nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def small_conv(width: int = 32, colours: int = 3, size: int = 32) -> nn.Module:
    """Three convolutions with batch-norm and a linear layer, for images of the given size."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((colours, width), (width, 2 * width), (2 * width, 2 * width)):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * width * (size // 8) ** 2, 10))


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


def small_resnet(width: int = 16, blocks: int = 1, colours: int = 3, stride: int = 1) -> nn.Module:
    """A residual net of three stages with batch-norm."""
    first = nn.Conv2d(colours, width, 3, stride, 1, bias=False)
    layers: list[nn.Module] = [first, nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage in range(3):
        for block in range(blocks):
            outputs = width * 2**stage
            layers.append(Residual(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


@dataclass(frozen=True)
class Task:
    """A net and the data it is for.

    Args:
        data: Name of the data.
        net: Makes the net.
        pool: Factor by which images are made smaller.
        images: Number of training images, unless another one is asked for; None for all.
        passes: Factor of the epochs, where the images are few.
        rate: Learning rate of Adam to begin with. For the nets with batch-norm on few images the best one for the dense
            net in ten epochs among 0.001, 0.003 and 0.01, on the images held out.
    """

    data: str
    net: Callable[[], nn.Module]
    pool: int = 1
    images: int | None = None
    passes: int = 1
    rate: float = 1e-3

    def load(self, folder: Path, limit: int | None = None) -> Data:
        """The images."""
        return load(self.data, folder, limit or self.images, self.pool)


TASKS = {
    "lenet-300-100": Task("MNIST", lenet_300_100),
    "small-conv": Task("CIFAR10", small_conv),
    "conv-2": Task("CIFAR10", lambda: conv(2)),
    "conv-4": Task("CIFAR10", lambda: conv(4)),
    "conv-6": Task("CIFAR10", lambda: conv(6)),
    "small-resnet": Task("CIFAR10", small_resnet),
    "mnist-conv": Task("MNIST", lambda: small_conv(8, 1, 14), pool=2, images=10_000, rate=1e-2),
    "mnist-resnet": Task("MNIST", lambda: small_resnet(8, 1, 1, 2), pool=2, images=10_000, rate=1e-2),
    "cifar-conv": Task("CIFAR10", lambda: small_conv(16, 3, 16), pool=2, images=10_000, rate=1e-2),
    "cifar-resnet": Task("CIFAR10", lambda: small_resnet(12, 1, 3, 2), pool=2, images=10_000, rate=1e-2),
    "digits-conv": Task("digits", lambda: small_conv(16, 1, 8), passes=4, rate=3e-3),
    "digits-resnet": Task("digits", lambda: small_resnet(12, colours=1), passes=4, rate=3e-3),
}
"""Nets by name; those with MNIST or CIFAR in theirs are small, and for 10,000 images of half the size."""

SMALL = ["mnist-conv", "mnist-resnet", "cifar-conv", "cifar-resnet"]
"""A plain and a residual net for MNIST and for CIFAR-10."""

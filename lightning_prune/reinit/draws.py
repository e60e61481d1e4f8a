"""Draws from empirical laws, one law for each class of values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Moments(NamedTuple):
    """Mean, standard deviation and size of the class that each value belongs to."""

    mean: Tensor
    deviation: Tensor
    size: Tensor


def filters_of(module: nn.Module, shape: torch.Size) -> Tensor:
    """The number of the filter (output channel) that each entry of a module's weight belongs to, in its shape.

    Example:
        >>> filters_of(nn.Linear(2, 3), torch.Size([3, 2])).tolist()
        [[0, 0], [1, 1], [2, 2]]
        >>> filters_of(nn.ConvTranspose1d(4, 2, 1, groups=2), torch.Size([4, 1, 1])).flatten().tolist()
        [0, 0, 1, 1]
    """
    rows = torch.arange(shape[0])[:, None]
    if getattr(module, "transposed", False):
        # Transposed convolutions hold their weights as [in, out / groups, ...].
        group = rows // (shape[0] // int(getattr(module, "groups", 1)))
        rows = group * shape[1] + torch.arange(shape[1])
    return rows.reshape(*rows.shape, *[1] * (len(shape) - 2)).expand(shape)


def permuted(values: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
    """The values of each class in a random order.

    Args:
        values: The values, shape ``[n]``.
        classes: The class of each, int64 of shape ``[n]``, at least 0.
        generator: Source of randomness.
    """
    order = torch.randperm(len(values), generator=generator, device=generator.device)
    sources = order[torch.argsort(classes[order], stable=True)]
    drawn = torch.empty_like(values)
    drawn[torch.argsort(classes, stable=True)] = values[sources]
    return drawn


def bootstrapped(values: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
    """For each value one of its class, drawn with replacement; arguments as for :func:`permuted`."""
    by_class = torch.argsort(classes, stable=True)
    counts = torch.bincount(classes)
    starts = counts.cumsum(0) - counts
    share = torch.rand(len(values), generator=generator, device=generator.device, dtype=torch.float64)
    picked = (share * counts[classes]).long()
    return values[by_class[starts[classes] + picked]]


def smoothed(values: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
    """A draw from the Gaussian kernel estimate of each class's law; arguments as for :func:`permuted`.

    The width of the kernel is Silverman's, ``0.9 * deviation * n ** -0.2``.
    """
    _, deviation, size = moments(values, classes)
    noise = _normal(values, generator) * 0.9 * deviation * size**-0.2
    return bootstrapped(values, classes, generator) + noise


def gaussian(values: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
    """A draw from the normal law with each class's mean and deviation; arguments as for :func:`permuted`."""
    mean, deviation, _ = moments(values, classes)
    return mean + deviation * _normal(values, generator)


def moments(values: Tensor, classes: Tensor) -> Moments:
    """The moments of each value's class.

    Example:
        >>> moments(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])).deviation.tolist()
        [1.0, 1.0, 0.0]
    """
    exact = values.double()
    size = torch.bincount(classes)[classes].double()
    mean = torch.bincount(classes, weights=exact)[classes] / size
    variance = torch.bincount(classes, weights=(exact - mean) ** 2)[classes] / size
    return Moments(mean, variance.sqrt(), size)


def _normal(values: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(len(values), generator=generator, device=generator.device, dtype=torch.float64)

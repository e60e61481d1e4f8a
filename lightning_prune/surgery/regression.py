"""Least squares of removed units on those that stay, from moments of what is read of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Regression(NamedTuple):
    """Removed units as an affine function of those that stay, entry by entry.

    Args:
        slopes: Shape ``[entries, removed, staying]``.
        constants: Shape ``[entries, removed]``.
    """

    slopes: Tensor
    constants: Tensor


def regress(
    mean: Tensor, products: Tensor, gone: Tensor, stay: Tensor, ridge: float = 1e-3, centred: bool = True
) -> Regression:
    """Ridge regression of removed units on those that stay.

    Args:
        mean: Mean of each entry of each unit, ``[entries, units]``.
        products: Mean products of equal entries of two units, ``[entries, units, units]``.
        gone: Removed units, a bool mask.
        stay: Staying units, a bool mask.
        ridge: What is added to their covariance, relative to its mean diagonal.
        centred: Whether there may be a constant; else the regression goes through the origin.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 7.0, 9.0, 11.0]])  # the second is 3 + 2 times the first
        >>> gone = torch.tensor([False, True])
        >>> found = regress(x.mean(1)[None], (x @ x.T / 4)[None], gone, ~gone, ridge=0.0)
        >>> found.slopes.flatten().round(decimals=4), found.constants.flatten().round(decimals=4)
        (tensor([2.], dtype=torch.float64), tensor([3.], dtype=torch.float64))
    """
    mean, products = mean.detach().cpu().double(), products.detach().cpu().double()
    gone, stay = gone.cpu(), stay.cpu()
    if not centred:
        mean = torch.zeros_like(mean)
    covariance = products - mean[:, :, None] * mean[:, None, :]
    within, across = covariance[:, stay][:, :, stay], covariance[:, stay][:, :, gone]
    slopes = _solved(within, across, ridge).mT
    return Regression(slopes, mean[:, gone] - (slopes @ mean[:, stay, None]).squeeze(2))


def unexplained(mean: Tensor, products: Tensor, ridge: float = 1e-3, centred: bool = True) -> Tensor:
    """Share of what each unit varies by that :func:`regress` on all the others would leave.

    Args:
        mean: As for :func:`regress`.
        products: As there.
        ridge: As there.
        centred: As there; without a constant, all counts that is not zero.

    Returns:
        Shape ``[entries, units]``; 1 for units that never vary.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 7.0, 9.0, 11.0], [1.0, -1.0, -1.0, 1.0]])
        >>> unexplained(x.mean(1)[None], (x @ x.T / 4)[None], ridge=1e-9).round(decimals=4)
        tensor([[0., 0., 1.]], dtype=torch.float64)
    """
    mean, products = mean.detach().cpu().double(), products.detach().cpu().double()
    covariance = products - mean[:, :, None] * mean[:, None, :] if centred else products
    whole = covariance.diagonal(dim1=-2, dim2=-1)
    added = _added(whole, ridge)
    inverse = torch.linalg.inv(covariance + torch.diag_embed(added))
    left = 1 / inverse.diagonal(dim1=-2, dim2=-1) - added
    return torch.where(whole > 0, (left / whole).clamp(0, 1), 1.0)


def scales(products: Tensor, gone: Tensor, stay: Tensor, ridge: float = 1e-3) -> Tensor:
    """Factors of the staying units by which their sum comes nearest to that of all units (Luo et al., 2017).

    Args:
        products: Inner products of what the units add to a response, ``[units, units]``.
        gone: Removed units, a bool mask.
        stay: Staying units, a bool mask.
        ridge: How strongly factors are drawn towards 1, relative to the mean diagonal of the products.

    Returns:
        Shape ``[staying]``.

    Example:
        >>> parts = torch.tensor([[1.0, 0.0, 3.0], [0.0, 1.0, -0.5]])  # the third is 3, -0.5 of the others
        >>> gone = torch.tensor([False, False, True])
        >>> scales(parts.T @ parts, gone, ~gone, ridge=0.0)
        tensor([4.0000, 0.5000], dtype=torch.float64)
    """
    products, gone, stay = products.detach().cpu().double(), gone.cpu(), stay.cpu()
    missing = products[stay][:, gone].sum(1, keepdim=True)
    return 1 + _solved(products[stay][:, stay], missing, ridge).squeeze(1)


def _solved(within: Tensor, across: Tensor, ridge: float) -> Tensor:
    """Solution of symmetric equations with a ridge relative to their mean diagonal."""
    added = _added(within.diagonal(dim1=-2, dim2=-1), ridge)
    solution: Tensor = torch.linalg.solve(within + torch.diag_embed(added), across)
    return solution


def _added(diagonal: Tensor, ridge: float) -> Tensor:
    """What a ridge adds to a diagonal."""
    # Units that never vary have nothing to tell: the least addition keeps their part at 0.
    added = (ridge * diagonal.mean(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).tiny)
    return added.expand_as(diagonal)

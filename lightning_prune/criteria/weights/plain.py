"""Criteria that look at the weights only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.criteria.weights.base import WeightCriterion, WeightSource, precise


@dataclass(frozen=True)
class Magnitude(WeightCriterion):
    """Absolute value of the weight.

    Example:
        >>> Magnitude().score({"fc.weight": torch.tensor([[2.0, -3.0]])}, WeightSource(), torch.Generator())
        {'fc.weight': tensor([[2., 3.]])}
    """

    def score(
        self, weights: Mapping[str, Tensor], source: WeightSource, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Absolute values."""
        return {name: precise(weight).abs() for name, weight in weights.items()}


@dataclass(frozen=True)
class RandomWeights(WeightCriterion):
    """Independent uniform scores, the baseline that every criterion has to beat.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> scores = RandomWeights().score({"fc.weight": torch.zeros(2, 3)}, WeightSource(), draw)
        >>> scores["fc.weight"].shape
        torch.Size([2, 3])
    """

    def score(
        self, weights: Mapping[str, Tensor], source: WeightSource, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Uniform in [0, 1), drawn on the generator's device in the order of the tensors."""
        return {
            name: torch.rand(weight.shape, generator=generator, device=generator.device)
            for name, weight in weights.items()
        }


@dataclass(frozen=True)
class LAMP(WeightCriterion):
    """Squared weight over the sum of the squares of all weights of its tensor that are no smaller (Lee et al., 2021).

    That is the weight's share in the tensor's distortion at the moment when its turn to go comes, which makes tensors
    comparable without any setting: use it with the global scope. Of equal weights the earlier positions count as the
    smaller ones. The last weight of a tensor that is not all zero always scores 1.

    Example:
        >>> LAMP().score({"fc.weight": torch.tensor([[1.0, -2.0]])}, WeightSource(), torch.Generator())
        {'fc.weight': tensor([[0.2000, 1.0000]])}
    """

    def score(
        self, weights: Mapping[str, Tensor], source: WeightSource, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Scores in [0, 1], on the CPU."""
        return {name: _lamp(weight) for name, weight in weights.items()}


def _lamp(weight: Tensor) -> Tensor:
    # Squares of tiny single-precision numbers would be zero; and on the CPU sums are deterministic on every machine.
    squares = weight.detach().cpu().double().flatten().square()
    ascending, order = squares.sort(stable=True)
    not_smaller = ascending.flip(0).cumsum(0).flip(0)
    # Only zeros have no sum: their score is 0 like that of every other zero.
    shares = ascending / not_smaller.where(not_smaller > 0, torch.ones_like(not_smaller))
    scores = torch.empty_like(squares).scatter_(0, order, shares).view(weight.shape)
    return scores.to(torch.promote_types(weight.dtype, torch.float32))

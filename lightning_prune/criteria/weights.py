"""Criteria that score single weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_prune.choices import unknown_name
from lightning_prune.errors import ConfigurationError, PruneError

WeightCriterionName = Literal["magnitude", "random", "lamp", "snip"]


class WeightCriterion(ABC):
    """Gives every weight an importance score; higher means keep.

    One rule holds for all criteria: the caller adds up the gradients of ``batches`` real batches, with the weights at
    rest, and then scores once.

    Attributes:
        batches: Number of real batches whose gradients the criterion wants; 0 if it looks at the weights only.

    Example:
        >>> class LargeAndSteady(WeightCriterion):
        ...     batches = 4
        ...     def score(self, weights, gradients, generator):
        ...         return {name: weight.abs() - gradients[name].abs() for name, weight in weights.items()}
        >>> weights, gradients = {"fc.weight": torch.tensor([[2.0, -3.0]])}, {"fc.weight": torch.tensor([[0.5, -2.0]])}
        >>> LargeAndSteady().score(weights, gradients, torch.Generator())
        {'fc.weight': tensor([[1.5000, 1.0000]])}
    """

    batches: int = 0

    @abstractmethod
    def score(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Score all weights that may go.

        Args:
            weights: Present value of each tensor, by full name; what is off is zero.
            gradients: Sum over the batches of the gradients of their losses, by full name. Empty if ``batches`` is 0.
            generator: The only source of randomness a criterion may use, so that all processes agree.

        Returns:
            Scores by full name, each of its weight's shape; finite, higher = keep, comparable across tensors.
        """


@dataclass(frozen=True)
class Magnitude(WeightCriterion):
    """Absolute value of the weight.

    Example:
        >>> Magnitude().score({"fc.weight": torch.tensor([[2.0, -3.0]])}, {}, torch.Generator())
        {'fc.weight': tensor([[2., 3.]])}
    """

    def score(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Absolute values."""
        return {name: _precise(weight).abs() for name, weight in weights.items()}


@dataclass(frozen=True)
class RandomWeights(WeightCriterion):
    """Independent uniform scores, the baseline that every criterion has to beat.

    Example:
        >>> scores = RandomWeights().score({"fc.weight": torch.zeros(2, 3)}, {}, torch.Generator().manual_seed(0))
        >>> scores["fc.weight"].shape
        torch.Size([2, 3])
    """

    def score(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], generator: torch.Generator
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
        >>> LAMP().score({"fc.weight": torch.tensor([[1.0, -2.0]])}, {}, torch.Generator())
        {'fc.weight': tensor([[0.2000, 1.0000]])}
    """

    def score(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Scores in [0, 1], on the CPU."""
        return {name: _lamp(weight) for name, weight in weights.items()}


@dataclass(frozen=True)
class SNIP(WeightCriterion):
    """Absolute first-order change of the loss when the weight is switched off (Lee et al., 2019).

    Put a gate c = 1 on a weight w: dL/dc is w times the gradient of w. The score is the absolute value of its sum over
    the batches, so batches that disagree on a weight speak against it.

    Args:
        batches: Number of real batches to sum over, at least 1.

    Example:
        >>> weights, gradients = {"fc.weight": torch.tensor([[2.0, -3.0]])}, {"fc.weight": torch.tensor([[0.5, 2.0]])}
        >>> SNIP().score(weights, gradients, torch.Generator())
        {'fc.weight': tensor([[1., 6.]])}
    """

    batches: int = 8

    def __post_init__(self) -> None:
        """Refuse to work without a batch."""
        if self.batches < 1:
            raise ConfigurationError(f"SNIP: batches must be at least 1, but is {self.batches}.")

    def score(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Absolute products of weights and summed gradients."""
        if missing := [name for name in weights if name not in gradients]:
            raise PruneError(
                f"cannot score {', '.join(missing)}: there is no gradient. Exclude what is frozen, or use a criterion "
                'that looks at weights only, such as "magnitude".'
            )
        return {name: (_precise(weight) * _precise(gradients[name])).abs() for name, weight in weights.items()}


_BY_NAME: dict[str, Callable[[], WeightCriterion]] = {
    "magnitude": Magnitude,
    "random": RandomWeights,
    "lamp": LAMP,
    "snip": SNIP,
}


def weight_criterion_from(criterion: WeightCriterionName | WeightCriterion) -> WeightCriterion:
    """The criterion of that name with its defaults, or the given criterion itself.

    Raises:
        ConfigurationError: If no criterion has that name.

    Example:
        >>> weight_criterion_from("snip")
        SNIP(batches=8)
    """
    if isinstance(criterion, WeightCriterion):
        return criterion
    if criterion not in _BY_NAME:
        raise unknown_name("weight criterion", criterion, _BY_NAME)
    return _BY_NAME[criterion]()


def _precise(tensor: Tensor) -> Tensor:
    """Detached values in single precision or better."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _lamp(weight: Tensor) -> Tensor:
    # Squares of tiny single-precision numbers would be zero; and on the CPU sums are deterministic on every machine.
    squares = weight.detach().cpu().double().flatten().square()
    ascending, order = squares.sort(stable=True)
    not_smaller = ascending.flip(0).cumsum(0).flip(0)
    # Only zeros have no sum: their score is 0 like that of every other zero.
    shares = ascending / not_smaller.where(not_smaller > 0, torch.ones_like(not_smaller))
    scores = torch.empty_like(squares).scatter_(0, order, shares).view(weight.shape)
    return scores.to(torch.promote_types(weight.dtype, torch.float32))

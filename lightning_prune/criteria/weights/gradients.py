"""Criteria that differentiate the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.criteria.weights.base import WeightCriterion, WeightSource, check_at_least_one, precise
from lightning_prune.errors import PruneError


@dataclass(frozen=True)
class SNIP(WeightCriterion):
    """Absolute first-order change of the loss when the weight is switched off (Lee et al., 2019).

    Put a gate c = 1 on a weight w: dL/dc is w times the gradient of w. The score is the absolute value of its sum over
    the batches, so batches that disagree on a weight speak against it.

    Args:
        batches: Number of real batches to sum over, at least 1.

    Example:
        >>> class Given(WeightSource):
        ...     def gradients(self, batches):
        ...         return {"fc.weight": torch.tensor([[0.5, 2.0]])}
        >>> SNIP().score({"fc.weight": torch.tensor([[2.0, -3.0]])}, Given(), torch.Generator())
        {'fc.weight': tensor([[1., 6.]])}
    """

    batches: int = 8

    def __post_init__(self) -> None:
        """Refuse to work without a batch."""
        check_at_least_one(self, "batches")

    def score(
        self, weights: Mapping[str, Tensor], source: WeightSource, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Absolute products of weights and summed gradients."""
        return {name: p.abs() for name, p in _products(weights, source.gradients(self.batches)).items()}


@dataclass(frozen=True)
class GraSP(WeightCriterion):
    """How much of the gradient's norm is lost when the weight is switched off (Wang et al., 2020).

    To first order the squared norm of the gradient g falls by twice w times (H g) when w goes, with H the second
    derivative of the loss. That product, signed, is the score: the weights that go first are those without which the
    gradient is larger, so that the network learns faster. Meant for the initialisation, in one round.

    The paper divides the class scores by a temperature of 200 and takes ten samples of each class; here loss and
    batches are those of training, whatever they are.

    Args:
        batches: Number of real batches to sum over, at least 1.

    Example:
        >>> class Bowl(WeightSource):  # the loss w**2, for which g = 2 w and H = 2
        ...     def gradients(self, batches):
        ...         return {"fc.weight": torch.tensor([[2.0, -4.0]])}
        ...     def hessian_vector(self, vectors, batches):
        ...         return {name: 2 * vector for name, vector in vectors.items()}
        >>> GraSP().score({"fc.weight": torch.tensor([[1.0, -2.0]])}, Bowl(), torch.Generator())
        {'fc.weight': tensor([[ 4., 16.]])}
    """

    batches: int = 8

    def __post_init__(self) -> None:
        """Refuse to work without a batch."""
        check_at_least_one(self, "batches")

    def score(
        self, weights: Mapping[str, Tensor], source: WeightSource, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Products of weights and Hessian-gradient products."""
        return _products(weights, source.hessian_vector(source.gradients(self.batches), self.batches))


def _products(weights: Mapping[str, Tensor], derivatives: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if missing := [name for name in weights if name not in derivatives]:
        raise PruneError(
            f"cannot score {', '.join(missing)}: there is no gradient. Exclude what is frozen, or use a criterion "
            'that looks at weights only, such as "magnitude".'
        )
    return {name: precise(weight) * precise(derivatives[name]) for name, weight in weights.items()}

"""A criterion that looks at weights and what they are multiplied with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_prune.criteria.weights.base import WeightCriterion, WeightSource, check_at_least_one, precise
from lightning_prune.weight_budget import Scope


@dataclass(frozen=True)
class Wanda(WeightCriterion):
    """Absolute weight times the 2-norm of its inputs (Sun et al., 2024).

    Weights compete with those of the same output, which have the same inputs: the scope is ``"row"`` unless another is
    set. Meant for trained networks, with little or no training afterwards. Tensors that are no factor of a matrix
    product or convolution, such as embeddings, go by the absolute weight alone.

    Args:
        batches: Number of real batches to take the norm over, at least 1.

    Example:
        >>> class Given(WeightSource):
        ...     def input_norms(self, batches):
        ...         return {"fc.weight": torch.tensor([[5.0, 1.0]])}
        >>> Wanda().score({"fc.weight": torch.tensor([[2.0, -3.0]])}, Given(), torch.Generator())
        {'fc.weight': tensor([[10.,  3.]])}
    """

    scope: ClassVar[Scope] = "row"
    batches: int = 8

    def __post_init__(self) -> None:
        """Refuse to work without a batch."""
        check_at_least_one(self, "batches")

    def score(
        self, weights: Mapping[str, Tensor], source: WeightSource, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Absolute weights times norms of inputs."""
        norms = source.input_norms(self.batches)
        return {name: precise(weight).abs() * precise(norms[name]) for name, weight in weights.items()}

"""A criterion that needs no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.criteria.weights.base import WeightCriterion, WeightSource, check_at_least_one, precise


@dataclass(frozen=True)
class SynFlow(WeightCriterion):
    """How much of all paths through the network leads through the weight (Tanaka et al., 2020).

    With all weights made positive and an input of ones, the sum of the outputs is a sum over paths, each the product of
    its weights; the score is the share of the paths through a weight, |w dR/dw|. It is preserved from tensor to tensor,
    so a tensor whose weights are few has large ones, and in many small rounds none is ever emptied. Meant for the
    initialisation. No data are read but for the shapes of inputs, and inputs that are whole numbers (as indices are).

    Args:
        rounds: Into how many steps a round is divided, at least 1.

    Example:
        >>> class OneLayer(WeightSource):  # the outputs of which have the slope 1 in every weight
        ...     def synaptic_flow(self):
        ...         return {"fc.weight": torch.ones(1, 2)}
        >>> SynFlow().score({"fc.weight": torch.tensor([[2.0, -3.0]])}, OneLayer(), torch.Generator())
        {'fc.weight': tensor([[2., 3.]])}
    """

    rounds: int = 100

    def __post_init__(self) -> None:
        """Refuse to work without a round."""
        check_at_least_one(self, "rounds")

    def score(
        self, weights: Mapping[str, Tensor], source: WeightSource, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Absolute products of weights and derivatives of the flow."""
        flow = source.synaptic_flow()
        return {name: (precise(weight) * precise(flow[name])).abs() for name, weight in weights.items()}

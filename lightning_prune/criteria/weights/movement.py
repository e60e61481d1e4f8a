"""A criterion that looks on while the network trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.criteria.weights.base import WatchingCriterion, WeightSource, precise
from lightning_prune.errors import PruneError


@dataclass(frozen=True)
class Movement(WatchingCriterion):
    """How far the loss has pushed the weight away from zero (Sanh et al., 2020).

    The score is the sum of -g w over all optimizer steps so far, with the gradient g at the masked weights: it rises
    when a step of plain gradient descent makes the weight larger in absolute value. Made for fine-tuning of pretrained
    networks, with a gradual schedule.

    In the paper a weight that is off keeps its value and its score goes on changing; it may come back with that value.
    Here it has no value, so its score stays where it was, and it comes back as a zero once the scores of others have
    fallen below. The factor of the paper's learning rate of scores is left out: it would not change their order.

    Args:
        regrow: Whether weights that are off may come back.

    Example:
        >>> seen, weights = {}, {"fc.weight": torch.tensor([[2.0, -3.0]])}
        >>> Movement().watch(weights, {"fc.weight": torch.tensor([[0.5, 1.0]])}, seen)
        >>> seen
        {'fc.weight': tensor([[-1.,  3.]])}
    """

    regrow: bool = True

    def watch(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], watched: dict[str, Tensor]) -> None:
        """Take -g w of this step into the sum."""
        for name, weight in weights.items():
            # A step that the scaler of half precision will leave out has infinite gradients.
            pull = torch.nan_to_num(precise(weight) * precise(gradients[name]), 0.0, 0.0, 0.0)
            watched[name] = watched[name] - pull if name in watched else -pull

    def score(
        self, weights: Mapping[str, Tensor], source: WeightSource, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The sums; zero for what no step moves, such as frozen weights."""
        if not any(name in source.watched for name in weights):
            raise PruneError(
                "movement has seen no optimizer step yet, so there is nothing to score by. Give the schedule a later "
                'start, or use a criterion that looks at weights only, such as "magnitude".'
            )
        return {name: source.watched.get(name, torch.zeros_like(precise(weight))) for name, weight in weights.items()}

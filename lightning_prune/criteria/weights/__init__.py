"""Criteria that score single weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lightning_prune.choices import chosen
from lightning_prune.criteria.weights.base import WatchingCriterion, WeightCriterion, WeightSource, checked_scores
from lightning_prune.criteria.weights.gradients import SNIP, GraSP
from lightning_prune.criteria.weights.movement import Movement
from lightning_prune.criteria.weights.plain import LAMP, Magnitude, RandomWeights
from lightning_prune.criteria.weights.synflow import SynFlow
from lightning_prune.criteria.weights.wanda import Wanda

WeightCriterionName = Literal["magnitude", "random", "lamp", "snip", "grasp", "synflow", "movement", "wanda"]

_BY_NAME: dict[str, Callable[[], WeightCriterion]] = {
    "magnitude": Magnitude,
    "random": RandomWeights,
    "lamp": LAMP,
    "snip": SNIP,
    "grasp": GraSP,
    "synflow": SynFlow,
    "movement": Movement,
    "wanda": Wanda,
}


def weight_criterion_from(criterion: WeightCriterionName | WeightCriterion) -> WeightCriterion:
    """The criterion of that name with its defaults, or the given criterion itself.

    Raises:
        ConfigurationError: If no criterion has that name.

    Example:
        >>> weight_criterion_from("snip")
        SNIP(batches=8)
    """
    return chosen("criterion of weights", criterion, WeightCriterion, _BY_NAME)


__all__ = [
    "LAMP",
    "SNIP",
    "GraSP",
    "Magnitude",
    "Movement",
    "RandomWeights",
    "SynFlow",
    "Wanda",
    "WatchingCriterion",
    "WeightCriterion",
    "WeightCriterionName",
    "WeightSource",
    "checked_scores",
    "weight_criterion_from",
]

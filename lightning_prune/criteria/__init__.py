"""What matters: criteria that score the units of a channel group, or single weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lightning_prune.choices import chosen
from lightning_prune.criteria.activations import CHIP, ActivationCriterion, APoZ, HRank, RunCriterion
from lightning_prune.criteria.base import Criterion, normalise
from lightning_prune.criteria.geometric import FPGM
from lightning_prune.criteria.hessian import Hessian
from lightning_prune.criteria.norms import Norm
from lightning_prune.criteria.propagation import NISP
from lightning_prune.criteria.random import Random
from lightning_prune.criteria.reconstruction import ThiNet
from lightning_prune.criteria.scale import BatchNormScale
from lightning_prune.criteria.taylor import Taylor
from lightning_prune.criteria.weights import (
    LAMP,
    SNIP,
    GraSP,
    Magnitude,
    Movement,
    RandomWeights,
    SynFlow,
    Wanda,
    WatchingCriterion,
    WeightCriterion,
    WeightCriterionName,
    WeightSource,
    weight_criterion_from,
)

CriterionName = Literal[
    "l1", "l2", "bn_scale", "taylor", "hessian", "fpgm", "random", "apoz", "hrank", "chip", "nisp", "thinet"
]  # fmt: skip

_BY_NAME: dict[str, Callable[[], Criterion]] = {
    "l1": lambda: Norm(p=1, slots="producer"),
    "l2": lambda: Norm(p=2, slots="all"),
    "bn_scale": BatchNormScale,
    "taylor": Taylor,
    "hessian": Hessian,
    "fpgm": FPGM,
    "random": Random,
    "apoz": APoZ,
    "hrank": HRank,
    "chip": CHIP,
    "nisp": NISP,
    "thinet": ThiNet,
}


def criterion_from(criterion: CriterionName | Criterion) -> Criterion:
    """The criterion of that name with its defaults, or the given criterion itself.

    ``"l1"`` is the 1-norm of the producers, ``"l2"`` the 2-norm of all coupled weights.

    Raises:
        ConfigurationError: If no criterion has that name.

    Example:
        >>> criterion_from("l1")
        Norm(p=1, slots='producer')
    """
    return chosen("criterion of channels", criterion, Criterion, _BY_NAME)


__all__ = [
    "CHIP",
    "FPGM",
    "LAMP",
    "NISP",
    "SNIP",
    "APoZ",
    "ActivationCriterion",
    "BatchNormScale",
    "Criterion",
    "CriterionName",
    "GraSP",
    "HRank",
    "Hessian",
    "Magnitude",
    "Movement",
    "Norm",
    "Random",
    "RandomWeights",
    "RunCriterion",
    "SynFlow",
    "Taylor",
    "ThiNet",
    "Wanda",
    "WatchingCriterion",
    "WeightCriterion",
    "WeightCriterionName",
    "WeightSource",
    "criterion_from",
    "normalise",
    "weight_criterion_from",
]

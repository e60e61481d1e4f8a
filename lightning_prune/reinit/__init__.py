"""What the surviving weights start from after a round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lightning_prune.choices import chosen
from lightning_prune.reinit.base import Keep, Reinit
from lightning_prune.reinit.distribution import KeepDistribution
from lightning_prune.reinit.laws import Survivors, WeightLaw
from lightning_prune.reinit.random import Random
from lightning_prune.reinit.rewind import Rewind
from lightning_prune.reinit.signs import KeepMagnitude, KeepSign, KeepSignAndDistribution

ReinitName = Literal["keep", "rewind", "random", "sign", "distribution", "magnitude", "sign+distribution"]

_BY_NAME: dict[str, Callable[[], Reinit]] = {
    "keep": Keep,
    "rewind": Rewind,
    "random": Random,
    "sign": KeepSign,
    "distribution": KeepDistribution,
    "magnitude": KeepMagnitude,
    "sign+distribution": KeepSignAndDistribution,
}


def reinit_from(reinit: ReinitName | Reinit) -> Reinit:
    """The reinitialisation of that name, or the given one itself.

    Raises:
        ConfigurationError: If no reinitialisation has that name.

    Example:
        >>> reinit_from("distribution")
        KeepDistribution(how='permute', per='layer', sign_conditional=False)
    """
    return chosen("reinit", reinit, Reinit, _BY_NAME)


__all__ = [
    "Keep",
    "KeepDistribution",
    "KeepMagnitude",
    "KeepSign",
    "KeepSignAndDistribution",
    "Random",
    "Reinit",
    "ReinitName",
    "Rewind",
    "Survivors",
    "WeightLaw",
    "reinit_from",
]

"""Penalties that push channels towards zero while the network trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lightning_prune.choices import chosen
from lightning_prune.penalties.base import ChannelPenalty, Step, add_decay, add_gradient, learning_rates, write
from lightning_prune.penalties.groups import GroupLasso, GroupNormDecay
from lightning_prune.penalties.growth import Growth
from lightning_prune.penalties.scales import BatchNormISTA, Slimming

PenaltyName = Literal["slimming", "bn_ista", "group_lasso", "group_norm"]

_BY_NAME: dict[str, Callable[[], ChannelPenalty]] = {
    "slimming": Slimming,
    "bn_ista": BatchNormISTA,
    "group_lasso": GroupLasso,
    "group_norm": GroupNormDecay,
}


def penalty_from(penalty: PenaltyName | ChannelPenalty) -> ChannelPenalty:
    """The penalty of that name with its defaults, or the given penalty itself.

    Raises:
        ConfigurationError: If no penalty has that name.

    Example:
        >>> penalty_from("slimming")
        Slimming(strength=0.0001)
    """
    return chosen("penalty", penalty, ChannelPenalty, _BY_NAME)


__all__ = [
    "BatchNormISTA",
    "ChannelPenalty",
    "GroupLasso",
    "GroupNormDecay",
    "Growth",
    "PenaltyName",
    "Slimming",
    "Step",
    "add_decay",
    "add_gradient",
    "learning_rates",
    "penalty_from",
    "write",
]

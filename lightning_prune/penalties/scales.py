"""Penalties on the scales of norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.channels import ChannelGroup
from lightning_prune.penalties.base import ChannelPenalty, Step, add_gradient, write

_SCALE = "a scale, as a batch-norm behind it would give it"


@dataclass(frozen=True)
class Slimming(ChannelPenalty):
    """L1 penalty on the scales (Network Slimming, Liu et al., 2017), to be followed by the criterion ``"bn_scale"``.

    Adds ``strength * sign(scale)`` to the gradient of each scale. A group without scales is left alone.

    Args:
        strength: Coefficient; the source takes 1e-4 for plain networks and 1e-5 for residual ones.

    Raises:
        ConfigurationError: If the strength is not above 0.

    Example:
        >>> from lightning_prune.graph.channels import Slot
        >>> scale = torch.nn.Parameter(torch.tensor([0.5, -2.0]))
        >>> scale.grad = torch.zeros(2)
        >>> group = ChannelGroup("conv", (Slot("bn.weight", 0, torch.arange(2)[:, None], "scale"),), ())
        >>> Slimming(0.25).before_step(Step({"conv": group}, {"bn.weight": scale}, {"bn.weight": 0.1}))
        >>> scale.grad
        tensor([ 0.2500, -0.2500])
    """

    strength: float = 1e-4
    provenance = "published"
    wanted = _SCALE

    def __post_init__(self) -> None:
        """Refuse a strength that is none."""
        check_strength(self, self.strength)

    def acts_on(self, group: ChannelGroup) -> bool:
        """Whether it has a scale."""
        return bool(group.with_role("scale"))

    def before_step(self, step: Step) -> None:
        """Add the subgradient."""
        for group in step.groups.values():
            for slot, scale, _ in step.moved(group.with_role("scale")):
                add_gradient(slot, scale, self.strength * slot.gather(scale.detach()).sign())


@dataclass(frozen=True)
class BatchNormISTA(ChannelPenalty):
    """Soft-thresholding of the scales, the more the dearer the channel (Ye et al., 2018).

    After each step every scale moves towards zero by ``learning rate * strength * cost`` and stops there. The cost is
    what one channel less saves, in the measure of the budget (in MACs if that is latency), relative to the average
    group. The source's trick of shrinking scales and growing the weights that read them in advance is left out: it is
    exact only where nothing but positively homogeneous functions lie in between, which the channel graph does not tell.

    Args:
        strength: Coefficient of the penalty for a channel of average cost.

    Raises:
        ConfigurationError: If the strength is not above 0.

    Example:
        >>> from lightning_prune.graph.channels import Slot
        >>> scale = torch.nn.Parameter(torch.tensor([0.5, -2.0]))
        >>> group = ChannelGroup("conv", (Slot("bn.weight", 0, torch.arange(2)[:, None], "scale"),), ())
        >>> BatchNormISTA(10.0).after_step(Step({"conv": group}, {"bn.weight": scale}, {"bn.weight": 0.1}))
        >>> scale.tolist()
        [0.0, -1.0]
    """

    strength: float = 1e-3
    provenance = "published"
    wanted = _SCALE

    def __post_init__(self) -> None:
        """Refuse a strength that is none."""
        check_strength(self, self.strength)

    def acts_on(self, group: ChannelGroup) -> bool:
        """Whether it has a scale."""
        return bool(group.with_role("scale"))

    def after_step(self, step: Step) -> None:
        """Take the proximal step."""
        for name, group in step.groups.items():
            for slot, scale, rate in step.moved(group.with_role("scale")):
                threshold = rate * self.strength * step.costs.get(name, 1.0)
                write(slot, scale, torch.nn.functional.softshrink(slot.gather(scale.detach()), threshold))


def check_strength(penalty: ChannelPenalty, strength: float) -> None:
    """Refuse what pushes nothing, or away from zero.

    Raises:
        ConfigurationError: If it is not above 0.
    """
    if not strength > 0:
        raise ConfigurationError(f"{type(penalty).__name__}: strength must be above 0, but is {strength}.")

"""Penalties on all that goes with a channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_prune.criteria.base import WEIGHT_ROLES, entries
from lightning_prune.graph.channels import ChannelGroup
from lightning_prune.penalties.base import ChannelPenalty, Step, add_decay, write
from lightning_prune.penalties.scales import check_strength


@dataclass(frozen=True)
class GroupLasso(ChannelPenalty):
    """Group lasso on the weights that make and read a channel (structured sparsity learning, Wen et al., 2016).

    After each step the weights ``w`` of a channel are multiplied by ``max(0, 1 - rate * strength * sqrt(n) / |w|)``,
    where ``n`` is their number: the proximal step of ``strength * sqrt(n) * |w|``. Channels whose norm falls below the
    threshold become exactly zero. The source penalises filters and input channels apart from each other; here what
    makes a channel and what reads it shrink as one, since they go together. A weight that belongs to two channels, one
    that it reads and one that it makes, is shrunk for both, one after the other. Parameters that another optimizer
    moves count in the norm, and are shrunk at its step.

    Args:
        strength: Coefficient of the penalty.

    Raises:
        ConfigurationError: If the strength is not above 0.

    Example:
        >>> from lightning_prune.graph.channels import Slot
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]]))
        >>> group = ChannelGroup("fc", (Slot("fc.weight", 0, torch.arange(2)[:, None], "producer"),), ())
        >>> GroupLasso(5.0).after_step(Step({"fc": group}, {"fc.weight": weight}, {"fc.weight": 0.1}))
        >>> weight.tolist()  # a threshold of 0.1 * 5 * sqrt(4) = 1
        [[2.4..., 3.2..., 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """

    strength: float = 1e-3
    provenance = "published"
    wanted = "a weight that makes or reads its channels"

    def __post_init__(self) -> None:
        """Refuse a strength that is none."""
        check_strength(self, self.strength)

    def acts_on(self, group: ChannelGroup) -> bool:
        """Whether a weight makes or reads its channels."""
        return bool(group.with_role("producer", "consumer"))

    def after_step(self, step: Step) -> None:
        """Take the proximal step."""
        for group in filter(self.acts_on, step.groups.values()):
            slots = group.with_role("producer", "consumer")
            weights = entries(slots, step.tensors)
            norms = torch.linalg.vector_norm(weights, dim=1)
            thresholds = self.strength * weights.shape[1] ** 0.5 / norms.clamp_min(torch.finfo(norms.dtype).tiny)
            for slot, parameter, rate in step.moved(slots):
                write(slot, parameter, slot.gather(parameter.detach()) * (1 - rate * thresholds).clamp_min(0)[:, None])


@dataclass(frozen=True)
class GroupNormDecay(ChannelPenalty):
    """Weight decay that is stronger for the less important channels (group sparsity of DepGraph, Fang et al., 2023).

    Adds ``strength * 2 ** (alpha * (max - norm) / (max - min)) * w`` to the gradient of all weights, biases and scales
    ``w`` that go with a channel; ``norm`` is their joint 2-norm, ``max`` and ``min`` are taken over the group. To be
    followed by the criterion ``"l2"``.

    Args:
        strength: Coefficient for the most important channel of each group.
        alpha: The least important one is pushed ``2 ** alpha`` times as hard.

    Raises:
        ConfigurationError: If the strength is not above 0.

    Example:
        >>> from lightning_prune.graph.channels import Slot
        >>> weight = torch.nn.Parameter(torch.tensor([[4.0], [2.0]]))
        >>> weight.grad = torch.zeros(2, 1)
        >>> group = ChannelGroup("fc", (Slot("fc.weight", 0, torch.arange(2)[:, None], "producer"),), ())
        >>> GroupNormDecay(0.5, alpha=2).before_step(Step({"fc": group}, {"fc.weight": weight}, {"fc.weight": 0.1}))
        >>> weight.grad.flatten()
        tensor([2., 4.])
    """

    strength: float = 1e-4
    alpha: float = 4.0
    provenance = "published"

    def __post_init__(self) -> None:
        """Refuse a strength that is none."""
        check_strength(self, self.strength)

    def acts_on(self, group: ChannelGroup) -> bool:
        """Whether anything that trains goes with its channels."""
        return bool(group.with_role(*WEIGHT_ROLES))

    def before_step(self, step: Step) -> None:
        """Add the gradient."""
        for group in filter(self.acts_on, step.groups.values()):
            norms = torch.linalg.vector_norm(entries(group.with_role(*WEIGHT_ROLES), step.tensors), dim=1)
            largest = norms.max()
            spread = (largest - norms.min()).clamp_min(torch.finfo(norms.dtype).tiny)
            add_decay(group, step, self.strength * 2 ** (self.alpha * (largest - norms) / spread))

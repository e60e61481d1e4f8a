"""Second-order effect on the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.criteria.base import WEIGHT_ROLES, GradientCriterion, entries
from lightning_prune.graph.channels import ChannelGroup


@dataclass(frozen=True)
class Hessian(GradientCriterion):
    """Rise of the loss by a diagonal second-order model when all weights of a unit go (LeCun et al., 1990).

    Optimal Brain Damage estimates the rise at a minimum, where gradients vanish, as the sum of h w²/2 over the weights
    w that go, with h the diagonal of the Hessian. Here h is the diagonal of the empirical Fisher matrix, made of whole
    batches: the mean over batches of the squared gradient of a batch's mean loss. It is never negative and costs one
    backward pass for each batch, but it is an approximation three times over: the labels are those of the data and not
    drawn from the network's prediction, as the Fisher matrix proper would have it; the Fisher matrix equals the Hessian
    only where the network fits the data; and the gradients of samples cancel in part within a batch, which near a
    minimum makes h smaller by about the batch size (and changes no ranking), and away from it mixes in the square of
    the mean gradient. That weights act together is neglected. All parameters of the group count: what makes, shifts,
    scales and reads its channels.

    Args:
        batches: Number of real batches to average over, at least 1.

    Raises:
        ConfigurationError: If there is no batch.

    Example:
        >>> from lightning_prune.graph.channels import Slot
        >>> reads = Slot("head.weight", 1, torch.arange(2)[:, None], "consumer")
        >>> weights = {"head.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
        >>> gradients = {"head.weight": torch.tensor([[1.0, 0.5], [-1.0, 0.0]])}
        >>> Hessian().score(ChannelGroup("fc", (reads,), (reads,)), weights, gradients, torch.Generator())
        tensor([5.0000, 0.5000])
    """

    def score(
        self,
        group: ChannelGroup,
        tensors: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """Half the sum of squared weight times squared gradient of each unit for one batch, shape ``[units]``."""
        slots = group.with_role(*WEIGHT_ROLES)
        trainable = [slot for slot in slots if slot.tensor in gradients]  # a scale may be a buffer
        found: Tensor = (entries(trainable or slots, tensors) * entries(trainable or slots, gradients)).square().sum(1)
        return found / 2

"""First-order effect on the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.criteria.base import GradientCriterion, entries
from lightning_prune.graph.channels import ChannelGroup


@dataclass(frozen=True)
class Taylor(GradientCriterion):
    """Squared first-order change of the loss when a unit is switched off (Molchanov et al., 2016 and 2019).

    Put a gate z = 1 on a unit. A unit is switched off by zeroing the group's ``off`` slots, normally the slices of the
    consumers that read it, so dL/dz is exactly the sum of weight times gradient over these slots: no hook on the
    activation is needed. The score of a batch is the square of that sum.

    Args:
        batches: Number of real batches to average over, at least 1.

    Example:
        >>> from lightning_prune.graph.channels import Slot
        >>> reads = Slot("head.weight", 1, torch.arange(2)[:, None], "consumer")
        >>> weights = {"head.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
        >>> gradients = {"head.weight": torch.tensor([[1.0, 0.5], [-1.0, 0.0]])}
        >>> Taylor().score(ChannelGroup("fc", (reads,), (reads,)), weights, gradients, torch.Generator())
        tensor([4., 1.])
    """

    def score(
        self,
        group: ChannelGroup,
        tensors: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """Squared gate gradient of each unit for one batch, shape ``[units]``."""
        return (entries(group.off, tensors) * entries(group.off, gradients)).sum(dim=1).square()

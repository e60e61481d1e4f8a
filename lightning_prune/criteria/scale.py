"""Scales of the norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.criteria.base import Criterion, entries, normalise, producers
from lightning_prune.graph.channels import ChannelGroup


@dataclass(frozen=True)
class BatchNormScale(Criterion):
    """Mean absolute scale that a unit's batch-norms multiply it with (Network Slimming, Liu et al., 2017).

    Scales of different groups are compared as they are, which is the method's point. A group without any scale is
    scored by the 2-norm of its producers, divided by its mean over the group: such a group looks like a batch-norm
    group with its initial scale of 1.

    Example:
        >>> from lightning_prune.graph.channels import Slot
        >>> group = ChannelGroup("conv", (Slot("bn.weight", 0, torch.arange(2)[:, None], "scale"),), ())
        >>> BatchNormScale().score(group, {"bn.weight": torch.tensor([-0.5, 0.25])}, {}, torch.Generator())
        tensor([0.5000, 0.2500])
    """

    normalised: bool = False

    def score(
        self,
        group: ChannelGroup,
        tensors: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """Mean absolute scale of each unit, shape ``[units]``."""
        scales = group.with_role("scale")
        if scales:
            return entries(scales, tensors).abs().mean(dim=1)
        return normalise(torch.linalg.vector_norm(entries(producers(group), tensors), dim=1))

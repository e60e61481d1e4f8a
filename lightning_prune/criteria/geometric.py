"""Redundancy among filters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.criteria.base import Criterion, entries, producers
from lightning_prune.graph.channels import ChannelGroup


@dataclass(frozen=True)
class FPGM(Criterion):
    """Sum of the distances of a unit's producer filter to all others of its group (He et al., 2019).

    Filters near the geometric median of the group can be stood in for by the others, however large they are.

    Example:
        >>> from lightning_prune.graph.channels import Slot
        >>> group = ChannelGroup("fc", (Slot("fc.weight", 0, torch.arange(3)[:, None], "producer"),), ())
        >>> FPGM().score(group, {"fc.weight": torch.tensor([[0.0], [1.0], [5.0]])}, {}, torch.Generator())
        tensor([6., 5., 9.])
    """

    def score(
        self,
        group: ChannelGroup,
        tensors: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """Sum of Euclidean distances to the other units, shape ``[units]``."""
        filters = entries(producers(group), tensors)
        # Distances do not change under a shift; centring keeps the fast matrix form of cdist from cancelling digits.
        centred = filters - filters.mean(dim=0)
        return torch.cdist(centred, centred).sum(dim=1)

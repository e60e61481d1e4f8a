"""The baseline that every criterion has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.criteria.base import Criterion
from lightning_prune.graph.channels import ChannelGroup


@dataclass(frozen=True)
class Random(Criterion):
    """Independent uniform scores.

    Example:
        >>> from lightning_prune.graph.channels import Slot
        >>> group = ChannelGroup("fc", (Slot("fc.weight", 0, torch.arange(3)[:, None], "producer"),), ())
        >>> Random().score(group, {}, {}, torch.Generator().manual_seed(0)).shape
        torch.Size([3])
    """

    normalised: bool = False

    def score(
        self,
        group: ChannelGroup,
        tensors: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """Uniform in [0, 1), shape ``[units]``, drawn on the generator's device."""
        return torch.rand(group.width, generator=generator, device=generator.device)

"""Norms of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_prune.choices import unknown_name
from lightning_prune.criteria.base import WEIGHT_ROLES, Criterion, entries, producers
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.channels import ChannelGroup


@dataclass(frozen=True)
class Norm(Criterion):
    """p-norm of a unit's weights.

    Over the producers it is filter pruning (Li et al., 2017: p = 1); over all coupled weights, that is producers,
    biases, scales and consumers, it is the group norm (Fang et al., 2023: p = 2). A group whose channels no parameter
    makes is always scored over all of its weights.

    Args:
        p: Order of the norm, above 0; ``inf`` is the largest absolute value.
        slots: ``"producer"`` or ``"all"``.

    Example:
        >>> from lightning_prune.graph.channels import Slot
        >>> group = ChannelGroup("fc", (Slot("fc.weight", 0, torch.arange(2)[:, None], "producer"),), ())
        >>> Norm(p=2).score(group, {"fc.weight": torch.tensor([[3.0, 4.0], [0.0, 1.0]])}, {}, torch.Generator())
        tensor([5., 1.])
    """

    p: float = 2.0
    slots: Literal["producer", "all"] = "producer"

    def __post_init__(self) -> None:
        """Refuse what is no norm."""
        if not self.p > 0:
            raise ConfigurationError(f"Norm: p must be above 0, but is {self.p}. Use 1 or 2.")
        if self.slots not in ("producer", "all"):
            raise unknown_name("choice of slots", self.slots, ["producer", "all"])

    def score(
        self,
        group: ChannelGroup,
        tensors: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """p-norm over each unit's entries, shape ``[units]``."""
        chosen = producers(group) if self.slots == "producer" else group.with_role(*WEIGHT_ROLES)
        norms: Tensor = torch.linalg.vector_norm(entries(chosen, tensors), self.p, dim=1)
        return norms

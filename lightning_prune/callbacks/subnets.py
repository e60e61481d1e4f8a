"""Training of one subnet after another, each by what the last ones have left of the same weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.gated_training import GatedTraining
from lightning_prune.graph.channels import ChannelGroup


class SubnetTraining(GatedTraining):
    """A network that holds a subnet with a factor for each channel, and behind it the weights of the whole.

    A step of an optimizer moves the weights behind the subnet; what is not part of it keeps its values, whatever the
    optimizer does.

    Args:
        groups: The channel groups that subnets have some units of.
        tensors: Parameters and buffers of the network by full name.
        dense: The weights of the whole by name, where they are not what the network holds now.
    """

    def __init__(
        self,
        groups: Mapping[str, ChannelGroup],
        tensors: Mapping[str, Tensor],
        dense: Mapping[str, Tensor] | None = None,
    ) -> None:
        names = {slot.tensor for group in groups.values() for slot in group.slots}
        parameters = [name for name in tensors if name in names and isinstance(tensors[name], nn.Parameter)]
        super().__init__(groups.values(), tensors, dense=dense, more=parameters)
        self._groups = groups
        self._outside: dict[str, Tensor] = {}

    @override
    def enter(self, gates: Mapping[str, Tensor]) -> None:
        """Have the network hold the subnet with these factors of channels; those with 0 are no part of it."""
        super().enter(gates)
        self._outside = {}
        for name, gate in gates.items():
            for slot in self._groups[name].slots:
                if slot.tensor in self._tensors:
                    like = self._tensors[slot.tensor]
                    blank = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
                    mask = self._outside.setdefault(slot.tensor, blank)
                    mask.index_fill_(slot.dim, slot.positions(gate == 0).to(like.device), True)

    @override
    def after_step(self) -> None:
        """Have the network hold the subnet again; what is not part of it is what it was before the step."""
        if self._stepping:
            for name, outside in self._outside.items():
                tensor = self._tensors[name].detach()
                tensor.copy_(torch.where(outside, self.dense[name], tensor))
        super().after_step()

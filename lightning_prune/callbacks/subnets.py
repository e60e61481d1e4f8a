"""Training of one subnet after another, each by what the last ones have left of the same weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_prune.callbacks.network import Network
from lightning_prune.effective import ChannelGates, EffectiveWeights
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.channels import ChannelGroup


def refuse_repeated_losses(network: Network) -> None:
    """Refuse optimizers that cannot train a subnet.

    Raises:
        ConfigurationError: With the remedy.
    """
    if any(isinstance(optimizer, LBFGS) for optimizer in network.optimizers):
        raise ConfigurationError(
            "LBFGS computes the loss again in the middle of its step, when the weights are not those of a subnet, so "
            "it cannot train one. Use an optimizer that computes it once, such as SGD."
        )


class SubnetTraining:
    """A network that holds a subnet with a factor for each channel, and behind it the weights of the whole.

    A step of an optimizer moves the weights behind the subnet; what is not part of it keeps its values, whatever the
    optimizer does.

    Args:
        groups: The channel groups that subnets have some units of.
        network: The network.
        dense: The weights of the whole by name, where they are not what the network holds now.

    Attributes:
        dense: The weights of the whole, live.
    """

    def __init__(
        self, groups: Mapping[str, ChannelGroup], network: Network, dense: Mapping[str, Tensor] | None = None
    ) -> None:
        names = {slot.tensor for group in groups.values() for slot in group.slots}
        self._groups = groups
        self._tensors = {n: t for n, t in network.tensors.items() if n in names and isinstance(t, nn.Parameter)}
        self._gating = ChannelGates(groups.values(), network.tensors)
        self._effective = EffectiveWeights(self._tensors, dense)
        self._factors: dict[str, Tensor] = {}
        self._outside: dict[str, Tensor] = {}
        self._stepping = False
        self.gates: dict[str, Tensor] = {}
        self.dense = self._effective.dense

    def enter(self, gates: Mapping[str, Tensor]) -> None:
        """Have the network hold the subnet with these factors of channels; those with 0 are no part of it."""
        self.gates, self._stepping = dict(gates), False
        self._factors = self._gating.factors(gates)
        self._outside = {}
        for name, gate in gates.items():
            for slot in self._groups[name].slots:
                if slot.tensor in self._tensors:
                    like = self._tensors[slot.tensor]
                    blank = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
                    mask = self._outside.setdefault(slot.tensor, blank)
                    mask.index_fill_(slot.dim, slot.positions(gate == 0).to(like.device), True)
        self._effective.place(self._factors)

    def slopes(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Derivatives of the loss with respect to the factors, as far as this optimizer moves their weights."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        slopes = {name: s for name, s in self._effective.slopes().items() if id(self._tensors[name]) in held}
        return self._gating.gradients(self.gates, slopes)

    def before_step(self) -> None:
        """Have the step of an optimizer move the weights behind the subnet."""
        for name, factor in self._factors.items():
            if (gradient := self._tensors[name].grad) is not None:
                gradient.mul_(factor)
        self._effective.place_dense()
        self._stepping = True

    def after_step(self) -> None:
        """Have the network hold the subnet again; also where a step was skipped that :meth:`before_step` announced."""
        if not self._stepping:
            return
        self._stepping = False
        for name, outside in self._outside.items():
            tensor = self._tensors[name].detach()
            tensor.copy_(torch.where(outside, self.dense[name], tensor))
        self._effective.take_over()
        self._effective.place(self._factors)

    def settle(self, gates: Mapping[str, Tensor]) -> None:
        """Have the network hold the weights of the whole for good, times these factors of channels."""
        self._effective.place_dense()
        self._effective.place(self._gating.factors(gates))

"""Training under gates: the network computes with gated channels, optimizers move the weights behind the gates."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_prune.effective import ChannelGates, EffectiveWeights
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.channels import ChannelGroup


class GatedTraining:
    """Channels behind gates, while optimizers move the weights behind them.

    The network's own tensors hold weights times gates, except in the step of an optimizer.

    Args:
        groups: The gated groups.
        tensors: Parameters and buffers of the network by full name.
        gates: Gates of shape ``[units]`` by group name to begin with, if any.
        dense: The weights behind the gates, where they are not what the tensors hold now.
        more: Names of further tensors that are put away and back with the gated ones, without a gate.

    Attributes:
        gates: The gates in use.

    Example:
        >>> import torch
        >>> from lightning_prune.graph.channels import Slot
        >>> reads = Slot("fc.weight", 1, torch.arange(2)[:, None], "consumer")
        >>> weight = torch.nn.Parameter(torch.tensor([[4.0, 2.0]]))
        >>> group = ChannelGroup("conv", (reads,), (reads,))
        >>> gated = GatedTraining([group], {"fc.weight": weight}, {"conv": torch.tensor([0.5, 1.0])})
        >>> weight.tolist()
        [[2.0, 2.0]]
        >>> weight.sum().backward()
        >>> gated.before_step(["fc.weight"])
        >>> weight.tolist(), weight.grad.tolist()
        ([[4.0, 2.0]], [[0.5, 1.0]])
    """

    def __init__(
        self,
        groups: Iterable[ChannelGroup],
        tensors: Mapping[str, Tensor],
        gates: Mapping[str, Tensor] | None = None,
        dense: Mapping[str, Tensor] | None = None,
        more: Iterable[str] = (),
    ) -> None:
        self._gating = ChannelGates(groups, tensors)
        self._tensors = {name: tensors[name] for name in dict.fromkeys([*self._gating.names, *more])}
        self._effective = EffectiveWeights(self._tensors, dense)
        self._stepping = False
        self.gates: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}
        if gates is not None:
            self.enter(gates)

    @property
    def dense(self) -> dict[str, Tensor]:
        """The weights behind the gates, by full name, live."""
        return self._effective.dense

    def enter(self, gates: Mapping[str, Tensor]) -> None:
        """Put these gates before the weights; groups that are not named are open."""
        self.gates, self._stepping = dict(gates), False
        self._factors = self._gating.factors(gates)
        self._effective.place(self._factors)

    def slopes(self, moved: Collection[str]) -> dict[str, Tensor]:
        """Derivatives of the loss with respect to the gates, as far as they come through the named weights."""
        slopes = {name: slope for name, slope in self._effective.slopes().items() if name in moved}
        return self._gating.gradients(self.gates, slopes)

    def before_step(self, moved: Collection[str]) -> None:
        """Hand an optimizer the weights behind the gates, and the gradients at those that it moves."""
        for name in (name for name in self._factors if name in moved):
            if (gradient := self._tensors[name].grad) is not None:
                gradient.mul_(self._factors[name])
        self.open()
        self._stepping = True

    def after_step(self) -> None:
        """Take what the optimizer has made of them, and put the gates before it; nothing if there was no step."""
        if self._stepping:
            self._stepping = False
            self._effective.take_over()
            self._effective.place(self._factors)

    def open(self) -> None:
        """Have the network's tensors hold the weights behind the gates."""
        self._effective.place_dense()

    def settle(self, gates: Mapping[str, Tensor]) -> None:
        """Have the network's tensors hold the weights times these gates for good."""
        self._effective.place_dense()
        self._effective.place(self._gating.factors(gates))


def moved_by(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that an optimizer moves."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {name for name, tensor in tensors.items() if id(tensor) in held}


def refuse_repeated_losses(optimizers: Iterable[Optimizer], method: str) -> None:
    """Refuse optimizers that compute the loss again within a step, when the weights are not those of the network.

    Args:
        optimizers: The optimizers of the fit.
        method: Name of the method that cannot work with them.

    Raises:
        ConfigurationError: With the remedy.
    """
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise ConfigurationError(
            f"LBFGS computes the loss again in the middle of its step, when no mask or gate is in place, so {method} "
            f"cannot work with it. Use an optimizer that computes it once, such as SGD."
        )

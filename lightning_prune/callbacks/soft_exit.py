"""Methods that fade channels out before the round in which they will probably go."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_prune.callbacks.handing_over import HandingOver
from lightning_prune.callbacks.network import Network
from lightning_prune.effective import ChannelGates, EffectiveWeights
from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import Position


class SoftExit(HandingOver):
    """Channel pruning with gates that close between rounds.

    The module holds the gated weights, and the optimizer moves those behind the gates. A round takes the gated weights
    as they are, so that nothing jumps but what it removes.
    """

    _effective: EffectiveWeights | None = None
    _factors: Mapping[str, Tensor] = {}
    _step: float = -1.0

    @abstractmethod
    def gates(self, position: Position) -> Mapping[str, Tensor]:
        """Gates of shape ``[units]`` by group name, in [0, 1]; other groups are open.

        Args:
            position: How far the fit has come.
        """

    @property
    @abstractmethod
    def fades(self) -> bool:
        """Whether there will be gates at all."""

    @override
    def resume(self, network: Network) -> None:
        super().resume(network)
        if self.fades and any(isinstance(optimizer, LBFGS) for optimizer in network.optimizers):
            raise ConfigurationError(
                f"LBFGS computes the loss again in the middle of its step, when no gate is in place, so "
                f"{type(self).__name__} cannot fade channels out with it. Use soft=False, or another optimizer."
            )
        self._effective, self._step = None, -1.0

    @override
    def before_batch(self, network: Network, position: Position) -> None:
        super().before_batch(network, position)
        if not (self.fades and self.under_way(network)) or position.step == self._step:  # then gradients accumulate
            return
        self._step = position.step
        gates = {name: gate for name, gate in self.gates(position).items() if name in network.graph.groups}
        if not gates:
            return
        gated = ChannelGates([network.graph.groups[name] for name in gates], network.tensors)
        if self._effective is None:
            tensors = {name: network.tensors[name] for name in gated.names}
            self._effective = EffectiveWeights(tensors, self.learnt.get("dense"))
            self.learnt["dense"] = self._effective.dense
        self._factors = gated.factors(gates)
        self._effective.place(self._factors)

    @override
    def before_step(self, network: Network, optimizer: Optimizer) -> None:
        super().before_step(network, optimizer)
        if self._effective is None:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, factor in self._factors.items():
            parameter = network.tensors[name]
            if id(parameter) in held and parameter.grad is not None:
                parameter.grad.mul_(factor)
        self._effective.place_dense()

    @override
    def after_step(self, network: Network, optimizer: Optimizer) -> None:
        super().after_step(network, optimizer)
        if self._effective is not None:
            self._effective.take_over()
            self._effective.place(self._factors)

    @override
    def carry_out(self, network: Network, level: float) -> None:
        self._effective = None
        self.learnt.pop("dense", None)
        super().carry_out(network, level)

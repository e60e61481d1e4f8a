"""Methods that fade channels out before the round in which they will probably go."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.callbacks.handing_over import HandingOver
from lightning_prune.callbacks.network import Network
from lightning_prune.gated_training import GatedTraining, moved_by, refuse_repeated_losses
from lightning_prune.schedules import Position


class SoftExit(HandingOver):
    """Channel pruning with gates that close between rounds.

    The module holds the gated weights, and the optimizer moves those behind the gates. A round takes the gated weights
    as they are, so that nothing jumps but what it removes.
    """

    _gated: GatedTraining | None = None
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
        if self.fades:
            refuse_repeated_losses(network.optimizers, f"{type(self).__name__} with soft=True")
        self._gated, self._step = None, -1.0

    @override
    def before_batch(self, network: Network, position: Position) -> None:
        super().before_batch(network, position)
        if not (self.fades and self.under_way(network)) or position.step == self._step:  # then gradients accumulate
            return
        self._step = position.step
        gates = {name: gate for name, gate in self.gates(position).items() if name in network.graph.groups}
        if not gates:
            if self._gated is None:
                self.learnt.pop("dense", None)  # of an earlier fit, whose gates stay in the weights for good
            return
        if self._gated is None:
            groups = [network.graph.groups[name] for name in gates]
            self._gated = GatedTraining(groups, network.tensors, dense=self.learnt.get("dense"))
            self.learnt["dense"] = self._gated.dense
        self._gated.enter(gates)

    @override
    def before_step(self, network: Network, optimizer: Optimizer) -> None:
        super().before_step(network, optimizer)
        if self._gated is not None:
            self._gated.before_step(moved_by(optimizer, network.tensors))

    @override
    def after_step(self, network: Network, optimizer: Optimizer) -> None:
        super().after_step(network, optimizer)
        if self._gated is not None:
            self._gated.after_step()

    @override
    def carry_out(self, network: Network, level: float) -> None:
        self._gated = None
        self.learnt.pop("dense", None)
        super().carry_out(network, level)

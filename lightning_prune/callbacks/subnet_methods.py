"""Methods that train one subnet after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Union

from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.phases import PhasedPruning
from lightning_prune.callbacks.subnet_teachers import SubnetTeachers
from lightning_prune.callbacks.subnets import SubnetTraining
from lightning_prune.callbacks.teachers import Teaching, load_teacher
from lightning_prune.callbacks.watching import check_watchable, extend_step, restore_step
from lightning_prune.distillation import Comparison
from lightning_prune.graph.channels import ChannelGroup
from lightning_prune.schedules import Position

_WEIGHT, _TEMPERATURE, _TEACHER_TEMPERATURE = 0.5, 4.0, 1.0


class SubnetPruning(PhasedPruning):
    """Channel pruning that trains one subnet after another, which can learn from teachers.

    Attributes:
        robust: Whether they do.
        teachers: Paths of further teachers.
        output_of: As for :class:`~lightning_prune.Distillation`.
        labels: As there.
    """

    robust: bool
    teachers: Sequence[str] | None
    output_of: str | None
    labels: Union[str, int, None]  # noqa: UP007
    _models: Mapping[str, nn.Module]
    _subnet: SubnetTraining | None = None
    _teachers: SubnetTeachers | None = None

    @property
    def searching(self) -> bool:
        """Whether the network holds a subnet, with the weights of the whole behind it."""
        return "dense" in self.learnt

    def groups(self, network: Network) -> dict[str, ChannelGroup]:
        """The groups that subnets have some units of."""
        return {name: network.graph.groups[name] for name in self._eligible(network)}

    def open(self, network: Network) -> SubnetTraining:
        """Begin to train subnets, or go on with it."""
        self.always_finishes = True  # from now on the network is not whole if the fit is stopped
        self._subnet = SubnetTraining(self.groups(network), network.tensors, self.learnt.get("dense"))
        self.learnt["dense"] = self._subnet.dense
        return self._subnet

    @override
    def check_phases(self, last: Position) -> None:
        self._subnet, self.always_finishes = None, False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._teachers = None
        if self.robust and stage == "fit":
            check_watchable(trainer, pl_module, [self.output_of or ""])
            self._models = {path: load_teacher(path, pl_module) for path in self.teachers or ()}

    @override
    def resume(self, network: Network) -> None:
        super().resume(network)
        if self.robust and self.under_way(network):
            self._teachers = SubnetTeachers(network.module, self.learnt.setdefault("teachers", {}), self._models)
            comparison = Comparison("classification", _TEMPERATURE, _TEACHER_TEMPERATURE, self.labels)
            teaching = Teaching(comparison, _WEIGHT, self.output_of or "")
            extend_step(network.module.trainer, partial(self._step, teaching, network.module.trainer))

    @override
    def after_step(self, network: Network, optimizer: Optimizer) -> None:
        if self._subnet is not None:
            self._subnet.after_step()
        elif self._teachers is not None:
            self._teachers.follow(_shared(network))

    def rank_subnet(self, network: Network, reward: float) -> None:
        """Take the present subnet for a teacher if it is the best so far."""
        if self._teachers is not None:
            self._teachers.rank(_shared(network), reward)

    @override
    def carry_out(self, network: Network, level: float) -> None:
        if self._teachers is not None:
            self._teachers = None
            del self.learnt["teachers"]
        super().carry_out(network, level)

    @override
    def _release(self, pl_module: LightningModule) -> None:
        super()._release(pl_module)
        if self.robust and pl_module._trainer is not None:
            restore_step(pl_module.trainer)

    def _step(self, teaching: Teaching, trainer: Trainer, step: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """A training step, in which a subnet learns from those teachers that there are."""
        if self._teachers is None:  # the search is over
            return step(*args)
        teachers = self._teachers.present() if self.searching else {}
        return teaching.step(trainer, teachers, step, args)


def _shared(network: Network) -> dict[str, Tensor]:
    """What the network holds, in all processes alike: each takes statistics of its own batches."""
    return {
        name: tensor.detach() if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point()
        else network.average(tensor.detach().clone())
        for name, tensor in network.tensors.items()
    }  # fmt: skip

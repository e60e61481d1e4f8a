"""What a penalty on channels is, and what it sees of a step of an optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.channels import ChannelGroup, Slot


@dataclass(frozen=True)
class Step:
    """One step of one optimizer, as a penalty sees it.

    Args:
        groups: The channel groups that may be pruned, by name.
        tensors: Parameters and buffers of the network by full name.
        rates: Learning rates of the parameters that this optimizer moves, by full name.
        costs: Cost of one channel of each group, relative to the average one; 1 for a group that is not named.
    """

    groups: Mapping[str, ChannelGroup]
    tensors: Mapping[str, Tensor]
    rates: Mapping[str, float]
    costs: Mapping[str, float] = field(default_factory=dict)

    def moved(self, slots: Iterable[Slot]) -> Iterator[tuple[Slot, Tensor, float]]:
        """Those of the slots that this step moves, with their parameters and learning rates."""
        for slot in slots:
            if slot.tensor in self.rates:
                yield slot, self.tensors[slot.tensor], self.rates[slot.tensor]


class ChannelPenalty(ABC):
    """Pushes channels towards zero while the network trains, so that little is lost when they go.

    A penalty may add to the gradients before a step, or move the weights after it (a proximal step), or both. It keeps
    no state of its own. Under DDP it finds the same gradients and weights in all processes, and must do the same.
    ``lightning_prune.penalties`` has ``add_gradient`` and ``write`` for its use.

    Example:
        >>> class Decay(ChannelPenalty):
        ...     wanted = "a bias"
        ...     def acts_on(self, group):
        ...         return bool(group.with_role("bias"))
        ...     def after_step(self, step):
        ...         for group in step.groups.values():
        ...             for slot, parameter, rate in step.moved(group.with_role("bias")):
        ...                 write(slot, parameter, slot.gather(parameter.detach()) * (1 - rate))
    """

    wanted: str = "a weight"
    """What a group must have for the penalty to act on it, for messages."""

    @abstractmethod
    def acts_on(self, group: ChannelGroup) -> bool:
        """Whether the penalty can push the channels of this group."""

    def check(self, groups: Mapping[str, ChannelGroup]) -> None:
        """See whether the penalty has anything to act on.

        Raises:
            ConfigurationError: If it can push the channels of none of these groups.
        """
        if not any(map(self.acts_on, groups.values())):
            raise ConfigurationError(
                f"{self} can act on none of the channel groups {', '.join(groups)}: none of them has {self.wanted}. "
                f'Use another penalty, such as "group_norm".'
            )

    def before_step(self, step: Step) -> None:  # noqa: B027 - a penalty may have nothing to do here
        """Add to the gradients, which are not clipped yet: what clips them later clips the sum."""

    def after_step(self, step: Step) -> None:  # noqa: B027
        """Move the weights."""


def learning_rates(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The present learning rate of each of the named tensors that an optimizer holds.

    Args:
        optimizer: The optimizer.
        tensors: Parameters and buffers by full name.
    """
    rates = {id(parameter): float(group["lr"]) for group in optimizer.param_groups for parameter in group["params"]}
    return {name: rates[id(tensor)] for name, tensor in tensors.items() if id(tensor) in rates}


def add_gradient(slot: Slot, parameter: Tensor, values: Tensor) -> None:
    """Add to the gradient of a slot's entries; a parameter without gradient does not move and is passed over.

    Args:
        slot: The slot.
        parameter: Its parameter.
        values: What to add, in the shape that :meth:`~lightning_prune.Slot.gather` gives.
    """
    if parameter.grad is not None:
        index = slot.index.flatten().to(parameter.device)
        parameter.grad.index_add_(slot.dim, index, _spread(slot, parameter, values))


def write(slot: Slot, parameter: Tensor, values: Tensor) -> None:
    """Replace a slot's entries.

    Args:
        slot: The slot.
        parameter: Its parameter.
        values: The new entries, in the shape that :meth:`~lightning_prune.Slot.gather` gives.
    """
    index = slot.index.flatten().to(parameter.device)
    parameter.detach().index_copy_(slot.dim, index, _spread(slot, parameter, values))


def add_decay(group: ChannelGroup, step: Step, coefficients: Tensor) -> None:
    """Add the gradient of half a squared 2-norm, with a coefficient for each unit, on all slices that go with it.

    Args:
        group: The group.
        step: The step of the optimizer.
        coefficients: Shape ``[units]``.
    """
    for slot, parameter, _ in step.moved(group.with_role("producer", "bias", "scale", "consumer")):
        weights = slot.gather(parameter.detach())
        add_gradient(slot, parameter, weights * coefficients[:, None].to(weights))


def _spread(slot: Slot, parameter: Tensor, values: Tensor) -> Tensor:
    """What ``gather`` has put side by side, as a part of the parameter again."""
    rest = parameter.detach().movedim(slot.dim, 0).shape[1:]
    return values.to(parameter.dtype).reshape(slot.index.numel(), *rest).movedim(0, slot.dim)

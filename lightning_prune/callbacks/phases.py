"""Methods that do something in the fit before their last round."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.callbacks.channels import ChannelPruning
from lightning_prune.callbacks.network import Network
from lightning_prune.penalties import Step, learning_rates
from lightning_prune.schedules import Position, Schedule


class PhasedPruning(ChannelPruning):
    """Channel pruning that is prepared for during the fit, up to the last round.

    The arguments are those of :class:`~lightning_prune.ChannelPruning`.
    """

    @abstractmethod
    def check_phases(self, last: Position) -> None:
        """See whether what comes before the last round fits into the fit; called before each fit.

        Args:
            last: Position of the last round; ``inf`` in a unit in which it is not known.

        Raises:
            ConfigurationError: If it does not.
        """

    def under_way(self, network: Network) -> bool:
        """Whether the last round is still to come."""
        return self.can_prune(network) and self._record["level"] < 1

    def foreseen(self, network: Network) -> Mapping[str, Tensor]:
        """The units that would be kept if the last round were now, in all processes alike."""
        keep = network.broadcast(super().select(network, 1.0))
        network.rewrap()  # latency is measured on trial cuts
        return keep

    def step(self, network: Network, optimizer: Optimizer) -> Step:
        """What a penalty on the groups that may be cut sees of a step of this optimizer."""
        groups = {name: network.graph.groups[name] for name in self._eligible(network)}
        rates = learning_rates(optimizer, network.tensors)
        return Step(groups, network.tensors, rates, self.learnt.get("costs", {}))

    def channel_costs(self, network: Network) -> dict[str, float]:
        """What one channel less of each group saves, relative to the mean over the groups that may be cut."""
        # Latency is too coarse and too noisy for a single channel.
        cost = network.cost_function("macs") if self.of == "latency" else self._cost(network)
        widths = network.graph.widths
        saved = {name: cost(widths) - cost({**widths, name: widths[name] - 1}) for name in self._eligible(network)}
        mean = sum(saved.values()) / len(saved)
        return {name: value / mean for name, value in saved.items()}

    @override
    def check_length(self, length: Position) -> None:
        self.check_phases(last_round(self._schedule, length))


def last_round(schedule: Schedule, length: Position) -> Position:
    """Position of the last round in every unit; ``inf`` where it is not known.

    Args:
        schedule: The schedule.
        length: Length of the fit.

    Example:
        >>> from lightning_prune import OneShot
        >>> last_round(OneShot(20, "step"), Position(epoch=4, step=80, fraction=1.0))
        Position(epoch=1.0, step=20.0, fraction=0.25)
    """
    own = schedule.unit
    whole = length.along(own)

    def along(unit: str, total: float) -> float:
        if unit == own:
            return float(schedule.end)
        return schedule.end / whole * total if math.isfinite(whole) and math.isfinite(total) else math.inf

    return Position(along("epoch", length.epoch), along("step", length.step), along("fraction", length.fraction))

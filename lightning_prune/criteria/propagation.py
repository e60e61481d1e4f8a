"""Importance that is handed back from the end of the network."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.criteria.activations import RunCriterion, RunningNetwork
from lightning_prune.graph.activations import Observer, Reading
from lightning_prune.graph.channels import Slot


@dataclass(frozen=True)
class NISP(RunCriterion):
    """Importance of the final responses, handed back to all channels through absolute weights (Yu et al., 2018).

    A unit is as important as what its readers make of it: the sum of the absolute weights that read it, each times
    the importance of the channel it adds to. Readers are gone through from the last to the first, so that a residual
    stream is worth at each place what is read of it from there on. Norms, activations, pooling and depthwise
    convolutions hand importance on as it is. What belongs to no group, as the outputs of the network, is as important
    as the variance of its responses (the source ranks the final responses by a method of feature selection instead).

    Args:
        batches: Number of real batches to average over, at least 1.

    Raises:
        PruneError: If no operator reads a group with a parameter; names the group.

    Example:
        >>> NISP(batches=2)
        NISP(batches=2)
    """

    provenance = "published"
    batches: int = 8

    def scores(
        self, network: RunningNetwork, wanted: Collection[str], generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Importance of the units of all groups, mean over batches; see the base."""
        found = [_propagated(network, run) for run in network.batches]
        for importance in found:
            self.refuse(set(wanted) - importance.keys(), "no operator reads it with a parameter")
        return {name: torch.stack([importance[name] for importance in found]).mean(0) for name in wanted}


def _propagated(network: RunningNetwork, run: Callable[[Observer], None]) -> dict[str, Tensor]:
    """Importance of the units of all groups on one batch."""
    readings: list[tuple[str, Slot, dict[int, Tensor]]] = []
    run(lambda reading: readings.append((reading.group, reading.slot, _variances(reading))))
    importance: dict[str, Tensor] = {}
    for group, slot, variances in reversed(readings):
        read = slot.gather(_weighed(network, slot, variances, importance)).sum(1)
        importance[group] = importance[group] + read if group in importance else read
    return importance


def _weighed(
    network: RunningNetwork, slot: Slot, variances: Mapping[int, Tensor], importance: Mapping[str, Tensor]
) -> Tensor:
    """Absolute weights that read, each times the importance of what it makes."""
    weight = network.tensors[slot.tensor].detach().abs().float()
    for dim in set(range(weight.dim())) - {slot.dim}:
        made = variances.get(dim, weight.new_ones(weight.shape[dim])).clone()
        for name, group in network.groups.items():
            for other in group.slots:
                if (other.tensor, other.dim) == (slot.tensor, dim):
                    of_units = importance.get(name, torch.zeros(group.width)).to(made)
                    made[other.index.flatten().to(made.device)] = of_units.repeat_interleave(other.index.shape[1])
        weight = weight * made.reshape([-1 if d == dim else 1 for d in range(weight.dim())])
    return weight


def _variances(reading: Reading) -> dict[int, Tensor]:
    """Variance of each response, by the dimension of the weight that makes it."""
    response = reading.response.detach().float()
    return {dim: response.movedim(along, 0).flatten(1).var(1, correction=0) for dim, along in reading.made.items()}

"""Importance that is handed back from the end of the network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.criteria.activations import UNREAD, RunCriterion, RunningNetwork
from lightning_prune.criteria.base import normalise
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

    Importance grows from layer to layer, so scores are relative to the mean of their group.

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
        """Importance of each unit relative to the mean of its group; see the base."""
        makers = defaultdict(list)
        for name, group in network.groups.items():
            for slot in group.slots:
                makers[slot.tensor, slot.dim].append((name, slot))
        unread = set(wanted)
        importance = {name: torch.zeros(group.width).double() for name, group in network.groups.items()}
        on_batches = zip(*map(_responses, network.batches), strict=True)
        for same in reversed(list(on_batches)):  # one reader on all batches
            group_name, slot, _ = same[0]
            weight = network.tensors[slot.tensor].detach().abs().float().cpu().double()
            for dim in (dim for dim in range(weight.dim()) if dim != slot.dim):
                moments = [response[dim] for *_, response in same if dim in response]
                made = _variance(moments) if moments else weight.new_ones(weight.shape[dim])
                for name, maker in makers[slot.tensor, dim]:
                    made[maker.index] = importance[name][:, None]
                weight = weight * made.reshape([-1 if d == dim else 1 for d in range(weight.dim())])
            importance[group_name] += slot.gather(weight).sum(1)
            unread.discard(group_name)
        self.refuse(unread, UNREAD)
        return {name: normalise(importance[name]).float() for name in wanted}


def _responses(run: Callable[[Observer], None]) -> list[tuple[str, Slot, dict[int, Tensor]]]:
    """Group and slot of each reading on one batch, with the mean and the mean square of each response."""
    found: list[tuple[str, Slot, dict[int, Tensor]]] = []

    def observer(reading: Reading) -> None:
        moments = {}
        for dim, along in reading.made.items():
            rows = reading.response.detach().float().movedim(along, 0).flatten(1)
            variance, mean = (part.cpu().double() for part in torch.var_mean(rows, 1, correction=0))
            moments[dim] = torch.stack([mean, variance + mean**2])
        found.append((reading.group, reading.slot, moments))

    run(observer)
    return found


def _variance(moments: Sequence[Tensor]) -> Tensor:
    """Variance over all batches, from the means and mean squares of each."""
    moment = torch.stack(tuple(moments)).mean(0)
    return (moment[1] - moment[0].square()).clamp(min=0)

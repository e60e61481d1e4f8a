"""How well the rest can do without a channel."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.criteria.activations import UNREAD, RunCriterion, RunningNetwork
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.activations import Reading
from lightning_prune.surgery.readers import signed_parts


@dataclass(frozen=True)
class ThiNet(RunCriterion):
    """Order in which units can be taken away such that what reads them notices least (Luo et al., 2017).

    The response of a reader is a sum over units. Greedily the unit is removed next that keeps the part of the response
    that all removed ones made smallest, in squares. A unit's score is its place in that order. All readers of a group
    count together.

    The source compares single entries of the response that it draws at random; here signed sums of all entries of a
    sample are compared, with random signs, whose squares are on average the squares of all entries. The source then
    rescales what is left by least squares: that is ``repair="scale"`` of :class:`~lightning_prune.ChannelPruning`.

    Args:
        batches: Number of real batches, at least 1.
        draws: Number of signed sums for each sample, at least 1.

    Raises:
        PruneError: If no operator reads a group with a parameter; names the group.

    Example:
        >>> ThiNet(batches=2)
        ThiNet(batches=2, draws=10)
    """

    provenance = "published"
    batches: int = 4
    draws: int = 10

    def __post_init__(self) -> None:
        """Refuse to work without a draw."""
        super().__post_init__()
        if self.draws < 1:
            raise ConfigurationError(f"ThiNet: draws must be at least 1, but is {self.draws}.")

    def scores(
        self, network: RunningNetwork, wanted: Collection[str], generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Place of each unit in the order of removal, in (0, 1]; see the base."""
        products = {name: torch.zeros(()) for name in wanted}

        def observer(reading: Reading) -> None:
            if reading.group in wanted:
                parts = signed_parts(reading, self.draws, generator)
                products[reading.group] = products[reading.group].to(parts) + parts.mT @ parts

        for run in network.batches:
            run(observer)
        self.refuse([name for name in wanted if not products[name].dim()], UNREAD)
        return {name: removal_order(product) for name, product in products.items()}


def removal_order(products: Tensor) -> Tensor:
    """Place of each unit in the greedy order of removal, in (0, 1].

    Args:
        products: Inner products of what the units add to the response, ``[units, units]``.

    Example:
        >>> parts = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 1.2]])  # two units partly cancel
        >>> removal_order(parts.T @ parts)
        tensor([0.3333, 0.6667, 1.0000])
    """
    cost = products.diagonal().clone()
    order = torch.zeros_like(cost)
    for place in range(1, len(cost) + 1):
        unit = cost.argmin()
        cost += 2 * products[unit]
        cost[unit] = torch.inf
        order[unit] = place / len(order)
    return order

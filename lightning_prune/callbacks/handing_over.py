"""Methods whose rounds look at what reads the channels, and hand over what goes to what stays."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from typing_extensions import override

from lightning_prune.bayes import evidence_of
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.phases import PhasedPruning
from lightning_prune.callbacks.repair import Repair
from lightning_prune.criteria import normalise


class HandingOver(PhasedPruning):
    """Channel pruning with evidence from what reads the channels.

    The arguments are those of :class:`~lightning_prune.ChannelPruning`.

    Attributes:
        batches: Number of real batches that each round looks at.
        reparameterise: Whether what goes is handed over to what stays.
        ridge: Strength of the regression that does it.
        chosen: The units that stay after this round.
    """

    batches: int
    reparameterise: bool
    ridge: float
    chosen: Mapping[str, Tensor]
    unseen = "this round goes by L2 norms, with nothing handed over"

    @property
    @override
    def repairing(self) -> Repair:
        return Repair("regression" if self.reparameterise else "none", self.batches, self.ridge)

    def evidence(self, network: Network, draw: Tensor) -> dict[str, Tensor]:
        """What speaks for each unit that may go, relative to the mean of its group; by L2 norms where nothing reads it.

        Args:
            network: The network as it is.
            draw: How often each batch counts, ``[looked_at]``.
        """
        names = self._eligible(network)
        ridge = self.ridge if self.reparameterise else None
        found = evidence_of(self._readers, network.tensors, names, draw, ridge)
        if any(name not in found for name in names):
            found = self.scores(network) | found
        return {name: normalise(found[name], network.masks.keep[name]).cpu() for name in names}

    @override
    def _selected(self, network: Network, level: float, otherwise: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self.chosen = super()._selected(network, level, otherwise)
        return self.chosen

"""Methods whose rounds look at what reads the channels, and hand over what goes to what stays."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_prune.bayes import evidence_of
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.phases import PhasedPruning
from lightning_prune.callbacks.support import shadows
from lightning_prune.criteria import normalise
from lightning_prune.errors import TraceError
from lightning_prune.graph.tracer import named_leaves
from lightning_prune.surgery.readers import Readers, observe
from lightning_prune.surgery.reparameterise import Before, hand_over, put_back


class HandingOver(PhasedPruning):
    """Channel pruning with evidence from what reads the channels.

    The arguments are those of :class:`~lightning_prune.ChannelPruning`.

    Attributes:
        batches: Number of real batches that each round looks at.
        reparameterise: Whether what goes is handed over to what stays.
        ridge: Strength of the regression that does it.
        looked_at: Number of batches that there were in this round.
        chosen: The units that stay after this round.
    """

    batches: int
    reparameterise: bool
    ridge: float
    looked_at: int
    chosen: Mapping[str, Tensor]
    _readers: Readers
    _before: Before = ()

    def evidence(self, network: Network, draw: Tensor) -> dict[str, Tensor]:
        """What speaks for each unit that may go; by its L2 norm, at the mean of the others, where nothing reads it.

        Args:
            network: The network as it is.
            draw: How often each batch counts, ``[looked_at]``.
        """
        names = self._eligible(network)
        found = evidence_of(self._readers, network.tensors, names, draw)
        if unread := [name for name in names if name not in found]:
            typical = torch.cat(list(found.values())).mean() if found else torch.ones(())
            norms = self._scores(network)
            found |= {name: normalise(norms[name], network.masks.keep[name]).cpu() * typical for name in unread}
        return found

    @override
    def prepare(self, network: Network) -> None:
        super().prepare(network)
        observe(network.graph, network.probe.evaluations(1), network.tensors)  # else it would fail amid the fit

    @override
    def carry_out(self, network: Network, level: float) -> None:
        self._readers = self._observed(network)
        try:
            super().carry_out(network, level)
        except BaseException:
            put_back(self._before)
            raise
        finally:
            self._readers, self._before = {}, ()

    def _observed(self, network: Network) -> Readers:
        """What reads the channels; nothing if the network cannot be followed any more, in any of the processes."""
        programs = network.probe.evaluations(self.batches)
        found, self.looked_at = Readers(), len(programs)
        try:
            found = observe(network.graph, programs, network.tensors)
        except TraceError as problem:
            rank_zero_warn(f"this round goes by L2 norms, with nothing handed over: {problem}")
        if float(network.average(torch.tensor(float(bool(found))))) < 1:
            return {}
        for reader in found.values():
            reader.share(network.average)
        return found

    @override
    def _selected(self, network: Network, level: float, otherwise: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        put_back(self._before)  # what was chosen before could not be carried out
        self._before = ()
        self.chosen = super()._selected(network, level, otherwise)
        if self.reparameterise:
            copies = [network.tensors, *map(named_leaves, shadows(network.module))]
            self._before = hand_over(copies, self._readers, self.chosen, network.masks.keep, self.ridge)
        return self.chosen

"""Rounds that refit what reads the channels to those that stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.groups import ChannelCallback
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.support import shadows
from lightning_prune.choices import unknown_name
from lightning_prune.errors import ConfigurationError, TraceError
from lightning_prune.graph.tracer import named_leaves
from lightning_prune.reinit import Keep, Reinit
from lightning_prune.surgery.readers import Readers, observe
from lightning_prune.surgery.reparameterise import Before, hand_over, put_back

RepairName = Literal["none", "scale", "regression"]


class Repair(NamedTuple):
    """How the readers are refitted.

    Args:
        how: ``"scale"``: a factor for each unit that stays (ThiNet, Luo et al., 2017); ``"regression"``: units that go
            as a function of those that stay (in the manner of He et al., 2017); ``"none"``: they are only looked at.
        batches: Number of real batches that each round looks at.
        ridge: Strength of the ridge of the least squares.
    """

    how: RepairName
    batches: int
    ridge: float = 1e-3


def checked_repair(how: RepairName, batches: int, reinit: Reinit) -> Repair | None:
    """The repair that a user has asked for; None for none.

    Args:
        how: See :class:`Repair`.
        batches: See there.
        reinit: What becomes of the weights after a round.

    Raises:
        ConfigurationError: If there is no such repair, or nothing would be left of it.
    """
    if how not in ("none", "scale", "regression"):
        raise unknown_name("repair", how, ["none", "scale", "regression"])
    if batches < 1:
        raise ConfigurationError(f"repair_batches must be at least 1, but is {batches}.")
    if how == "none":
        return None
    if not isinstance(reinit, Keep):
        raise ConfigurationError(
            f"repair={how!r} refits weights that reinit={reinit!r} replaces right afterwards. Leave out one of them."
        )
    return Repair(how, batches)


class RepairingRounds(ChannelCallback):
    """Rounds that look at what reads the channels, and refit it to what stays where that can be proven to be safe.

    Attributes:
        unseen: What is so in a round in which the network cannot be followed, for the warning.
        looked_at: Number of batches that there were in this round.
    """

    unseen = "what reads the channels is not refitted in this round"
    looked_at: int
    _repair: Repair | None = None
    _readers: Readers
    _before: Before = ()

    @property
    def repairing(self) -> Repair | None:
        """How the readers are refitted; None if rounds do not look at them either."""
        return self._repair

    @override
    def prepare(self, network: Network) -> None:
        super().prepare(network)
        if self.repairing is not None:
            observe(network.graph, network.probe.evaluations(1), network.tensors)  # else it would fail amid the fit

    @override
    def carry_out(self, network: Network, level: float) -> None:
        self._readers = {} if self.repairing is None else self._observed(network, self.repairing)
        try:
            super().carry_out(network, level)
        except BaseException:
            put_back(self._before)
            raise
        finally:
            self._readers, self._before = {}, ()

    def _observed(self, network: Network, repair: Repair) -> Readers:
        """What reads the channels; nothing if the network cannot be followed any more, in any of the processes."""
        programs = network.probe.evaluations(repair.batches)
        signs = self.generator("repair") if repair.how == "scale" else None
        found, self.looked_at = Readers(), len(programs)
        try:
            found = observe(network.graph, programs, network.tensors, signs)
        except TraceError as problem:
            rank_zero_warn(f"{self.unseen}: {problem}")
        if float(network.average(torch.tensor(float(bool(found))))) < 1:
            return {}
        for reader in found.values():
            reader.share(network.average)
        return found

    @override
    def _selected(self, network: Network, level: float, otherwise: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        put_back(self._before)  # what was chosen before could not be carried out
        self._before = ()
        chosen = super()._selected(network, level, otherwise)
        repair = self.repairing
        if repair is not None and repair.how != "none":
            copies = [network.tensors, *map(named_leaves, shadows(network.module))]
            self._before = hand_over(copies, self._readers, chosen, network.masks.keep, repair.ridge, repair.how)
        return chosen

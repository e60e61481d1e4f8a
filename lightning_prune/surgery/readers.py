"""What reads channel groups: moments of what it is given."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_prune.graph.activations import Reading, watch
from lightning_prune.graph.channels import ChannelGraph, Slot
from lightning_prune.graph.program import Program
from lightning_prune.surgery.mixing import Receiver, coverage, exchanges, only_reads, receiver_of
from lightning_prune.surgery.regression import unexplained

_SUMS_PER_UNIT = 10
"""Least squares on so many random sums of the equations come within about a ninth of the least error."""
Readers = dict[tuple[str, str, int], "ReadMoments"]
"""By group, tensor, and the dimension of that which reads the group."""


class ReadMoments:
    """Sums over what one tensor was given of a group, and over what came of it, batch by batch.

    Args:
        reading: Any of its readings.
        weight: The tensor.
        batches: Number of batches.
        signs: As for :func:`observe`.

    Attributes:
        slot: Where the tensor reads.
        outputs: Its dimensions along which outputs are made.
        exact: Whether units may be mixed in the tensor instead of in what it is given.
        receiver: What can take up a constant.
        reach: At which share of the places of its outputs each number in the tensor counts.
        parts: Inner products of what the units add to the response; zeros without ``signs``.
    """

    def __init__(self, reading: Reading, weight: Tensor, batches: int, signs: torch.Generator | None = None) -> None:
        self.slot: Slot = reading.slot
        self.outputs = tuple(sorted(reading.made))
        self.exact = True
        self.receiver: Receiver | None = None
        self.reach = coverage(reading, weight)
        units, entries = self.slot.index.shape
        like = reading.maps.new_zeros
        self._counts = like(batches, 2)
        self._given = like(batches, 2, entries, units)
        self._responses = like(batches, 2, _outputs(reading).shape[0])
        self._products = like(entries, units, units)
        self._unexplained: tuple[float, Tensor] | None = None
        self._signs, self._sums = signs, math.ceil(_SUMS_PER_UNIT * units / batches)
        self.parts = like(units, units)

    def add(self, batch: int, reading: Reading) -> None:
        """Take in a reading of a batch."""
        given = reading.maps.flatten(3) if reading.maps.dim() > 3 else reading.maps[..., None]
        given = given.permute(2, 1, 0, 3).flatten(2)  # [entries, units, everything else]
        response = _outputs(reading)
        self._counts[batch] += torch.tensor([given.shape[2], response.shape[1]]).to(self._counts)
        self._given[batch] += torch.stack([given.sum(2), given.square().sum(2)])
        self._responses[batch] += torch.stack([response.sum(1), response.square().sum(1)])
        self._products += given @ given.mT
        if self._signs is not None:
            parts = signed_parts(reading, math.ceil(self._sums / len(reading.maps)), self._signs)
            self.parts += (parts.mT @ parts).to(self.parts)

    def share(self, average: Callable[[Tensor], Tensor]) -> None:
        """Become the same in all processes.

        Args:
            average: Mean of a tensor over all of them.
        """
        self._counts, self._given = average(self._counts), average(self._given)
        self._responses, self._products = average(self._responses), average(self._products)
        self.reach, self.parts = average(self.reach), average(self.parts)
        proven = average(torch.tensor([float(self.exact), float(self.receiver is not None)]))
        self.exact = float(proven[0]) == 1
        self.receiver = self.receiver if float(proven[1]) == 1 else None

    def laws(self, draw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance of what is read, ``[units, entries]``, and variance of the outputs, ``[outputs]``.

        Args:
            draw: How often each batch counts, ``[batches]``.
        """
        draw = draw.to(self._counts)
        count = (draw @ self._counts).clamp_min(1)
        mean, square = torch.einsum("b,b...->...", draw, self._given) / count[0]
        output, output_square = torch.einsum("b,b...->...", draw, self._responses) / count[1]
        variances = (square - mean.square()).clamp_min(0), (output_square - output.square()).clamp_min(0)
        return mean.T, variances[0].T, variances[1]

    def laws_handed_over(self, draw: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`laws`, of what is left of each unit when the others take over what they can tell of it.

        Args:
            draw: As for :meth:`laws`; what the others can tell is taken from all batches.
            ridge: As for :func:`~lightning_prune.surgery.reparameterise.regress`.
        """
        mean, variance, response = self.laws(draw)
        if not self.exact:
            return mean, variance, response
        centred = self.receiver is not None
        if self._unexplained is None or self._unexplained[0] != ridge:
            self._unexplained = ridge, unexplained(self.mean, self.products, ridge, centred)
        share = self._unexplained[1].T.to(variance)
        return torch.zeros_like(mean), share * (variance if centred else variance + mean.square()), response

    @property
    def mean(self) -> Tensor:
        """Mean of each entry of each unit, ``[entries, units]``."""
        return self._given[:, 0].sum(0) / self._counts[:, 0].sum()

    @property
    def products(self) -> Tensor:
        """Mean products of equal entries of two units, ``[entries, units, units]``."""
        return self._products / self._counts[:, 0].sum()


def observe(
    graph: ChannelGraph,
    programs: Sequence[Program],
    tensors: Mapping[str, Tensor],
    signs: torch.Generator | None = None,
) -> Readers:
    """Run a network and take the moments of all that is read with parameters.

    Left out is what reads a unit at fewer places of its tensor than the unit has, as convolutions in groups do.

    Args:
        graph: Its channel graph.
        programs: Ways of running it, on one batch each.
        tensors: Its parameters and buffers by full name.
        signs: Where the signs of :func:`signed_parts` come from; None leaves these out.

    Raises:
        TraceError: If a program cannot be followed.
    """
    assert graph.evidence is not None
    evidence, found = graph.evidence, Readers()

    def observer(number: int, reading: Reading) -> None:
        slot = reading.slot
        if reading.place.index.shape != slot.index.shape:
            return
        key = reading.group, slot.tensor, slot.dim
        receiver = receiver_of(evidence, reading, tensors) if number == 0 else None
        if key not in found:
            found[key] = ReadMoments(reading, tensors[slot.tensor], len(programs), signs)
            found[key].exact, found[key].receiver = only_reads(evidence, slot), receiver
        reader = found[key]
        if number == 0:
            reader.exact = reader.exact and exchanges(reading, tensors[slot.tensor])
            reader.receiver = receiver if receiver == reader.receiver else None
        reader.add(number, reading)

    for number, program in enumerate(programs):
        watch(graph, program, partial(observer, number))
    users: dict[Receiver | None, set[str]] = defaultdict(set)
    for reader in found.values():
        users[reader.receiver].add(reader.slot.tensor)
    for reader in found.values():
        if len(users[reader.receiver]) > 1:  # to change it for one tensor would change it for the others
            reader.receiver = None
    return found


def _outputs(reading: Reading) -> Tensor:
    """The response as ``[outputs, everything else]``."""
    dims = [reading.made[dim] for dim in sorted(reading.made)]
    response = reading.response.detach().movedim(dims, list(range(len(dims))))
    response = response.to(torch.promote_types(response.dtype, torch.float32))
    return response.reshape(response.shape[: len(dims)].numel(), -1)


def signed_parts(reading: Reading, draws: int, generator: torch.Generator) -> Tensor:
    """What each unit adds to sums of a sample's response with random signs, ``[draws * samples, units]``.

    The square of such a sum is on average the sum of the squares.

    Args:
        reading: The operator that reads the units.
        draws: Number of sums for each sample.
        generator: Where the signs come from.
    """
    signs = (torch.randint(2, reading.response.shape, generator=generator) * 2 - 1 for _ in range(draws))
    return torch.cat([reading.contributions(sign) for sign in signs])

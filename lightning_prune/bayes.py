"""What channels mean to what reads them, and how likely they are to go: moments, evidence, Beta posteriors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune.graph.activations import Reading, watch
from lightning_prune.graph.analysis import Analysis
from lightning_prune.graph.channels import ChannelGraph, Slot
from lightning_prune.graph.program import Program
from lightning_prune.surgery.reparameterise import (
    Receiver,
    absorb,
    adds,
    exchanges,
    kernels,
    mean_behind,
    only_reads,
    regress,
)

_LEAST_VARIANCE_LEFT = 0.01
"""Of an output, without a channel. Where channels cancel each other, taking their variances for independent leaves
nothing or less than that."""
Readers = dict[tuple[str, str, int], "ReadMoments"]
"""By group, tensor, and the dimension of that which reads the group."""


class Beta(NamedTuple):
    """Beta laws of the probability that units go.

    Args:
        a: Weight of having gone, ``[units]``.
        b: Weight of having stayed, ``[units]``.

    Example:
        >>> Beta(torch.ones(2), torch.ones(2)).updated(torch.tensor([1.0, 0.25]), memory=0.5, weight=4.0)
        Beta(a=tensor([4.5000, 1.5000]), b=tensor([0.5000, 3.5000]))
    """

    a: Tensor
    b: Tensor

    @property
    def mean(self) -> Tensor:
        """The predicted probabilities."""
        return self.a / (self.a + self.b)

    def updated(self, observed: Tensor, memory: float, weight: float) -> Beta:
        """The laws after a round.

        Args:
            observed: Share of the tentative decisions by which each unit would go.
            memory: What is left of what was known before, in [0, 1].
            weight: How many decisions the round counts as.
        """
        return Beta(memory * self.a + weight * observed, memory * self.b + weight * (1 - observed))


def divergence(kernel: Tensor, mean: Tensor, variance: Tensor, response: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of the laws of outputs, from those without one of the units.

    Laws are taken for normal, and the parts of the units for independent.

    Args:
        kernel: ``[units, entries, outputs, rest]``, as of :func:`~lightning_prune.surgery.reparameterise.kernels`.
        mean: Means of what is read, ``[units, entries]``.
        variance: Its variances.
        response: Variances of the outputs, ``[outputs]``.

    Returns:
        Shape ``[units]``; what removing the unit does to an output, in nats.

    Example:
        >>> one = torch.ones(1, 1)  # a unit that makes half of the variance, and shifts the mean by 1
        >>> divergence(torch.ones(1, 1, 1, 1), one, one, torch.tensor([2.0]))  # (log 1/2 + (2 + 1) / 1 - 1) / 2
        tensor([0.6534])
    """
    shift = torch.einsum("ueo,ue->uo", kernel.sum(3), mean)
    part = torch.einsum("ueo,ue->uo", kernel.square().sum(3), variance)
    whole = response.clamp_min(1e-6 * float(response.mean()) + torch.finfo(response.dtype).tiny)
    left = torch.maximum(whole - part, _LEAST_VARIANCE_LEFT * whole)
    return ((left / whole).log() + (whole + shift.square()) / left - 1).mean(1) / 2


class ReadMoments:
    """Sums over what one tensor was given of a group, and over what came of it, batch by batch.

    Args:
        reading: Any of its readings.
        batches: Number of batches.

    Attributes:
        slot: Where the tensor reads.
        outputs: Its dimensions along which outputs are made.
        exact: Whether units may be mixed in the tensor instead of in what it is given.
        receiver: What can take up a constant.
    """

    def __init__(self, reading: Reading, batches: int) -> None:
        self.slot: Slot = reading.slot
        self.outputs = tuple(sorted(reading.made))
        self.exact = True
        self.receiver: Receiver | None = None
        units, entries = self.slot.index.shape
        like = reading.maps.new_zeros
        self._counts = like(batches, 2)
        self._given = like(batches, 2, entries, units)
        self._responses = like(batches, 2, _outputs(reading).shape[0])
        self._products = like(entries, units, units)

    def add(self, batch: int, reading: Reading) -> None:
        """Take in a reading of a batch."""
        given = reading.maps.flatten(3) if reading.maps.dim() > 3 else reading.maps[..., None]
        given = given.permute(2, 1, 0, 3).flatten(2)  # [entries, units, everything else]
        response = _outputs(reading)
        self._counts[batch] += torch.tensor([given.shape[2], response.shape[1]]).to(self._counts)
        self._given[batch] += torch.stack([given.sum(2), given.square().sum(2)])
        self._responses[batch] += torch.stack([response.sum(1), response.square().sum(1)])
        self._products += given @ given.mT

    def share(self, average: Callable[[Tensor], Tensor]) -> None:
        """Become the same in all processes.

        Args:
            average: Mean of a tensor over all of them.
        """
        self._counts, self._given = average(self._counts), average(self._given)
        self._responses, self._products = average(self._responses), average(self._products)
        proven = average(torch.tensor([float(self.exact), float(self.receiver is not None)]))
        self.exact = float(proven[0]) == 1
        self.receiver = self.receiver if float(proven[1]) == 1 else None

    def evidence(self, weight: Tensor, draw: Tensor) -> Tensor:
        """The :func:`divergence` on some of the batches.

        Args:
            weight: The tensor that reads.
            draw: How often each batch counts, ``[batches]``.
        """
        draw = draw.to(self._counts)
        count = (draw @ self._counts).clamp_min(1)
        mean, square = torch.einsum("b,b...->...", draw, self._given) / count[0]
        output, output_square = torch.einsum("b,b...->...", draw, self._responses) / count[1]
        kernel = kernels(weight, self.slot, self.outputs).to(mean)
        variance = (square - mean.square()).clamp_min(0)
        return divergence(kernel, mean.T, variance.T, (output_square - output.square()).clamp_min(0))

    @property
    def mean(self) -> Tensor:
        """Mean of each entry of each unit, ``[entries, units]``."""
        return self._given[:, 0].sum(0) / self._counts[:, 0].sum()

    @property
    def products(self) -> Tensor:
        """Mean products of equal entries of two units, ``[entries, units, units]``."""
        return self._products / self._counts[:, 0].sum()


def observe(graph: ChannelGraph, programs: Sequence[Program], tensors: Mapping[str, Tensor]) -> Readers:
    """Run a network and take the moments of all that is read with parameters.

    Left out is what reads a unit at fewer places of its tensor than the unit has, as convolutions in groups do.

    Args:
        graph: Its channel graph.
        programs: Ways of running it, on one batch each.
        tensors: Its parameters and buffers by full name.

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
        receiver = _receiver(evidence, reading, tensors) if number == 0 else None
        if key not in found:
            found[key] = ReadMoments(reading, len(programs))
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


def _receiver(evidence: Analysis, reading: Reading, tensors: Mapping[str, Tensor]) -> Receiver | None:
    """What can take up a constant: the bias of the module that reads, if there is one, or the norm behind."""
    if len(reading.made) != 1:
        return None
    ((output, dim),) = reading.made.items()
    path = reading.slot.tensor.rpartition(".")[0]
    beside = [name for name in tensors if name.rpartition(".")[0] == path and tensors[name].is_floating_point()]
    if bias := next((name for name in beside if adds(reading, tensors[name], dim)), None):
        return Receiver(bias, 1)
    mean = mean_behind(evidence, reading.slot, output)
    return None if mean is None else Receiver(mean, -1)


def _outputs(reading: Reading) -> Tensor:
    """The response as ``[outputs, everything else]``."""
    dims = [reading.made[dim] for dim in sorted(reading.made)]
    response = reading.response.detach().movedim(dims, list(range(len(dims))))
    response = response.to(torch.promote_types(response.dtype, torch.float32))
    return response.reshape(response.shape[: len(dims)].numel(), -1)


def evidence_of(
    readers: Readers, tensors: Mapping[str, Tensor], names: Collection[str], draw: Tensor
) -> dict[str, Tensor]:
    """Evidence for each unit of the named groups, summed over what reads them; none for those that nothing reads.

    Args:
        readers: What reads groups.
        tensors: Parameters and buffers by full name.
        names: Names of the groups.
        draw: How often each batch counts, ``[batches]``.
    """
    found: dict[str, Tensor] = {}
    for (group, tensor, _), reader in readers.items():
        if group in names:
            part = reader.evidence(tensors[tensor], draw).cpu()
            found[group] = found[group] + part if group in found else part
    return found


def share_gone(choices: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Share of the choices that each unit goes by.

    Args:
        choices: Bool masks by group name, True = stays.

    Example:
        >>> share_gone([{"a": torch.tensor([True, False])}, {"a": torch.tensor([False, False])}])
        {'a': tensor([0.5000, 1.0000])}
    """
    return {name: torch.stack([~choice[name] for choice in choices]).float().mean(0) for name in choices[0]}


def hand_over(
    copies: Sequence[Mapping[str, Tensor]],
    readers: Readers,
    keep: Mapping[str, Tensor],
    alive: Mapping[str, Tensor],
    ridge: float,
) -> list[tuple[Tensor, Tensor]]:
    """Have the units that stay take over from those that go, wherever that is proven to be possible.

    Args:
        copies: Parameters and buffers by full name, of the network and of averages of its weights.
        readers: What reads the units.
        keep: The units that stay, bool masks by group name.
        alive: The units that were there.
        ridge: As for :func:`~lightning_prune.surgery.reparameterise.regress`.

    Returns:
        Every tensor that was changed, with its former value, for :func:`put_back`.
    """
    changed: dict[str, None] = {}
    plans = []
    for (group, tensor, _), reader in readers.items():
        gone = alive[group] & ~keep[group] if group in keep and group in alive else torch.zeros(1, dtype=torch.bool)
        if reader.exact and bool(gone.any()):
            plans.append((reader, gone, keep[group] & alive[group]))
            changed.update({tensor: None, **({reader.receiver.tensor: None} if reader.receiver else {})})
    tensors = [copy[name].detach() for copy in copies for name in changed if name in copy]
    before = [(tensor, tensor.clone()) for tensor in tensors]
    for reader, gone, stay in plans:
        regression = regress(reader.mean, reader.products, gone, stay, ridge, reader.receiver is not None)
        for copy in copies:
            absorb(copy, reader.slot, reader.outputs, reader.receiver, gone, stay, regression)
    return before


def put_back(before: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Undo :func:`hand_over`."""
    for tensor, value in before:
        tensor.copy_(value)


def ranking(probabilities: Mapping[str, Tensor], evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Place of each unit among all: the likelier to go the lower, of equal ones those with less evidence.

    Args:
        probabilities: Of going, ``[units]`` by group name.
        evidence: For staying, likewise.

    Example:
        >>> ranking({"a": torch.tensor([0.5, 0.9, 0.5])}, {"a": torch.tensor([2.0, 3.0, 1.0])})
        {'a': tensor([2., 0., 1.])}
    """
    names = list(probabilities)
    likely, known = (torch.cat([part[name].cpu().double() for name in names]) for part in (probabilities, evidence))
    order = known.argsort(stable=True)
    order = order[(1 - likely[order]).argsort(stable=True)]
    places = torch.empty(len(order)).scatter_(0, order, torch.arange(len(order), dtype=torch.float))
    return dict(zip(names, places.split([len(probabilities[name]) for name in names]), strict=True))


def area_under_curve(predicted: Tensor, happened: Tensor) -> float:
    """Share of the pairs of one that happened and one that did not in which the former was predicted higher.

    Args:
        predicted: Any numbers; ties count half.
        happened: A bool mask.

    Returns:
        NaN if all or none happened.

    Example:
        >>> area_under_curve(torch.tensor([0.9, 0.4, 0.4, 0.1]), torch.tensor([True, True, False, False]))
        0.875
    """
    higher, lower = predicted[happened].double(), predicted[~happened].double()
    differences = higher[:, None] - lower[None, :]
    return float(((differences > 0).double() + (differences == 0).double() / 2).mean())

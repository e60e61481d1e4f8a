"""What channels mean to what reads them, and how likely they are to go: evidence and Beta posteriors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune.surgery.readers import Readers
from lightning_prune.surgery.reparameterise import kernels

_LEAST_VARIANCE_LEFT = 0.01
"""Of an output, without a channel. Where channels cancel each other, taking their variances for independent leaves
nothing or less than that."""


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


def divergence(kernel: Tensor, reach: Tensor, mean: Tensor, variance: Tensor, response: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of the laws of outputs, from those without one of the units.

    Laws are taken for normal, and the parts of the units for independent.

    Args:
        kernel: ``[units, entries, outputs, rest]``, as of :func:`~lightning_prune.surgery.reparameterise.kernels`.
        reach: Share of the places of an output at which each number of the kernel counts.
        mean: Means of what is read, ``[units, entries]``.
        variance: Its variances.
        response: Variances of the outputs, ``[outputs]``.

    Returns:
        Shape ``[units]``; what removing the unit does to an output, in nats.

    Example:
        >>> one = torch.ones(1, 1)  # a unit that makes half of the variance, and shifts the mean by 1
        >>> divergence(torch.ones(1, 1, 1, 1), one, one, one, torch.tensor([2.0]))  # (log 1/2 + (2 + 1) / 1 - 1) / 2
        tensor([0.6534])
    """
    shift = torch.einsum("ueo,ue->uo", (kernel * reach).sum(3), mean)
    part = torch.einsum("ueo,ue->uo", (kernel.square() * reach).sum(3), variance)
    whole = response.clamp_min(1e-6 * float(response.mean()) + torch.finfo(response.dtype).tiny)
    left = torch.maximum(whole - part, _LEAST_VARIANCE_LEFT * whole)
    return ((left / whole).log() + (whole + shift.square()) / left - 1).mean(1) / 2


def evidence_of(
    readers: Readers,
    tensors: Mapping[str, Tensor],
    names: Collection[str],
    draw: Tensor,
    ridge: float | None = None,
) -> dict[str, Tensor]:
    """Evidence for each unit of the named groups, summed over what reads them; none for those that nothing reads.

    Args:
        readers: What reads groups.
        tensors: Parameters and buffers by full name.
        names: Names of the groups.
        draw: How often each batch counts, ``[batches]``.
        ridge: Strength of the regression by which what goes is handed over; None where nothing is.
    """
    found: dict[str, Tensor] = {}
    for (group, tensor, _), reader in readers.items():
        if group in names:
            parts = (kernels(part, reader.slot, reader.outputs) for part in (tensors[tensor], reader.reach))
            kernel, reach = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts)
            laws = reader.laws(draw) if ridge is None else reader.laws_handed_over(draw, ridge)
            part = divergence(kernel, reach, *laws).cpu()
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

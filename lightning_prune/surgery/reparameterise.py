"""Handing the part of removed channels over to those that stay, where what reads them can be proven to allow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune.graph.activations import Reading
from lightning_prune.graph.analysis import Analysis
from lightning_prune.graph.channels import Slot
from lightning_prune.graph.tracer import Event

_OTHER_ROLES = ("producer", "bias", "scale", "statistic")


class Receiver(NamedTuple):
    """A vector that can make up for a constant missing from a response.

    Args:
        tensor: Full name of the vector.
        sign: 1 for a bias; -1 for the running mean of the norm behind, which is subtracted.
    """

    tensor: str
    sign: int


class Regression(NamedTuple):
    """Removed units as an affine function of those that stay, entry by entry.

    Args:
        slopes: Shape ``[entries, removed, staying]``.
        constants: Shape ``[entries, removed]``.
    """

    slopes: Tensor
    constants: Tensor


def regress(
    mean: Tensor, products: Tensor, gone: Tensor, stay: Tensor, ridge: float = 1e-3, centred: bool = True
) -> Regression:
    """Ridge regression of removed units on those that stay.

    Args:
        mean: Mean of each entry of each unit, ``[entries, units]``.
        products: Mean products of equal entries of two units, ``[entries, units, units]``.
        gone: Removed units, a bool mask.
        stay: Staying units, a bool mask.
        ridge: What is added to their covariance, relative to its mean diagonal.
        centred: Whether there may be a constant; else the regression goes through the origin.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 7.0, 9.0, 11.0]])  # the second is 3 + 2 times the first
        >>> gone = torch.tensor([False, True])
        >>> found = regress(x.mean(1)[None], (x @ x.T / 4)[None], gone, ~gone, ridge=0.0)
        >>> found.slopes.flatten().round(decimals=4), found.constants.flatten().round(decimals=4)
        (tensor([2.], dtype=torch.float64), tensor([3.], dtype=torch.float64))
    """
    mean, products = mean.detach().cpu().double(), products.detach().cpu().double()
    gone, stay = gone.cpu(), stay.cpu()
    if not centred:
        mean = torch.zeros_like(mean)
    covariance = products - mean[:, :, None] * mean[:, None, :]
    within, across = covariance[:, stay][:, :, stay], covariance[:, stay][:, :, gone]
    diagonal = within.diagonal(dim1=1, dim2=2)
    # Units that never vary have nothing to tell: the least addition keeps their slopes at 0.
    added = (ridge * diagonal.mean(1)).clamp_min(torch.finfo(torch.float32).tiny)
    slopes = torch.linalg.solve(within + torch.diag_embed(added[:, None].expand_as(diagonal)), across).mT
    return Regression(slopes, mean[:, gone] - (slopes @ mean[:, stay, None]).squeeze(2))


def kernels(weight: Tensor, slot: Slot, outputs: Sequence[int]) -> Tensor:
    """What each entry of each unit is multiplied with, ``[units, entries, outputs, rest]``.

    Args:
        weight: The tensor that reads the units.
        slot: Where it reads them.
        outputs: Its dimensions along which outputs are made.
    """
    units, entries = slot.index.shape
    chosen = weight.detach().index_select(slot.dim, slot.index.flatten().to(weight.device)).movedim(slot.dim, 0)
    # The dimension of the units has come to the front, so those before it have moved on by one.
    dims = [dim + 1 if dim < slot.dim else dim for dim in sorted(outputs)]
    chosen = chosen.movedim(dims, list(range(1, len(dims) + 1)))
    count = chosen.shape[1 : len(dims) + 1].numel()
    return chosen.reshape(units, entries, count, chosen[0].numel() // count)


def absorb(
    tensors: Mapping[str, Tensor],
    slot: Slot,
    outputs: Sequence[int],
    receiver: Receiver | None,
    gone: Tensor,
    stay: Tensor,
    regression: Regression,
) -> None:
    """Have the staying units do in one tensor what removed ones did there, as far as a regression can tell.

    The weights of the removed units are left for whoever switches them off.

    Args:
        tensors: Parameters and buffers by full name.
        slot: Where the tensor reads the units.
        outputs: Its dimensions along which outputs are made.
        receiver: What takes up the constant; None leaves it out.
        gone: Removed units, a bool mask.
        stay: Staying units, a bool mask.
        regression: The removed units as a function of the staying ones.

    Example:
        >>> slot = Slot("head.weight", 1, torch.arange(2)[:, None], "consumer")
        >>> tensors = {"head.weight": torch.tensor([[1.0, 10.0]]), "head.bias": torch.zeros(1)}
        >>> gone, known = torch.tensor([False, True]), Regression(torch.full((1, 1, 1), 2.0), torch.full((1, 1), 3.0))
        >>> absorb(tensors, slot, [0], Receiver("head.bias", 1), gone, ~gone, known)
        >>> tensors["head.weight"], tensors["head.bias"]
        (tensor([[21., 10.]]), tensor([30.]))
    """
    weight = tensors[slot.tensor].detach()
    slopes, constants = (
        part.to(weight.device, torch.promote_types(weight.dtype, torch.float32)) for part in regression
    )
    gone, stay = gone.cpu(), stay.cpu()
    parts = weight.index_select(slot.dim, slot.positions(gone).to(weight.device)).movedim(slot.dim, 0)
    parts = parts.reshape(int(gone.sum()), slot.index.shape[1], *parts.shape[1:]).to(slopes)
    taken = torch.einsum("eps,pe...->se...", slopes, parts).flatten(0, 1).movedim(0, slot.dim)
    if receiver is not None:
        vector = tensors[receiver.tensor].detach()
        total = kernels(weight, slot, outputs)[gone.to(weight.device)].sum(3).to(constants)
        vector += (receiver.sign * torch.einsum("peo,ep->o", total, constants)).to(vector)
    weight.index_add_(slot.dim, slot.positions(stay).to(weight.device), taken.to(weight.dtype))


def exchanges(reading: Reading, weight: Tensor) -> bool:
    """Whether to mix units in what is read gives the same as to mix them in the weight that reads them.

    It is tried out on the operator itself, so it is not so for a weight that is worked on or cast before it is read.

    Args:
        reading: The operator.
        weight: The tensor of its slot.
    """
    index, data, values = reading.place.index, reading.data.detach(), weight.detach()
    expected = reading.call(_mixed(data, reading.place.dim, index, index.roll(-1, 0)))
    kept = values.clone()
    try:
        values.copy_(_mixed(kept, reading.slot.dim, reading.slot.index, reading.slot.index.roll(1, 0)))
        found = reading.call(data)
    finally:
        values.copy_(kept)
    return _same(expected, found)


def adds(reading: Reading, vector: Tensor, dim: int) -> bool:
    """Whether an operator adds the vector to its response, along one dimension of it.

    Args:
        reading: The operator.
        vector: A parameter.
        dim: The dimension of the response.
    """
    values, nothing = vector.detach(), torch.zeros_like(reading.data)
    if values.dim() != 1 or len(values) != reading.response.shape[dim]:
        return False
    ramp = torch.linspace(1, 2, len(values), device=values.device, dtype=values.dtype)
    before, kept = reading.call(nothing), values.clone()
    try:
        values.add_(ramp)
        after = reading.call(nothing)
    finally:
        values.copy_(kept)
    return _same(ramp.view([-1 if d == dim % before.dim() else 1 for d in range(before.dim())]), after - before)


def only_reads(analysis: Analysis, slot: Slot) -> bool:
    """Whether a tensor does nothing but read along a dimension; a tied one may make channels along it elsewhere."""
    ids = _labels(analysis, slot.tensor, slot.dim)
    others = [marked for role in _OTHER_ROLES for marked in analysis.space.marks.get(role, [])]
    return not any(bool(torch.isin(ids, marked).any()) for marked in others)


def mean_behind(analysis: Analysis, slot: Slot, output: int) -> str | None:
    """The running mean of the batch-norm that is given the response of a weight, wherever that reads.

    Args:
        analysis: What is known of the network.
        slot: Where the weight reads.
        output: Its dimension along which it makes channels.
    """
    read, made = (_labels(analysis, slot.tensor, dim) for dim in (slot.dim, output))
    found = set()
    for run in analysis.runs:
        events = [event for event in run.events if any(w.planes for w in event.inputs)]  # others count batches
        for event, behind in zip(events, [*events[1:], None], strict=True):
            reads = any(_is(plane.ids, read) for witness in event.inputs for plane in witness.planes)
            if reads and len(event.inputs) > 1:  # else it turns the weight around
                found.add(_running_mean(analysis, behind, made))
    return found.pop() if len(found) == 1 else None


def _running_mean(analysis: Analysis, event: Event | None, channels: Tensor) -> str | None:
    if event is None or "batch_norm" not in event.name or len(event.inputs) < 3:
        return None
    data, mean = event.inputs[0].planes, event.inputs[-2].planes
    if len(data) != 1 or len(mean) != 1 or not _is(data[0].ids, channels):
        return None
    statistics = analysis.space.marks.get("statistic", [])
    if not any(torch.equal(mean[0].ids.flatten(), ids.flatten()) for ids in statistics):
        return None
    return next((leaf.tensor for leaf in analysis.leaves if _is(mean[0].ids, leaf.ids)), None)


def _labels(analysis: Analysis, tensor: str, dim: int) -> Tensor:
    return next(leaf.ids for leaf in analysis.leaves if (leaf.tensor, leaf.dim) == (tensor, dim))


def _is(ids: Tensor, labels: Tensor) -> bool:
    return torch.equal(ids.flatten(), labels)


def _mixed(tensor: Tensor, dim: int, index: Tensor, others: Tensor) -> Tensor:
    """A tensor with other positions along one dimension added to those at ``index``."""
    index, others = index.flatten().to(tensor.device), others.flatten().to(tensor.device)
    return tensor.index_add(dim, index, tensor.index_select(dim, others))


def _same(expected: Tensor, found: Tensor) -> bool:
    tolerance = 1e-7 if expected.dtype == torch.float64 else 1e-3
    largest = float(expected.abs().max())
    return bool(((expected - found).abs() <= tolerance * largest).all())

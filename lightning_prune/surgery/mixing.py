"""What can be proven of an operator that reads channels: whether they may be mixed in its weights instead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
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


def receiver_of(evidence: Analysis, reading: Reading, tensors: Mapping[str, Tensor]) -> Receiver | None:
    """What can take up a constant: the bias of the module that reads, if there is one, or the norm behind.

    Args:
        evidence: What is known of the network.
        reading: The operator.
        tensors: Parameters and buffers of the network by full name.
    """
    if len(reading.made) != 1:
        return None
    ((output, dim),) = reading.made.items()
    path = reading.slot.tensor.rpartition(".")[0]
    beside = [name for name in tensors if name.rpartition(".")[0] == path and tensors[name].is_floating_point()]
    if bias := next((name for name in beside if adds(reading, tensors[name], dim)), None):
        return Receiver(bias, 1)
    mean = mean_behind(evidence, reading.slot, output)
    return None if mean is None else Receiver(mean, -1)


def coverage(reading: Reading, weight: Tensor) -> Tensor:
    """Share of the places of the response at which each weight meets something: less at borders and with strides.

    Args:
        reading: The operator that reads with the weight.
        weight: The tensor of its slot.

    Returns:
        A tensor that broadcasts over the weight; ones where the operator is given something else than the weight.
    """
    places = reading.response.numel() // max(1, math.prod(reading.response.shape[dim] for dim in reading.made.values()))
    trained = weight.requires_grad

    def meetings() -> Tensor | None:
        with torch.enable_grad():
            response = reading.call(torch.ones_like(reading.data))
            if not response.requires_grad:
                return None
            return torch.autograd.grad(response.sum(), weight, allow_unused=True)[0]

    try:
        weight.requires_grad_(True)
        # Inside the execution of an operator autograd is switched off in this thread.
        with ThreadPoolExecutor(1) as thread:
            counts = thread.submit(meetings).result()
    finally:
        weight.requires_grad_(trained)
    return torch.ones_like(weight, requires_grad=False) if counts is None else counts / places


def exchanges(reading: Reading, weight: Tensor) -> bool:
    """Whether to mix units in what is read gives the same as to mix them in the weight that reads them.

    It is tried out on the operator itself, so it is not so for a weight that is worked on before it is read.

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
    met = [event for run in analysis.runs for event in run.events if len(event.inputs) > 1]  # others only turn it
    made = [plane.ids for event in met for witness in event.witnesses for plane in witness.planes]
    return not any(bool(torch.isin(ids, marked).any()) for marked in others + made)


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

"""What a scorer sees of a channel: numbers whose count and meaning depend on no shape, so that it fits any network."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_prune.criteria.base import entries
from lightning_prune.graph.channels import ChannelGroup, Slot

_SMALLEST = 1e-8
_LARGEST = 5.0

UNIT_FEATURES = (
    "producers: log10 mean |w|",
    "producers: log10 root mean w^2",
    "producers: mean w",
    "producers: log10 standard deviation of w",
    "producers: log10 max |w|",
    "producers: mean w^4 / (mean w^2)^2",
    "consumers: log10 root mean w^2",
    "scales: mean |w|",
    "biases: mean w",
    "statistics: mean",
    "statistics: log10 root mean square",
    "producers: log10 mean |g|",
    "producers: log10 mean |w g|",
    "off: log10 root of batch mean of (sum w g)^2",
    "producers: log10 root mean g^2",
)
CONTEXT_FEATURES = (
    "place of the group, 0 to 1",
    "log10 units",
    "producers: log10 entries of a unit at one kernel position",
    "producers: log10 kernel positions",
    "producers: log10 (1 + number)",
    "share of the MACs",
    "share of the parameters",
)
_LAYOUT = (
    *(f"{name}, standardised in the group" for name in UNIT_FEATURES),
    *(f"{name}, {of} in the group" for of in ("mean", "standard deviation") for name in UNIT_FEATURES),
    *CONTEXT_FEATURES,
    f"log10 of at least {_SMALLEST}, all clipped to {_LARGEST}",
)
FEATURE_COUNT = 3 * len(UNIT_FEATURES) + len(CONTEXT_FEATURES)
FEATURE_VERSION = hashlib.sha256("\n".join(_LAYOUT).encode()).hexdigest()[:12]
"""Changes whenever the list of features does; a scorer works only on the features that it was trained on."""


def features(
    groups: Mapping[str, ChannelGroup],
    tensors: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
    shares: Mapping[str, tuple[float, float]],
) -> dict[str, Tensor]:
    """Features of every unit: its own beside the others of its group, what these have in common, and their place.

    Args:
        groups: Channel groups by name, in the order of the network.
        tensors: Parameters and buffers of the network by full name.
        statistics: Averages over batches of what :func:`gradient_statistics` gives; a group without counts as 0.
        shares: Share of the network's MACs and of its parameters that hang on the units of each group.

    Returns:
        By group name float32 tensors of shape ``[units, FEATURE_COUNT]`` on the CPU, finite for finite weights.
    """
    found = {}
    for place, (name, group) in enumerate(groups.items()):
        own = _unit_features(group, tensors, statistics.get(name))
        mean, spread = own.mean(0, keepdim=True), own.std(0, correction=0, keepdim=True)
        common = torch.cat([mean, spread, _context(group, tensors, place / len(groups), shares[name])], 1)
        every = torch.cat([(own - mean) / (spread + 1e-6), common.expand(group.width, -1)], 1)
        found[name] = every.clamp(-_LARGEST, _LARGEST).float()
    return found


def gradient_statistics(group: ChannelGroup, tensors: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """What one batch's gradients say of each unit, to be averaged over batches.

    Args:
        group: The group.
        tensors: Parameters and buffers by full name.
        gradients: Gradient of the loss by full name.

    Returns:
        Shape ``[units, 4]`` on the CPU: mean |g|, mean |w g| and mean g² of the producers, around the squared slope of
        the loss along the unit's gate (third).
    """
    made = [slot for slot in group.with_role("producer") if slot.tensor in gradients]
    w, g = _values(group, made, tensors), _values(group, made, gradients)
    off = [slot for slot in group.off if slot.tensor in gradients]
    slope = (_values(group, off, tensors) * _values(group, off, gradients)).sum(1).square()
    return torch.stack([_mean(g.abs()), _mean((w * g).abs()), slope, _mean(g.square())], 1)


def _unit_features(group: ChannelGroup, tensors: Mapping[str, Tensor], statistics: Tensor | None) -> Tensor:
    made, read, scales, biases, statistic = (
        _values(group, group.with_role(role), tensors)
        for role in ("producer", "consumer", "scale", "bias", "statistic")
    )
    columns = [
        _log(_mean(made.abs()), made),
        _log(_root_mean(made), made),
        _mean(made),
        _log((made - _mean(made)[:, None]).square().sum(1).div(max(made.shape[1], 1)).sqrt(), made),
        _log(made.abs().amax(1) if made.shape[1] else made.sum(1), made),
        _mean(made**4) / _mean(made.square()).square().clamp(min=torch.finfo(torch.float64).tiny),
        _log(_root_mean(read), read),
        _mean(scales.abs()),
        _mean(biases),
        _mean(statistic),
        _log(_root_mean(statistic), statistic),
    ]
    if statistics is None:
        return torch.cat([torch.stack(columns, 1), made.new_zeros(group.width, 4)], 1)
    magnitude, effect, slope, square = statistics.double().unbind(1)
    logs = [_log(magnitude, made), _log(effect, made), _log(slope.sqrt(), statistics), _log(square.sqrt(), made)]
    return torch.stack([*columns, *logs], 1)


def _context(group: ChannelGroup, tensors: Mapping[str, Tensor], place: float, shares: tuple[float, float]) -> Tensor:
    made = group.with_role("producer")
    kernel = math.prod(tensors[made[0].tensor].shape[2:]) if made else 1
    count = sum(slot.gather(tensors[slot.tensor]).shape[1] for slot in made) / len(made) / kernel if made else 1
    logs = [math.log10(number) for number in (group.width, count, kernel, 1 + len(made))]
    return torch.tensor([[place, *logs, *shares]], dtype=torch.float64)


def _values(group: ChannelGroup, slots: Iterable[Slot], tensors: Mapping[str, Tensor]) -> Tensor:
    """Entries of the slots, unit by unit, as doubles of shape ``[units, entries]`` on the CPU; perhaps none."""
    slots = tuple(slots)
    if not slots:
        return torch.zeros(group.width, 0, dtype=torch.float64)
    found = entries(slots, tensors).cpu()
    return (torch.view_as_real(found).flatten(1) if found.is_complex() else found).double()


def _mean(values: Tensor) -> Tensor:
    """Mean over each unit's entries; 0 where there are none."""
    return values.sum(1) / max(values.shape[1], 1)


def _root_mean(values: Tensor) -> Tensor:
    return _mean(values.square()).sqrt()


def _log(values: Tensor, of: Tensor) -> Tensor:
    """Logarithms of what was computed of some entries; 0 where there are no such entries."""
    return values.clamp(min=_SMALLEST).log10() if of.shape[1] else torch.zeros_like(values)

"""Weights in which no error can hide: norms, biases, layer scales far from their start values; all values distinct."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_DISTINCT_UP_TO = 8_000_000  # elements; sorting larger tensors takes long, and the judge does not need it
_NEARLY_ZERO = 1e-3


@torch.no_grad()
def make_informative(model: nn.Module) -> nn.Module:
    """Randomise what starts constant or almost zero, in place; the same for every backend."""
    for module in model.modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            mean.normal_(0, 0.1)
            variance.uniform_(0.5, 1.5)
            for name, buffer in module.named_buffers(recurse=False):
                if name == "weight":  # frozen batch norms keep their affine values as buffers
                    buffer.uniform_(0.5, 1.5)
                elif name == "bias":
                    buffer.normal_(0, 0.1)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            _randomise(name, parameter)
            _make_distinct(parameter)
    return model


def _randomise(name: str, parameter: Tensor) -> None:
    if parameter.numel() == 0:
        return
    low, high = (float(value) for value in parameter.aminmax())
    largest = max(abs(low), abs(high))
    if parameter.dim() > 1 and low < high and largest >= _NEARLY_ZERO:
        return
    if "bias" in name.rpartition(".")[2] or largest == 0:
        parameter.normal_(0, 0.1)
    else:
        parameter.uniform_(0.5, 1.5)


def _make_distinct(parameter: Tensor) -> None:
    """Move equal float32 values apart by the smallest steps there are, so that each can be found again."""
    if parameter.dtype is not torch.float32 or not 1 < parameter.numel() <= _DISTINCT_UP_TO:
        return
    values, order = parameter.flatten().sort()
    bits = values.view(torch.int32).long()
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # rises with the value
    steps = torch.arange(len(ordered), device=ordered.device)
    ordered = (ordered - steps).cummax(0).values + steps
    bits = torch.where(ordered < 0, (-ordered) | 0x80000000, ordered)
    bits = torch.where(bits >= 2**31, bits - 2**32, bits)
    flat = torch.empty_like(values)
    flat[order] = bits.int().view(torch.float32)
    parameter.copy_(flat.view_as(parameter))

"""What tests of the channel graph and of surgery share: an oracle that does not use the library's own masks."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves


def randomise(model: nn.Module) -> nn.Module:
    """Norms that do something: statistics and affine parameters far from their start values, biases too."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
            if isinstance(module, (_BatchNorm, nn.GroupNorm, nn.LayerNorm)) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1)
    return model


def random_keep(graph, share=0.5):
    """Sorted random units of every group, at least one of each."""
    return {
        name: torch.randperm(group.width)[: max(1, round(group.width * share))].sort().values
        for name, group in graph.groups.items()
    }


def masked_copy(model, graph, keep):
    """A copy of the model whose removed units are switched off with plain indexing."""
    masked = copy.deepcopy(model)
    tensors = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
    with torch.no_grad():
        for name, units in keep.items():
            group = graph.groups[name]
            removed = [unit for unit in range(group.width) if unit not in set(units.tolist())]
            for slot in group.off:
                positions = [position for unit in removed for position in slot.index[unit].tolist()]
                where = [slice(None)] * tensors[slot.tensor].dim()
                where[slot.dim] = positions
                tensors[slot.tensor][tuple(where)] = 0
    return masked


def run(model, *inputs):
    """All tensors that the model gives in evaluation mode."""
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        result = model(*inputs)
    for name, module in model.named_modules():
        module.training = modes[name]
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def difference(expected, found):
    """Largest difference over all outputs, relative to the largest expected value of each."""
    assert [tuple(a.shape) for a in expected] == [tuple(b.shape) for b in found]
    scales = [float(a.abs().max()) or 1.0 for a in expected]
    return max(float((a - b).abs().max()) / n for a, b, n in zip(expected, found, scales, strict=True))


def expected_attributes(module):
    """Integers that a module ought to remember of its tensors' sizes."""
    if isinstance(module, _ConvTransposeNd):
        return {"in_channels": module.weight.shape[0], "out_channels": module.weight.shape[1] * module.groups}
    if isinstance(module, _ConvNd):
        return {"out_channels": module.weight.shape[0], "in_channels": module.weight.shape[1] * module.groups}
    if isinstance(module, nn.Linear):
        return {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}
    if isinstance(module, _BatchNorm) and module.weight is not None:
        return {"num_features": len(module.weight)}
    if isinstance(module, nn.GroupNorm) and module.weight is not None:
        return {"num_channels": len(module.weight)}
    return {}


def disagreeing_attributes(model):
    """Integers that modules remember of their sizes and that do not agree with their tensors."""
    return [
        f"{name}.{key} is {getattr(module, key)}, not {size}"
        for name, module in model.named_modules()
        for key, size in expected_attributes(module).items()
        if getattr(module, key) != size
    ]


class Net(nn.Module):
    """A network from a function and its parts: ``Net(lambda net, x: net.b(net.a(x)), a=..., b=...)``."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


class HalfPrecision(nn.Sequential):
    """Layers that run under autocast, as in a trainer of mixed precision."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)

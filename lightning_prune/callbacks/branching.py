"""Linear branches beside the convolutions of the network of a running fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_prune.branches import descend, no_branches
from lightning_prune.callbacks.network import Network
from lightning_prune.errors import ConfigurationError
from lightning_prune.penalties import learning_rates

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def branch_out(network: Network, learnt: dict[str, Any]) -> None:
    """Give branches, which compute nothing yet, to each convolution that has none of its size.

    The network computes with the sum of a kernel and its folded branches, which is what the branched network computes;
    its own weight holds that sum all the time. The fit's optimizer moves the sum: to move the kernel beside the
    branches instead would be the same, but for weight decay, which here acts on the sum. So nothing is to be done when
    branches are given up: what they have learnt is in the weights.

    Args:
        network: The network.
        learnt: Factors and momentum of branches by the full name of the weight, brought up to date in place.

    Raises:
        ConfigurationError: If the network has no convolution that can have branches.
    """
    before = dict(learnt)
    learnt.clear()
    for name, module in _convolutions(network).items():
        weight, held = module.weight, before.get(name)
        if held is None or held["branches"]["last"].shape != weight.shape:
            identity = module.in_channels == module.out_channels and set(module.stride) == {1}
            branches = no_branches(weight, module.groups, identity)
            held = {"branches": branches, "velocities": {n: torch.zeros_like(f) for n, f in branches.items()}}
        learnt[name] = {part: {n: factor.to(weight) for n, factor in held[part].items()} for part in held}
    if not learnt:
        raise ConfigurationError(
            f"no convolution of {type(network.module).__name__} can have branches: they are for the weights of Conv1d, "
            f"Conv2d and Conv3d that are neither shared nor parametrized. Use branches=False."
        )


def move_branches(network: Network, learnt: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Take a step on the branches of the weights that an optimizer has just moved, whose gradients are still there.

    Nothing moves when a gradient is not finite: there are optimizers that leave out such a step by themselves.

    Args:
        network: The network, its weights without gates.
        learnt: As for :func:`branch_out`.
        optimizer: The optimizer.
    """
    tensors = network.tensors
    rates = learning_rates(optimizer, tensors)
    gradients = {name: tensors[name].grad for name in learnt if name in rates}
    found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    if not all(torch.stack([gradient.isfinite().all() for gradient in found.values()]).tolist() if found else ()):
        return
    for name, gradient in found.items():
        tensors[name].detach().add_(descend(**learnt[name], gradient=gradient, rate=rates[name]))
    network.mask_weights()


def _convolutions(network: Network) -> dict[str, nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Those of torch's convolutions that can have branches, by the full name of their weight."""
    names = {id(tensor): name for name, tensor in network.tensors.items()}
    uses = Counter(id(parameter) for _, parameter in network.module.named_parameters(remove_duplicate=False))
    return {
        names[id(module.weight)]: module
        for module in network.module.modules()
        if isinstance(module, Convolution) and uses[id(module.weight)] == 1 and module.weight.is_floating_point()
    }

"""Parallel linear branches of a convolution, and the one kernel that they fold into."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Branches = dict[str, Tensor]
"""The factors of the branches beside one kernel ``[out, in / groups, *taps]``, by name.

``first`` ``[in, in / groups]`` and ``last``, shaped like the kernel: a 1*1 convolution followed by one like the kernel.
``point`` ``[out, in / groups]``: a 1*1 convolution; not beside a kernel of a single tap, which is one itself.
``identity`` ``[out]``: each channel times a number; only where there are as many outputs as inputs.
"""


def no_branches(kernel: Tensor, groups: int = 1, identity: bool = False) -> Branches:
    """Branches that compute nothing yet: the last factor of each is zero, and the first one hands on what it reads.

    Args:
        kernel: Kernel of a convolution, ``[out, in / groups, *taps]``.
        groups: Its number of groups.
        identity: Whether there is a branch that hands on the input; there must be as many outputs as inputs.

    Example:
        >>> {name: tuple(factor.shape) for name, factor in no_branches(torch.ones(8, 2, 3, 3), groups=2).items()}
        {'first': (4, 2), 'last': (8, 2, 3, 3), 'point': (8, 2)}
    """
    kernel = kernel.detach()
    outputs, inputs = kernel.shape[:2]
    read = torch.eye(inputs, dtype=kernel.dtype, device=kernel.device).repeat(groups, 1)
    branches = {"first": read, "last": torch.zeros_like(kernel)}
    if math.prod(kernel.shape[2:]) > 1:
        branches["point"] = kernel.new_zeros(outputs, inputs)
    if identity:
        branches["identity"] = kernel.new_zeros(outputs)
    return branches


def fold(branches: Mapping[str, Tensor]) -> Tensor:
    """The kernel that computes what the branches together compute; differentiable.

    This is the algebra of structural re-parameterisation (Ding, Zhang, Ma et al., CVPR 2021) and of the Diverse Branch
    Block (Ding, Zhang, Han & Ding, CVPR 2021). A kernel of one tap is one of many that is zero but for its centre; a
    1*1 convolution followed by another one is a single one whose kernel is the product of the two over the channels
    between them. It holds for any stride, dilation, groups and padding, as long as the branches have no bias and all of
    them see the same padded input.

    Args:
        branches: See :data:`Branches`.

    Example:
        >>> branches = no_branches(torch.zeros(1, 1, 3), identity=True)
        >>> branches["last"] += torch.tensor([1.0, 2.0, 3.0])
        >>> branches["first"] *= 10
        >>> branches["point"] += 0.5
        >>> branches["identity"] += 0.25
        >>> fold(branches)
        tensor([[[10.0000, 20.7500, 30.0000]]])
    """
    first, last = branches["first"], branches["last"]
    inputs, taps = last.shape[1], last.shape[2:]
    first = first.unflatten(0, (-1, inputs))
    grouped = last.unflatten(0, (len(first), -1)).flatten(3)
    kernel = torch.einsum("gohk,ghi->goik", grouped, first).flatten(0, 1)
    at_centre = (torch.arange(math.prod(taps), device=kernel.device) == _centre(taps)).to(kernel.dtype)
    if "point" in branches:
        kernel = kernel + branches["point"][..., None] * at_centre
    if "identity" in branches:
        itself = torch.eye(inputs, dtype=kernel.dtype, device=kernel.device).repeat(len(first), 1)
        kernel = kernel + (branches["identity"][:, None] * itself)[..., None] * at_centre
    return kernel.reshape(last.shape)


def _centre(taps: torch.Size) -> int:
    """Number of the tap that reads what is at the place of the output, under padding that keeps the size."""
    number = 0
    for size in taps:
        number = number * size + (size - 1) // 2
    return number


def descend(branches: Branches, velocities: Branches, gradient: Tensor, rate: float, momentum: float = 0.9) -> Tensor:
    """One step of SGD with momentum on the factors of branches, in place.

    Args:
        branches: The branches.
        velocities: Their momentum buffers, likewise changed.
        gradient: Gradient of the loss with respect to the kernel that the branches are a part of.
        rate: Learning rate.
        momentum: Of the step.

    Returns:
        By how much the folded kernel has changed.

    Example:
        >>> branches = no_branches(torch.zeros(1, 1, 1))
        >>> descend(branches, {name: torch.zeros_like(f) for name, f in branches.items()}, torch.ones(1, 1, 1), 0.1)
        tensor([[[-0.1000]]])
    """
    before, pulled_back, *_ = torch.func.vjp(fold, branches)
    for name, slope in pulled_back(gradient.detach())[0].items():
        velocities[name].mul_(momentum).add_(slope)
        branches[name].sub_(velocities[name], alpha=rate)
    change: Tensor = fold(branches) - before
    return change

"""Masks that move: some weights go, as many others come."""

from __future__ import annotations

from torch import Tensor

from lightning_prune.weight_budget import select_weights


def rewired(name: str, keep: Tensor, size: Tensor, growth: Tensor, share: float) -> Tensor:
    """Mask of a tensor after the given share of its kept weights has gone, the smallest, and as many have grown.

    Args:
        name: Full name of the tensor, for messages.
        keep: The present mask.
        size: What decides who goes; the least first.
        growth: What decides who comes; the greatest first.
        share: Share of the kept weights that goes.

    Example:
        >>> import torch
        >>> keep = torch.tensor([[True, True, False, False]])
        >>> rewired("fc.weight", keep, torch.tensor([[3.0, 1, 0, 0]]), torch.tensor([[9.0, 0.1, 0.2, 0.4]]), share=0.5)
        tensor([[ True, False, False,  True]])
    """
    kept = int(keep.sum())
    count = int(share * kept)
    if count == 0:
        return keep
    stay = _highest(name, size, keep, kept - count)
    return stay | _highest(name, growth, ~stay, count)


def _highest(name: str, scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` highest scores among the given weights of a tensor."""
    return select_weights({name: scores}, {name: among}, remove=1 - count / among.numel(), floor=0)[name]

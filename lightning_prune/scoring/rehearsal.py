"""A rehearsal of training: weights that have learnt for a few steps, and are then put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor
from torch.optim import Adam


@contextmanager
def rehearsed(
    tensors: Mapping[str, Tensor],
    gradients: Iterator[Mapping[str, Tensor]],
    steps: int,
    average: Callable[[Tensor], Tensor],
    hold: Callable[[], None],
    lr: float = 1e-3,
) -> Iterator[None]:
    """Parameters as they are after some steps of Adam; on exit they are as before, bit by bit.

    Args:
        tensors: Parameters and buffers by full name; those that no gradient names stay as they are.
        gradients: Gives, again and again, the gradients of the loss of a batch with the weights as they are then.
        steps: Number of steps; with 0 nothing is changed.
        average: Mean of a tensor over all processes.
        hold: Called after each step; to zero what must stay zero.
        lr: Learning rate.
    """
    before: dict[str, tuple[Tensor, Tensor | None]] = {}
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for number, found in enumerate(islice(gradients, steps)):
                if not number:
                    before = {name: (tensors[name].detach().clone(), tensors[name].grad) for name in found}
                    optimizer = Adam([tensors[name] for name in found], lr)
                for name, gradient in found.items():
                    tensors[name].grad = average(gradient).to(gradient.device)
                optimizer.step()
                hold()
        yield
    finally:
        for name, (value, old) in before.items():
            tensors[name].detach().copy_(value)
            tensors[name].grad = old

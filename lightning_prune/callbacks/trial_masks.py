"""What the network would be with other weights switched off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_prune.callbacks.network import Network
from lightning_prune.weight_masks import WeightMasks


class TrialMasks:
    """Tries masks of weights on a fixed set of real batches; the network is as before after each call.

    Losses and gains are means over all processes, which must call alike.

    Args:
        network: The network.
        batches: Number of batches.
    """

    def __init__(self, network: Network, batches: int) -> None:
        """Fetch the batches."""
        self._network = network
        self._count = batches
        self._batches = network.probe.batches(batches)

    def loss(self, keep: Mapping[str, Tensor]) -> float:
        """Mean loss with these bool masks."""
        with self._masked(keep):
            return self._network.probe.loss(self._batches)

    def gains(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Estimated rise of the loss if a weight is off instead of on, with all others as in these bool masks.

        To second order: -w g + F w²/2 for a weight that is on, -w g - F w²/2 for one that is off, with the gradient g
        and the diagonal F of the empirical Fisher matrix.
        """
        sums: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        number = 0
        with self._masked(keep):
            for number, gradients in enumerate(self._network.probe.gradients(self._count), 1):
                for name in keep:
                    gradient = gradients[name].float()
                    sums[name] = sums[name] + gradient if number > 1 else gradient
                    squares[name] = squares[name] + gradient**2 if number > 1 else gradient**2
        found = {}
        for name, mask in keep.items():
            weight = self._network.tensors[name].detach().float()
            first = self._network.average(sums[name] / number)
            second = self._network.average(squares[name] / number)
            found[name] = (-weight * first + (mask.to(weight.device).float() - 0.5) * second * weight**2).cpu()
        return found

    @contextmanager
    def _masked(self, keep: Mapping[str, Tensor]) -> Iterator[None]:
        tensors = self._network.tensors
        before = {name: tensors[name].detach().clone() for name in keep}
        WeightMasks(keep).apply(tensors)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    tensors[name].copy_(value)

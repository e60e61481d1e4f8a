"""What criteria of single weights may ask of the network of a running fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lightning_prune.criteria.weights import WeightSource
from lightning_prune.probe.probe import Probe


class ProbeSource(WeightSource):
    """Answers from real batches, averaged over all processes.

    Args:
        probe: Runs the network.
        weights: The weights that a criterion scores, by full name.
        average: Mean of a tensor over all processes.
        watched: As for :class:`~lightning_prune.criteria.weights.WeightSource`.
    """

    def __init__(
        self,
        probe: Probe,
        weights: Mapping[str, Tensor],
        average: Callable[[Tensor], Tensor],
        watched: Mapping[str, Tensor],
    ) -> None:
        self._probe = probe
        self._weights = weights
        self._average = average
        self.watched = watched

    def gradients(self, batches: int) -> dict[str, Tensor]:
        """See the base."""
        return self._total(self._probe.gradients(batches))

    def hessian_vector(self, vectors: Mapping[str, Tensor], batches: int) -> dict[str, Tensor]:
        """See the base."""
        return self._total(self._probe.hessian_vector(batches, vectors))

    def synaptic_flow(self) -> dict[str, Tensor]:
        """See the base."""
        flow = self._probe.synaptic_flow(list(self._weights))
        return {name: self._average(value) for name, value in flow.items()}

    def input_norms(self, batches: int) -> dict[str, Tensor]:
        """See the base."""
        squares = self._probe.input_squares(batches, list(self._weights))
        return {
            name: self._average(squares[name]).sqrt() if name in squares else torch.ones_like(weight)
            for name, weight in self._weights.items()
        }

    def _total(self, parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for part in parts:
            for name in self._weights:
                sums[name] = sums[name] + part[name] if name in sums else part[name]
        return {name: self._average(total) for name, total in sums.items()}

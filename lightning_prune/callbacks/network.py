"""The network of a running fit: its channel graph, what is off in it, and its resizing with all that hangs on it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.callbacks.support import rewrap, shadows
from lightning_prune.cost import CostModel, checkpoint_bytes
from lightning_prune.graph.tracer import named_leaves
from lightning_prune.masks import Masks
from lightning_prune.probe import Probe
from lightning_prune.report import Totals
from lightning_prune.surgery import Shrunk, resized, shrink, trace_programs
from lightning_prune.surgery.attributes import write_settings
from lightning_prune.surgery.resize import resize


class Network:
    """What a pruning callback knows of the module it works on.

    Args:
        trainer: The Trainer.
        module: The user's module.
        probe: Runs the module on real batches.

    Attributes:
        graph: The present channel graph.
        masks: The units that are off.
        tensors: Parameters and buffers by full name.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, probe: Probe) -> None:
        """Trace the module."""
        self._trainer = trainer
        self.module = module
        self.probe = probe
        self.settings: dict[Any, int] = {}
        self.trace()

    def trace(self) -> None:
        """Find the channel groups of the module as it is now; all units count as kept."""
        self.tensors = named_leaves(self.module)
        self.graph = trace_programs(self.module, self.probe.programs())
        self.masks = Masks(self.graph)
        self._cost = CostModel(self.graph, [name for name, _ in self.module.named_parameters()])

    @property
    def optimizers(self) -> list[Optimizer]:
        """The torch optimizers of the fit."""
        return list(self._trainer.optimizers)

    def cost_function(self, measure: str) -> Callable[[Mapping[str, int]], float]:
        """Cost of the network with given widths, in ``params``, ``macs`` or ``latency`` (seconds, measured)."""
        costs: dict[str, Callable[[Mapping[str, int]], float]] = {
            "params": self._cost.parameters,
            "macs": self._cost.macs,
            "latency": self._latency_at,
        }
        return costs[measure]

    def _latency_at(self, widths: Mapping[str, int]) -> float:
        keep = {name: torch.arange(widths[name]) for name in self.graph.groups}
        with resized(self.module, self.graph, keep):
            return self.probe.latency()

    def totals(self) -> Totals:
        """What the network costs now, masked units counted as long as they are there."""
        return Totals(
            channels=self._cost.channels(self.graph.widths),
            parameters=self._cost.parameters(self.graph.widths),
            macs=round(self._cost.macs(self.graph.widths)),
            checkpoint_bytes=checkpoint_bytes(self.module.state_dict()),
            latency_seconds=self.probe.latency(),
        )

    def average(self, value: Tensor) -> Tensor:
        """Mean over all processes."""
        mean: Tensor = self._trainer.strategy.reduce(value, reduce_op="mean")  # type: ignore[assignment]
        return mean

    def hold_masks(self) -> None:
        """Zero what is off, in the weights and in the optimizers' state."""
        self.masks.apply(self.tensors)
        self.masks.apply_optimizer_state(self.tensors, self.optimizers)

    def shrink(self, keep: Mapping[str, Tensor], verify: bool) -> Shrunk:
        """Remove units physically, with everything that hangs on the module, and trace again.

        Raises:
            ShrinkError: If the result is not proven exact; then nothing was changed.
        """
        result = shrink(self.module, self.graph, keep, self.optimizers, verify)
        for copy in shadows(self._trainer, self.module):
            resize(named_leaves(copy), result.cuts)
            write_settings(copy, result.settings)
        self.settings.update(result.settings)
        rewrap(self._trainer)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        self.trace()
        return result

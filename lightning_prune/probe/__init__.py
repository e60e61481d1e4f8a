"""Batches, programs and gradients from any LightningModule, without a trace."""

from lightning_prune.probe.probe import Probe

__all__ = ["Probe"]

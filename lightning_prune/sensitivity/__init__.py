"""How much each channel group matters: the loss of a network as a function of the width of one group after another."""

from lightning_prune.sensitivity.data import validation_batches
from lightning_prune.sensitivity.measure import SHARES, measure_sensitivity, switched_off
from lightning_prune.sensitivity.record import Curve, Sensitivity

__all__ = ["SHARES", "Curve", "Sensitivity", "measure_sensitivity", "switched_off", "validation_batches"]

"""Prune any LightningModule while it trains: add one callback, and ``Trainer.fit`` hands back a smaller network."""

from lightning_prune.__about__ import __version__
from lightning_prune.budget import Limits
from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.channels import ChannelPruning
from lightning_prune.callbacks.tickets import ChannelLotteryTicket, LotteryTicket
from lightning_prune.callbacks.weights import WeightPruning
from lightning_prune.checkpoint import load_pruned
from lightning_prune.criteria import FPGM, BatchNormScale, Criterion, Norm, Random, Taylor
from lightning_prune.criteria.weights import LAMP, SNIP, Magnitude, RandomWeights, WeightCriterion
from lightning_prune.errors import BudgetError, ConfigurationError, PruneError, ShrinkError, TraceError
from lightning_prune.graph.channels import ChannelGraph, ChannelGroup, Slot
from lightning_prune.graph.rules import register_rule
from lightning_prune.reinit import (
    Keep,
    KeepDistribution,
    KeepMagnitude,
    KeepSign,
    KeepSignAndDistribution,
    Reinit,
    Rewind,
)
from lightning_prune.reinit import Random as RandomReinit
from lightning_prune.report import PruneReport
from lightning_prune.schedules import Cosine, Cubic, Geometric, Linear, OneShot, Schedule
from lightning_prune.surgery import shrink, trace

__all__ = [
    "FPGM",
    "LAMP",
    "SNIP",
    "BatchNormScale",
    "BudgetError",
    "ChannelGraph",
    "ChannelGroup",
    "ChannelLotteryTicket",
    "ChannelPruning",
    "ConfigurationError",
    "Cosine",
    "Criterion",
    "Cubic",
    "Geometric",
    "Keep",
    "KeepDistribution",
    "KeepMagnitude",
    "KeepSign",
    "KeepSignAndDistribution",
    "Limits",
    "Linear",
    "LotteryTicket",
    "Magnitude",
    "Norm",
    "OneShot",
    "PruneError",
    "PruneReport",
    "PruningCallback",
    "Random",
    "RandomReinit",
    "RandomWeights",
    "Reinit",
    "Rewind",
    "Schedule",
    "ShrinkError",
    "Slot",
    "Taylor",
    "TraceError",
    "WeightCriterion",
    "WeightPruning",
    "__version__",
    "load_pruned",
    "register_rule",
    "shrink",
    "trace",
]

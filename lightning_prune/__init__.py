"""Prune any LightningModule while it trains: add one callback, and ``Trainer.fit`` hands back a smaller network."""

from lightning_prune.__about__ import __version__
from lightning_prune.budget import Limits
from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.bayesian import BayesianPruning
from lightning_prune.callbacks.channel_tickets import ChannelLotteryTicket
from lightning_prune.callbacks.channels import ChannelPruning
from lightning_prune.callbacks.decision_patterns import DecisionPatternPruning
from lightning_prune.callbacks.distillation import Distillation
from lightning_prune.callbacks.dsd import DSD
from lightning_prune.callbacks.dynamic_surgery import DynamicNetworkSurgery
from lightning_prune.callbacks.edge_popup import EdgePopup
from lightning_prune.callbacks.evolution import EvolutionarySearch
from lightning_prune.callbacks.groups import ChannelCallback
from lightning_prune.callbacks.grow_and_prune import GrowAndPrune
from lightning_prune.callbacks.growing_regularisation import GReg
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.prob_mask import ProbMask
from lightning_prune.callbacks.regularised import RegularisedPruning
from lightning_prune.callbacks.rigl import RigL
from lightning_prune.callbacks.scoring_net import ScoringNetPruning
from lightning_prune.callbacks.search_and_train import SearchAndTrain
from lightning_prune.callbacks.small_weights import SmallWeightSearch
from lightning_prune.callbacks.soft_filters import SoftFilterPruning
from lightning_prune.callbacks.sparse_binary_mask import SparseBinaryMask
from lightning_prune.callbacks.sparse_training import SET
from lightning_prune.callbacks.supermask import Supermask
from lightning_prune.callbacks.tickets import LotteryTicket
from lightning_prune.callbacks.weights import WeightPruning
from lightning_prune.callbacks.width_record import WidthSearch
from lightning_prune.checkpoint import load_pruned
from lightning_prune.criteria import CHIP, FPGM, NISP, BatchNormScale, Criterion, Norm, Random, Taylor, ThiNet
from lightning_prune.criteria.activations import ActivationCriterion, APoZ, HRank
from lightning_prune.criteria.base import entries, producers
from lightning_prune.criteria.hessian import Hessian
from lightning_prune.criteria.weights import (
    LAMP,
    SNIP,
    GraSP,
    Magnitude,
    Movement,
    RandomWeights,
    SynFlow,
    Wanda,
    WatchingCriterion,
    WeightCriterion,
    WeightSource,
)
from lightning_prune.errors import BudgetError, ConfigurationError, PruneError, ShrinkError, TraceError
from lightning_prune.graph.calls import Call
from lightning_prune.graph.channels import ChannelGraph, ChannelGroup, Refusal, Slot
from lightning_prune.graph.rules import register_rule
from lightning_prune.patterns import PatternMining
from lightning_prune.penalties import BatchNormISTA, ChannelPenalty, GroupLasso, GroupNormDecay, Slimming
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
from lightning_prune.report import GroupWidth, PruneReport, Request, Round, Totals
from lightning_prune.schedules import Cosine, Cubic, Geometric, Linear, OneShot, Position, Schedule
from lightning_prune.scoring import Stage, StageLoss
from lightning_prune.search import Annealing, CrossEntropy, Genetic, ParticleSwarm, Search
from lightning_prune.sensitivity import Curve, Sensitivity, measure_sensitivity
from lightning_prune.surgery import shrink, trace

__all__ = [
    "CHIP",
    "DSD",
    "FPGM",
    "LAMP",
    "NISP",
    "SET",
    "SNIP",
    "APoZ",
    "ActivationCriterion",
    "Annealing",
    "BatchNormISTA",
    "BatchNormScale",
    "BayesianPruning",
    "BudgetError",
    "Call",
    "ChannelCallback",
    "ChannelGraph",
    "ChannelGroup",
    "ChannelLotteryTicket",
    "ChannelPenalty",
    "ChannelPruning",
    "ConfigurationError",
    "Cosine",
    "Criterion",
    "CrossEntropy",
    "Cubic",
    "Curve",
    "DecisionPatternPruning",
    "Distillation",
    "DynamicNetworkSurgery",
    "EdgePopup",
    "EvolutionarySearch",
    "GReg",
    "Genetic",
    "Geometric",
    "GraSP",
    "GroupLasso",
    "GroupNormDecay",
    "GroupWidth",
    "GrowAndPrune",
    "HRank",
    "Hessian",
    "Keep",
    "KeepDistribution",
    "KeepMagnitude",
    "KeepSign",
    "KeepSignAndDistribution",
    "Limits",
    "Linear",
    "LotteryTicket",
    "Magnitude",
    "Movement",
    "Network",
    "Norm",
    "OneShot",
    "ParticleSwarm",
    "PatternMining",
    "Position",
    "ProbMask",
    "PruneError",
    "PruneReport",
    "PruningCallback",
    "Random",
    "RandomReinit",
    "RandomWeights",
    "Refusal",
    "RegularisedPruning",
    "Reinit",
    "Request",
    "Rewind",
    "RigL",
    "Round",
    "Schedule",
    "ScoringNetPruning",
    "Search",
    "SearchAndTrain",
    "Sensitivity",
    "ShrinkError",
    "Slimming",
    "Slot",
    "SmallWeightSearch",
    "SoftFilterPruning",
    "SparseBinaryMask",
    "Stage",
    "StageLoss",
    "Supermask",
    "SynFlow",
    "Taylor",
    "ThiNet",
    "Totals",
    "TraceError",
    "Wanda",
    "WatchingCriterion",
    "WeightCriterion",
    "WeightPruning",
    "WeightSource",
    "WidthSearch",
    "__version__",
    "entries",
    "load_pruned",
    "measure_sensitivity",
    "producers",
    "register_rule",
    "shrink",
    "trace",
]

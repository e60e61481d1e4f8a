"""A small neural network as the pruning criterion: its inputs, the net, its gates and how it is trained."""

from lightning_prune.scoring.features import FEATURE_VERSION, features, gradient_statistics
from lightning_prune.scoring.gates import BudgetGates, GatedNetwork
from lightning_prune.scoring.net import Scorer
from lightning_prune.scoring.rehearsal import rehearsed
from lightning_prune.scoring.stages import (
    CommitLoss,
    GateStep,
    RankLoss,
    Stage,
    StageLoss,
    TaskLoss,
    default_stages,
    stages_from,
)
from lightning_prune.scoring.training import Problem, energy, mean_ranks, train

__all__ = [
    "FEATURE_VERSION",
    "BudgetGates",
    "CommitLoss",
    "GateStep",
    "GatedNetwork",
    "Problem",
    "RankLoss",
    "Scorer",
    "Stage",
    "StageLoss",
    "TaskLoss",
    "default_stages",
    "energy",
    "features",
    "gradient_statistics",
    "mean_ranks",
    "rehearsed",
    "stages_from",
    "train",
]

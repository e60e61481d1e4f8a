"""The contract's table: one row for each way of pruning that must keep every promise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_prune import (
    DSD,
    SET,
    BatchNormISTA,
    BayesianPruning,
    ChannelLotteryTicket,
    ChannelPruning,
    Cosine,
    Cubic,
    DecisionPatternPruning,
    DynamicNetworkSurgery,
    EdgePopup,
    EvolutionarySearch,
    Genetic,
    Geometric,
    GReg,
    GroupLasso,
    GrowAndPrune,
    Linear,
    LotteryTicket,
    OneShot,
    PatternMining,
    ProbMask,
    PruningCallback,
    RegularisedPruning,
    RigL,
    ScoringNetPruning,
    SearchAndTrain,
    Slimming,
    SmallWeightSearch,
    SoftFilterPruning,
    SparseBinaryMask,
    Supermask,
    SynFlow,
    WeightPruning,
)
from lightning_prune.callbacks.groups import ChannelCallback
from lightning_prune.callbacks.random_network import RandomNetwork


@dataclass(frozen=True)
class Row:
    """One configuration of a method.

    Args:
        name: How pytest calls it.
        arguments: Arguments of the method.
        method: The callback.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    method: type[PruningCallback] = ChannelPruning

    def callback(self):
        return self.method(**self.arguments)

    @property
    def shrinks_in_fit(self):
        return self.callback().shrink == "rounds"

    @property
    def trains(self):
        """Whether every step trains the weights, and none only what they are chosen by."""
        return not issubclass(self.method, (RandomNetwork, SearchAndTrain))

    @property
    def chooses_channels(self):
        """Whether whole channels are chosen, and not single weights."""
        return issubclass(self.method, ChannelCallback)

    @property
    def lasts(self):
        """Whether what is off stays off."""
        return self.callback().goal > 0

    @property
    def decides_at_the_end(self):
        """Whether nothing is off for good before the fit ends."""
        return self.method.always_finishes or not self.lasts

    @property
    def shrinks(self):
        return self.callback().shrink != "never"


ROWS = [
    Row("defaults"),
    Row("l1", {"criterion": "l1", "of": "channels", "scope": "group", "schedule": Linear(1, 2, 0.5, "epoch")}),
    Row("l2", {"criterion": "l2", "of": "params", "scope": "isomorphic", "schedule": OneShot(5, "step")}),
    Row("bn_scale", {"criterion": "bn_scale", "schedule": Geometric(2, 14, 4, "step")}),
    Row("taylor", {"criterion": "taylor", "of": "channels", "schedule": Cosine(1, 2, 0.5, "epoch")}),
    Row("hessian", {"criterion": "hessian", "of": "params", "schedule": Linear(1, 2, 1, "epoch")}),
    Row("fpgm", {"criterion": "fpgm", "of": "params", "schedule": Cubic(0.2, 0.7, 0.25, "fraction")}),
    Row("apoz", {"criterion": "apoz", "of": "channels", "schedule": OneShot(1, "epoch")}),
    Row("hrank", {"criterion": "hrank", "remove": 0.3, "schedule": Linear(1, 2, 1, "epoch")}),
    Row("chip", {"criterion": "chip", "of": "params", "schedule": OneShot(8, "step")}),
    Row("nisp", {"criterion": "nisp", "scope": "group", "of": "channels", "schedule": OneShot(8, "step")}),
    Row("thinet", {"criterion": "thinet", "of": "channels", "shrink": "end", "schedule": OneShot(1, "epoch")}),
    Row("thinet-repair", {"criterion": "thinet", "repair": "scale", "schedule": Linear(1, 2, 0.5, "epoch")}),
    Row("random", {"criterion": "random", "seed": 3, "schedule": OneShot(0, "step")}),
    Row("end", {"criterion": "taylor", "shrink": "end", "of": "channels"}),
    Row("never", {"criterion": "l1", "shrink": "never", "of": "params", "schedule": OneShot(1, "epoch")}),
    Row("limits", {"remove": 0.3, "of": "params", "round_to": 2, "min_channels": 0.25, "exclude": ["net.4"]}),
    Row("ratios", {"remove": 0.4, "of": "channels", "ratios": {"net.3.*": 0.75}}),
    Row("recalibrate", {"recalibrate": 3, "of": "params", "schedule": Linear(0.3, 0.6, 0.3, "fraction")}),
    Row("reinit", {"reinit": "random", "of": "channels", "schedule": "one_shot"}),
    Row("reinit-rewind", {"reinit": "rewind", "of": "channels", "shrink": "end", "schedule": OneShot(1, "epoch")}),
    Row("reinit-sign", {"reinit": "sign", "of": "channels", "schedule": OneShot(8, "step")}),
    Row("reinit-distribution", {"reinit": "distribution", "of": "params", "schedule": OneShot(1, "epoch")}),
    Row("reinit-magnitude", {"reinit": "magnitude", "schedule": OneShot(8, "step")}, WeightPruning),
    Row("reinit-sign+distribution", {"reinit": "sign+distribution", "schedule": OneShot(1, "epoch")}, WeightPruning),
    Row("weights", {}, WeightPruning),
    Row(
        "weights-lamp",
        {"criterion": "lamp", "remove": 0.97, "floor": 4, "schedule": OneShot(1, "epoch")},
        WeightPruning,
    ),
    Row("weights-snip", {"criterion": "snip", "remove": 0.8, "schedule": OneShot(0, "step")}, WeightPruning),
    Row("weights-grasp", {"criterion": "grasp", "remove": 0.8, "schedule": OneShot(0, "step")}, WeightPruning),
    Row(
        "weights-synflow",
        {"criterion": SynFlow(rounds=10), "remove": 0.95, "schedule": OneShot(0, "step")},
        WeightPruning,
    ),
    Row("weights-movement", {"criterion": "movement", "remove": 0.7, "exclude": ["net.9"]}, WeightPruning),
    Row(
        "weights-wanda",
        {
            "criterion": "wanda",
            "remove": 0.5,
            "pattern": (2, 4),
            "exclude": ["net.0", "net.3.depthwise", "net.9"],
            "schedule": Linear(1, 2, 0.5, "epoch"),
        },
        WeightPruning,
    ),
    Row("weights-erk", {"scope": "erk", "remove": 0.6, "schedule": Linear(1, 2, 0.5, "epoch")}, WeightPruning),
    Row("weights-2:4", {"pattern": (2, 4), "remove": 0.5, "exclude": ["net.0", "net.3.depthwise"]}, WeightPruning),
    Row(
        "small-weights",
        {"optimizer": Genetic(4, 1), "batches": 2, "sweeps": 1, "schedule": Linear(1, 1.5, 0.5, "epoch")},
        SmallWeightSearch,
    ),
    Row("ticket", {"rounds": 2}, LotteryTicket),
    Row("ticket-late", {"rounds": 2, "rewind_to": 3, "reinit": "sign", "shrink": "never"}, LotteryTicket),
    Row("ticket-channels", {"rounds": 2, "of": "channels"}, ChannelLotteryTicket),
    Row("edge-popup", {}, EdgePopup),
    Row("sparse-binary-mask", {}, SparseBinaryMask),
    Row("sparse-binary-mask-lion", {"optimizer": "lion", "lr": 0.02, "scope": "global"}, SparseBinaryMask),
    Row("supermask", {"scope": "erk", "init": "kaiming_normal"}, Supermask),
    Row("prob-mask", {"recalibrate": 2}, ProbMask),
    Row("weights-never", {"scope": "layer", "shrink": "never", "criterion": "random"}, WeightPruning),
    Row("dsd", {"remove": 0.4}, DSD),
    Row("rigl", {"remove": 0.8, "every": 3}, RigL),
    Row("set", {"remove": 0.5, "every": 2, "fraction": 0.6, "scope": "layer", "shrink": "never"}, SET),
    Row("dynamic-surgery", {"gamma": 0.1, "schedule": Linear(1, 10, 3, "step")}, DynamicNetworkSurgery),
    Row("slimming", {"penalty": Slimming(0.01), "criterion": "bn_scale", "of": "channels"}, RegularisedPruning),
    Row(
        "bn-ista",
        {"penalty": BatchNormISTA(0.1), "criterion": "bn_scale", "schedule": OneShot(14, "step")},
        RegularisedPruning,
    ),
    Row(
        "group-lasso",
        {"penalty": GroupLasso(0.1), "schedule": Linear(1, 2, 0.5, "epoch"), "of": "channels"},
        RegularisedPruning,
    ),
    Row("group-norm", {"penalty_start": 0.4, "schedule": OneShot(2, "epoch"), "of": "params"}, RegularisedPruning),
    Row("greg-1", {"at": 14, "unit": "step", "every": 2, "of": "channels"}, GReg),
    Row("greg-2", {"variant": 2, "at": 14, "unit": "step", "every": 2, "first_ceiling": 0.1, "shrink": "end"}, GReg),
    Row("grow-and-prune", {"of": "params", "interval": 0.1, "strength": 0.001}, GrowAndPrune),
    Row("branches", {"of": "params", "interval": 0.1, "expand": 1.25, "branches": True}, GrowAndPrune),
    Row("bayesian", {"of": "channels", "rounds": 3, "draws": 4, "batches": 3}, BayesianPruning),
    Row(
        "decision-patterns",
        {
            "mining": PatternMining(48, 16, purity=0.7, min_support=0.05, positive=0.5),
            "schedule": OneShot(8, "step"),
        },
        DecisionPatternPruning,
    ),
    Row("evolution", {"population": 4, "generations": 2, "batches": 2, "at": 1, "unit": "epoch"}, EvolutionarySearch),
    Row("soft-filters", {"at": 0.8, "of": "channels"}, SoftFilterPruning),
    Row("scoring-net-init", {"steps": 6, "batches": 2, "rehearse": 3}, ScoringNetPruning),
    Row(
        "scoring-net-post",
        {
            "mode": "post",
            "steps": 5,
            "batches": 0,
            "of": "channels",
            "shrink": "end",
            "schedule": Linear(3, 8, 5, "step"),
        },
        ScoringNetPruning,
    ),
    Row(  # the first of this method, so that two processes are tried with teachers
        "search-and-train-robust",
        {"of": "channels", "iterations": 2, "alpha_every": 2, "batches": 1, "at": 0.7, "robust": True},
        SearchAndTrain,
    ),
    Row(
        "search-and-train",
        {"of": "channels", "iterations": 2, "alpha_every": 2, "batches": 1, "at": 0.7},
        SearchAndTrain,
    ),
]

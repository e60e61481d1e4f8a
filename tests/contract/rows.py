"""The contract's table: one row for each way of pruning that must keep every promise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_prune import Cosine, Cubic, Geometric, Linear, OneShot


@dataclass(frozen=True)
class Row:
    """One configuration of a method.

    Args:
        name: How pytest calls it.
        arguments: Arguments of ``ChannelPruning``.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def shrinks_in_fit(self):
        return self.arguments.get("shrink", "rounds") == "rounds"

    @property
    def shrinks(self):
        return self.arguments.get("shrink", "rounds") != "never"


ROWS = [
    Row("defaults"),
    Row("l1", {"criterion": "l1", "of": "channels", "scope": "group", "schedule": Linear(1, 2, 0.5, "epoch")}),
    Row("l2", {"criterion": "l2", "of": "params", "scope": "isomorphic", "schedule": OneShot(5, "step")}),
    Row("bn_scale", {"criterion": "bn_scale", "schedule": Geometric(2, 14, 4, "step")}),
    Row("taylor", {"criterion": "taylor", "of": "channels", "schedule": Cosine(1, 2, 0.5, "epoch")}),
    Row("fpgm", {"criterion": "fpgm", "of": "params", "schedule": Cubic(0.2, 0.7, 0.25, "fraction")}),
    Row("random", {"criterion": "random", "seed": 3, "schedule": OneShot(0, "step")}),
    Row("end", {"criterion": "taylor", "shrink": "end", "of": "channels"}),
    Row("never", {"criterion": "l1", "shrink": "never", "of": "params", "schedule": OneShot(1, "epoch")}),
    Row("limits", {"remove": 0.3, "of": "params", "round_to": 2, "min_channels": 0.25, "exclude": ["net.4"]}),
    Row("ratios", {"remove": 0.4, "of": "channels", "ratios": {"net.3.*": 0.75}}),
    Row("recalibrate", {"recalibrate": 3, "of": "params", "schedule": Linear(0.3, 0.6, 0.3, "fraction")}),
    Row("reinit", {"reinit": "random", "of": "channels", "schedule": "one_shot"}),
]

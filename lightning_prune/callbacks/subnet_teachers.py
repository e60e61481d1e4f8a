"""Teachers of the subnets in a search: the coarse network, the best subnet so far, and models of the user's."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from lightning import LightningModule
from torch import Tensor, nn

from lightning_prune.distillation import move_average
from lightning_prune.graph.tracer import named_leaves

_DECAY = 0.999


class SubnetTeachers:
    """Teachers that a search makes itself, and others.

    Args:
        module: The network, which is copied.
        state: What an earlier search has left; kept up to date in place.
        others: Further teachers by name.
    """

    def __init__(self, module: LightningModule, state: dict[str, Any], others: Mapping[str, nn.Module]) -> None:
        self._state, self._others = state, others
        self._own: dict[str, nn.Module] = {name: copy.deepcopy(module) for name in ("coarse", "best")}
        for name, teacher in self._own.items():
            held = {path: tensor.detach() for path, tensor in named_leaves(teacher).items()}
            for path, value in state.get(name, {}).items():
                held[path].copy_(value)
            state[name] = held
        for teacher in (*self._own.values(), *others.values()):
            teacher.to(module.device).eval()
        state.setdefault("updates", 0)
        state.setdefault("reward", -math.inf)

    def present(self) -> dict[str, nn.Module]:
        """Those that there are so far."""
        ready = {"coarse": self._state["updates"] > 0, "best": self._state["reward"] > -math.inf}
        return {**{name: self._own[name] for name in self._own if ready[name]}, **self._others}

    def follow(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what the whole network is after a step into the average."""
        move_average(self._state["coarse"], tensors, self._state["updates"], _DECAY)
        self._state["updates"] += 1

    def rank(self, tensors: Mapping[str, Tensor], reward: float) -> None:
        """Keep this subnet if none was as good."""
        if reward > self._state["reward"]:
            move_average(self._state["best"], tensors, 0, _DECAY)
            self._state["reward"] = reward

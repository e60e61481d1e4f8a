"""The search for a subnet: importances of channels, and thresholds on them that are learnt by reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam

from lightning_prune.threshold_net import ThresholdNet, importance_gradients, relative, standing, statistics

THRESHOLDS = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
"""Shares of the mass that are drawn from unless others are given."""
Meet = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class Candidate(NamedTuple):
    """A subnet that was drawn.

    Attributes:
        standings: How far inside the drawn share of the mass each unit lies, by group; higher = keep.
        chosen: Number of the threshold of each group.
    """

    standings: dict[str, Tensor]
    chosen: Tensor


class SubnetSearch:
    """Draws subnets by importances and thresholds, and learns both.

    The importance of a unit is the one that it begins with, evenly spread from 0 to 1 in the order that units of its
    group have then, and what is learnt. By the latter alone channels are multiplied, so that a subnet begins as it is.

    Args:
        start: Importances of the units of each group to begin with; :meth:`begin` changes them in place.
        alpha: What is learnt, of the same shapes; it is changed in place.
        keep: The present subnet, as bool masks; filled in place.
        state: Whatever else an earlier search has left, in plain types; kept up to date in place.
        alpha_lr: Learning rate of the importances.
        threshold_lr: Learning rate of the threshold network.
        variance: How much it counts that importances of a group lie apart.
        seed: Seed of the threshold network.

    Attributes:
        keep: The present subnet; empty before the first.
    """

    def __init__(
        self,
        start: Mapping[str, Tensor],
        alpha: Mapping[str, Tensor],
        keep: dict[str, Tensor],
        state: dict[str, Any],
        alpha_lr: float,
        threshold_lr: float,
        variance: float,
        seed: int,
    ) -> None:
        self._start, self._alpha, self.keep, self._state, self._variance = start, alpha, keep, state, variance
        self._net = ThresholdNet(state["thresholds"], threshold_lr, seed)
        self._optimizer = Adam(list(alpha.values()), alpha_lr)
        if "net" in state:
            self._net.load_state_dict(state["net"])
        if "optimizer" in state:
            self._optimizer.load_state_dict(state["optimizer"])

    @property
    def importances(self) -> dict[str, Tensor]:
        """Present importances of the units of each group."""
        return {name: self._start[name] + values for name, values in self._alpha.items()}

    def begin(self, scores: Mapping[str, Tensor]) -> None:
        """Have units begin in the order of these scores."""
        for name, start in self._start.items():
            start[scores[name].argsort(stable=True).to(start.device)] = torch.linspace(0, 1, len(start))

    def compete(
        self, candidates: int, noise: float, meet: Meet, reward: Callable[[Mapping[str, Tensor]], float],
        generator: torch.Generator,
    ) -> tuple[float, float]:  # fmt: skip
        """Draw subnets, learn from how good they are, and make the best one the present subnet if it is better.

        Args:
            candidates: How many to draw.
            noise: Size of the Gumbel noise on the importances that they are chosen by.
            meet: What is kept, as bool masks, of units that stand so.
            reward: How good a subnet is, given what it keeps; it is asked about the present one last.
            generator: Where randomness comes from.

        Returns:
            Reward of what was the present subnet, and the least share of units that a candidate has in common with it.
        """
        if not self.keep:
            self.keep.update(meet(self.present().standings))
        drawn = [self._draw(noise, generator) for _ in range(candidates)]
        keeps = [meet(candidate.standings) for candidate in drawn]
        rewards = [reward(keep) for keep in keeps]
        self._net.reinforce(self._seen(), torch.stack([candidate.chosen for candidate in drawn]), torch.tensor(rewards))
        self._state["net"] = self._net.state_dict()
        alike = [torch.cat([keep[name] == self.keep[name] for name in keep]).float().mean() for keep in keeps]
        best, present = max(range(candidates), key=rewards.__getitem__), reward(self.keep)
        if rewards[best] > present:
            self.keep.update(keeps[best])
            self._state["chosen"] = drawn[best].chosen
        return present, float(min(alike))

    def present(self) -> Candidate:
        """The present subnet, by its thresholds and the importances of now; at first all thresholds are the same."""
        same = torch.zeros(len(self._start), dtype=torch.long)
        return self._candidate(self.importances, self._state.get("chosen", same))

    def _draw(self, noise: float, generator: torch.Generator) -> Candidate:
        """A subnet by thresholds that are drawn by what was learnt of them."""
        chosen = self._net.sample(self._seen(), generator)
        noisy = {
            name: values - noise * torch.empty_like(values).exponential_(generator=generator).log()
            for name, values in self.importances.items()
        }
        return self._candidate(noisy, chosen)

    def _seen(self) -> Tensor:
        return statistics(list(self.importances.values()))

    def _candidate(self, importances: Mapping[str, Tensor], chosen: Tensor) -> Candidate:
        shares = self._net.thresholds[chosen].tolist()
        named = zip(importances.items(), shares, strict=True)
        return Candidate({name: standing(values, share) for (name, values), share in named}, chosen)

    def step(self, slopes: Mapping[str, Tensor]) -> None:
        """Move the importances in the subnet, given derivatives of the loss with respect to :meth:`gates`."""
        before = {name: values.clone() for name, values in self._alpha.items()}
        for name, values in self._alpha.items():
            kept = self.keep[name]
            values.grad = importance_gradients(values, self._start[name], kept, slopes[name], self._variance)
        self._optimizer.step()
        self._optimizer.zero_grad()
        for name, values in self._alpha.items():  # nothing outside the subnet moves, not by momentum either
            values.copy_(torch.where(self.keep[name], values, before[name]))
        self._state["optimizer"] = self._optimizer.state_dict()

    def gates(self, keep: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What each channel is multiplied with, 0 outside the subnet: the present one, or another."""
        keep = self.keep if keep is None else keep
        return {name: relative(values, keep[name]) * keep[name] for name, values in self._alpha.items()}

"""The search for a subnet: importances of channels, and thresholds on them that are learnt by reward."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from lightning_prune.errors import BudgetError
from lightning_prune.threshold_net import (
    ThresholdNet,
    importance_gradients,
    prefix,
    relative,
    standing,
    statistics,
)

_FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)


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

    def draw(self, noise: float, generator: torch.Generator) -> float:
        """Choose the next subnet.

        Args:
            noise: Size of the Gumbel noise on the importances that it is chosen by.
            generator: Where randomness comes from.

        Returns:
            Share of the units that it and the last one both have or both lack; 0 if there was none.
        """
        importances = self.importances
        seen = statistics(list(importances.values()))
        chosen = self._net.sample(seen, generator)
        drawn = {}
        for (name, values), mass in zip(importances.items(), self._net.thresholds[chosen].tolist(), strict=True):
            gumbel = -torch.empty_like(values).exponential_(generator=generator).log()
            drawn[name] = prefix(values + noise * gumbel, mass)
        same = [(drawn[name] == mask).float() for name, mask in self.keep.items()]
        self.keep.update(drawn)
        self._state.update(seen=seen, chosen=chosen)
        return float(torch.cat(same).mean()) if same else 0.0

    def learn(self, reward: float) -> None:
        """Have the threshold network learn how good the present subnet is."""
        self._net.reinforce(self._state["seen"], self._state["chosen"], reward)
        self._state["net"] = self._net.state_dict()

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

    def gates(self) -> dict[str, Tensor]:
        """What each channel is multiplied with; 0 outside the subnet."""
        return {name: relative(values, self.keep[name]) * self.keep[name] for name, values in self._alpha.items()}

    def standings(self, names: Iterable[str]) -> dict[str, Tensor]:
        """How far inside the subnet of the mean thresholds each unit of the named groups lies; higher = keep."""
        importances = self.importances
        expected = self._net.expected(statistics(list(importances.values()))).tolist()
        shares = dict(zip(importances, expected, strict=True))
        return {name: standing(importances[name], shares[name]) for name in names}


def thresholds_for(cost: Callable[[float], float], allowed: float, given: Sequence[float] | None) -> list[float]:
    """The shares of the mass to draw from.

    Args:
        cost: Cost of the network with a share of the units of each group.
        allowed: Cost that it may have in the end.
        given: What the user wants; default: six about the largest share that costs no more than allowed.

    Raises:
        BudgetError: If even the smallest of those given costs more.

    Example:
        >>> [round(share, 2) for share in thresholds_for(lambda share: share**2, 0.25, None)]
        [0.35, 0.4, 0.45, 0.5, 0.55, 0.6]
    """
    if given is None:
        grid = [n / 1000 for n in range(1, 1001)]
        largest = grid[max(bisect_right(grid, allowed * (1 + 1e-9), key=cost) - 1, 0)]
        return sorted({min(largest * factor, 1.0) for factor in _FACTORS})
    smallest = min(given)
    if cost(smallest) > allowed:
        raise BudgetError(
            f"the smallest subnet that is looked at, with {smallest:g} of the mass while importances are equal, costs "
            f"{cost(smallest) / cost(1.0):.1%} of the network, but no more than {allowed / cost(1.0):.1%} are to be "
            f"left. Lower remove, or have smaller thresholds."
        )
    return sorted(given)

"""Subnets as prefixes of sorted importances, and the network that learns how long the prefixes should be."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_QUANTILES = 16


def prefix(importances: Tensor, mass: float) -> Tensor:
    """The shortest run of the most important units that together have at least this share of the mass.

    Args:
        importances: Importances of shape ``[units]``; their softmax is the mass of each unit.
        mass: The share, in (0, 1].

    Returns:
        Bool mask of shape ``[units]``, True for those in the run.

    Example:
        >>> prefix(torch.tensor([0.1, 0.4, 0.2, 0.3]).log(), 0.7).tolist()
        [False, True, False, True]
    """
    return standing(importances, mass) > 1e-9


def standing(importances: Tensor, mass: float) -> Tensor:
    """How far inside the run of :func:`prefix` each unit lies; of units of different groups the nearer ends go first.

    Args:
        importances: As for :func:`prefix`.
        mass: As for :func:`prefix`.

    Returns:
        Double precision numbers of shape ``[units]``: 1 for the most important unit, down to 0 at the end of the run
        and below for those that come after it.

    Example:
        >>> [round(place, 2) for place in standing(torch.tensor([0.1, 0.4, 0.2, 0.3]).log(), 0.5).tolist()]
        [-0.8, 1.0, -0.4, 0.2]
    """
    share, order = torch.softmax(importances.double(), 0).sort(descending=True, stable=True)
    before = share.cumsum(0) - share
    before[0] = 0
    return torch.empty_like(share).index_copy_(0, order, 1 - before / mass)


def relative(importances: Tensor, keep: Tensor) -> Tensor:
    """Mass of each unit relative to the mean over the kept ones.

    Args:
        importances: As for :func:`prefix`.
        keep: Bool mask of shape ``[units]``.

    Example:
        >>> relative(torch.tensor([3.0, 1.0, 6.0]).log(), torch.tensor([True, True, False])).tolist()
        [1.5, 0.5, 3.0]
    """
    mass = torch.softmax(importances, 0)
    return mass / mass[keep].mean()


def importance_gradients(moves: Tensor, start: Tensor, keep: Tensor, slopes: Tensor, variance: float) -> Tensor:
    """Derivatives with respect to what was added to the importances of a loss less their variance in the subnet.

    Args:
        moves: What was added to the importances since the search began, of shape ``[units]``.
        start: The importances then, of the same shape.
        keep: Bool mask of the subnet, of shape ``[units]``.
        slopes: Derivatives of the loss with respect to what the kept units are multiplied with, the :func:`relative`
            mass of their moves.
        variance: What the variance of the importances is multiplied with.

    Returns:
        Of shape ``[units]``; 0 outside the subnet.

    Example:
        >>> kept = torch.tensor([True, True, False])
        >>> importance_gradients(torch.zeros(3), torch.rand(3), kept, torch.tensor([1.0, 0.0, 5.0]), 0.0).tolist()
        [0.5, -0.5, 0.0]
    """
    with torch.enable_grad():
        values = moves[keep].detach().requires_grad_()
        loss = (relative(values, torch.ones_like(values, dtype=torch.bool)) * slopes[keep]).sum()
        (found,) = torch.autograd.grad(loss - variance * (start[keep] + values).var(unbiased=False), values)
    return torch.zeros_like(moves).masked_scatter_(keep, found)


def statistics(importances: Sequence[Tensor]) -> Tensor:
    """What the threshold network sees of each group: a fixed number of figures, whatever its width.

    Args:
        importances: Importances of each group.

    Returns:
        Of shape ``[groups, 20]``: quantiles, mean and deviation of the importances, logarithm of the width, and the
        place among the groups.
    """
    points = torch.linspace(0, 1, _QUANTILES)
    rows = []
    for place, values in enumerate(importances):
        width, depth = math.log(len(values)), place / len(importances)
        spread = torch.stack([values.mean(), values.std(unbiased=False)])
        rows.append(torch.cat([torch.quantile(values, points), spread, torch.tensor([width, depth])]))
    return torch.stack(rows)


class ThresholdNet:
    """Chooses for each group which share of the mass a subnet keeps, and learns from rewards (Williams, 1992).

    Args:
        thresholds: The shares to choose from, each in (0, 1].
        lr: Learning rate of its optimizer (Adam).
        seed: Seed of its initial weights. At first all shares are equally probable.

    Example:
        >>> net = ThresholdNet([0.5, 0.9])
        >>> net.probabilities(torch.rand(3, 20)).tolist()
        [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    """

    def __init__(self, thresholds: Sequence[float], lr: float = 0.01, seed: int = 0) -> None:
        self.thresholds = torch.tensor(thresholds, dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # and not those of other devices, which nothing puts back
            last = nn.Linear(32, len(thresholds))
            layers = [nn.Linear(_QUANTILES + 4, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()]
            self.network = nn.Sequential(*layers, last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr)

    def probabilities(self, seen: Tensor) -> Tensor:
        """Probability of each threshold for each group, of shape ``[groups, thresholds]``.

        Args:
            seen: As from :func:`statistics`.
        """
        with torch.no_grad():
            return torch.softmax(self.network(seen), 1)

    def sample(self, seen: Tensor, generator: torch.Generator) -> Tensor:
        """The number of a threshold for each group, drawn by :meth:`probabilities`."""
        return torch.multinomial(self.probabilities(seen), 1, generator=generator)[:, 0]

    def reinforce(self, seen: Tensor, chosen: Tensor, rewards: Tensor) -> None:
        """Make choices more probable whose reward is above the mean, and those less whose is below.

        Args:
            seen: What the choices were made by.
            chosen: Numbers of the chosen thresholds, of shape ``[choices, groups]``.
            rewards: The higher, the better, of shape ``[choices]``; only how they compare with each other counts.
        """
        spread = float(rewards.std(unbiased=False))
        if not spread > 0:  # all alike, or one that is no number
            return
        advantages = (rewards - rewards.mean()) / spread
        with torch.enable_grad():
            logarithms = torch.log_softmax(self.network(seen), 1).gather(1, chosen.T)
            self.optimizer.zero_grad()
            (-(advantages * logarithms.sum(0)).mean()).backward()
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """All that it has learnt, in plain types."""
        return copy.deepcopy({"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

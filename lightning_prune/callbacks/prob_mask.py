"""ProbMask: probabilities of weights under a global budget."""

from __future__ import annotations

from typing import Literal, Union

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.random_network import Init, RandomNetwork, Step, check_temperatures
from lightning_prune.choices import is_pair
from lightning_prune.errors import ConfigurationError
from lightning_prune.projection import euclidean
from lightning_prune.weight_budget import Scope


class ProbMask(RandomNetwork):
    """Learns the probability of each weight under one budget for their sum (Zhou et al., 2021).

    In each step relaxed masks are drawn from the probabilities (Gumbel-sigmoid, at a temperature that falls), the
    probabilities are moved along the gradient and projected back onto the budget, which falls from all weights to those
    that may stay. The source trains the weights too and averages the gradients of two draws; here they are frozen, and
    there is one draw a step.

    Args:
        remove: Fraction of the weights to switch off, in [0, 1).
        scope: Whether each tensor has a budget of its own, the same fraction of all (``"layer"``) or by an Erdos-Renyi
            kernel (``"erk"``), or all share one (``"global"``).
        init: Law that the weights are drawn from anew: ``"kaiming_normal"``, ``"kaiming_uniform"``,
            ``"signed_constant"`` (signs of a draw times one number per tensor), or ``"keep"`` for the module's own.
        optimizer: What moves the probabilities: ``"adam"`` as in the source, ``"sgd"``, ``"normalised_sgd"`` or
            ``"lion"``.
        lr: Its learning rate at the start of the fit.
        momentum: Momentum of ``"sgd"`` and ``"normalised_sgd"``.
        temperature: Temperatures of the draws at the start of the fit and at its end; they fall along a line.
        budget: Shares of the fit between which the budget falls, with the third power.
        include, exclude: As for :class:`~lightning_prune.WeightPruning`; all others are frozen as they are.
        floor, shrink, verify, recalibrate, directory: As for :class:`~lightning_prune.WeightPruning`.
        seed: Seed of the weights and the scores.

    Raises:
        ConfigurationError: If an argument is wrong, or the fit has no end.
        BudgetError: If the budget is out of reach on this network.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=100, callbacks=[ProbMask(remove=0.9)], logger=False)
    """

    provenance = "published"

    def __init__(
        self,
        remove: float = 0.5, scope: Scope = "global", init: Init = "kaiming_normal",
        optimizer: Step = "adam", lr: float = 6e-3, momentum: float = 0.9,
        temperature: tuple[float, float] = (1.0, 0.03), budget: tuple[float, float] = (0.1, 0.6),
        include: Patterns | None = None, exclude: Patterns | None = None,
        floor: Union[int, float] = 0.001, shrink: Literal["end", "never"] = "end", verify: bool = True,  # noqa: UP007
        recalibrate: int = 0, seed: int = 0, directory: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            remove, scope, init, optimizer, lr, momentum, 0.0, include, exclude, floor, shrink, verify, recalibrate,
            seed, directory,
        )  # fmt: skip
        check_temperatures(temperature)
        if not (is_pair(budget) and 0 <= budget[0] < budget[1] <= 1):
            raise ConfigurationError(f"budget must be two shares of the fit that rise within [0, 1], but is {budget}.")
        self.temperature, self.budget = temperature, budget

    @override
    def first_scores(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        return torch.ones(weight.shape)

    @override
    def factors(self, scores: Tensor, count: int, share: float) -> Tensor:
        start, end = self.temperature
        drawn = self.uniform(scores).clamp(1e-6, 1 - 1e-6)
        return torch.sigmoid((_odds(scores) + torch.logit(drawn)) / (start + (end - start) * share))

    @override
    def score_gradients(self, slopes: Tensor, scores: Tensor, factors: Tensor) -> Tensor:
        temperature = self.temperature[0] + (self.temperature[1] - self.temperature[0]) * self.share
        inside = scores.clamp(_EDGE, 1 - _EDGE)
        return slopes * factors * (1 - factors) / (temperature * inside * (1 - inside))

    @override
    def settle(self, scores: Tensor, count: int, share: float) -> Tensor:
        start, end = self.budget
        left = 1 - min(max((share - start) / (end - start), 0.0), 1.0)
        return euclidean(scores, count + (len(scores) - count) * left**3)


_EDGE = 1e-3
"""How near a probability comes to 0 or 1, where its odds are asked for."""


def _odds(scores: Tensor) -> Tensor:
    return torch.logit(scores.clamp(_EDGE, 1 - _EDGE))

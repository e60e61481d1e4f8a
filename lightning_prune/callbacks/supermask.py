"""Supermasks: each weight of a random network stays with a learnt probability."""

from __future__ import annotations

from typing import Literal, Union

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.random_network import Init, RandomNetwork, Step
from lightning_prune.weight_budget import Scope


class Supermask(RandomNetwork):
    """Learns with what probability each weight of a random network stays (Zhou et al., 2019).

    In each step every weight is drawn with the sigmoid of its score, and the gradient passes straight through the draw.
    The source lets the density come out as it may; here the weights of the highest scores stay in the end, as many as
    the budget allows, and the first probabilities are the density.

    Args:
        remove: Fraction of the weights to switch off, in [0, 1).
        scope: Whether each tensor has a budget of its own, the same fraction of all (``"layer"``) or by an Erdos-Renyi
            kernel (``"erk"``), or all share one (``"global"``).
        init: Law that the weights are drawn from anew: ``"kaiming_normal"``, ``"kaiming_uniform"``,
            ``"signed_constant"`` (signs of a draw times one number per tensor), or ``"keep"`` for the module's own.
        optimizer: What moves the scores: ``"sgd"``, ``"normalised_sgd"``, ``"adam"`` or ``"lion"``.
        lr: Its learning rate at the start of the fit; with ``"sgd"`` it has to be high.
        momentum: Momentum of ``"sgd"`` and ``"normalised_sgd"``.
        include, exclude: As for :class:`~lightning_prune.WeightPruning`; all others are frozen as they are.
        floor, shrink, verify, recalibrate, directory: As for :class:`~lightning_prune.WeightPruning`.
        seed: Seed of the weights and the scores.

    Raises:
        ConfigurationError: If an argument is wrong, or the fit has no end.
        BudgetError: If the budget is out of reach on this network.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=100, callbacks=[Supermask(remove=0.5)], logger=False)
    """

    provenance = "published"

    def __init__(
        self,
        remove: float = 0.5,
        scope: Scope = "layer",
        init: Init = "signed_constant",
        optimizer: Step = "sgd",
        lr: float = 100.0,
        momentum: float = 0.9,
        include: Patterns | None = None, exclude: Patterns | None = None,
        floor: Union[int, float] = 0.001, shrink: Literal["end", "never"] = "end", verify: bool = True,  # noqa: UP007
        recalibrate: int = 0, seed: int = 0, directory: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            remove, scope, init, optimizer, lr, momentum, 0.0, include, exclude, floor, shrink, verify, recalibrate,
            seed, directory,
        )  # fmt: skip

    @override
    def first_scores(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        kept = torch.tensor(1 - self.remove).clamp(0.01, 0.99)
        return torch.full(weight.shape, float(torch.logit(kept)))

    @override
    def factors(self, scores: Tensor, count: int, share: float) -> Tensor:
        return (self.uniform(scores) < torch.sigmoid(scores)).to(scores.dtype)

    @override
    def score_gradients(self, slopes: Tensor, scores: Tensor, factors: Tensor) -> Tensor:
        kept = torch.sigmoid(scores)
        return slopes * kept * (1 - kept)

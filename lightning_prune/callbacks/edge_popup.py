"""Edge-popup: the best edges of a random network."""

from __future__ import annotations

import math
from typing import Literal, Union

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.random_network import Init, RandomNetwork, Step
from lightning_prune.projection import top
from lightning_prune.weight_budget import Scope


class EdgePopup(RandomNetwork):
    """Finds a good subnetwork of a random network by edge-popup (Ramanujan et al., 2020).

    Every weight stays as it was drawn and has a score. In each step the weights with the greatest absolute scores make
    up the network, and the gradient passes straight through that choice to all scores. The weights, all biases (zero)
    and norms are frozen, so nothing is trained but the choice; the result is an ordinary sparse network.

    Args:
        remove: Fraction of the weights to switch off, in [0, 1); the source's ``prune_rate`` is the fraction kept.
        scope: Whether each tensor has a budget of its own, the same fraction of all (``"layer"``) or by an Erdos-Renyi
            kernel (``"erk"``), or all share one (``"global"``).
        init: Law that the weights are drawn from anew: ``"kaiming_normal"``, ``"kaiming_uniform"``,
            ``"signed_constant"`` (signs of a draw times one number per tensor), or ``"keep"`` for the module's own.
        optimizer: What moves the scores: ``"sgd"`` with momentum as in the source, ``"normalised_sgd"``,
            ``"adam"`` or ``"lion"``.
        lr: Its learning rate at the start of the fit.
        momentum: Momentum of ``"sgd"`` and ``"normalised_sgd"``.
        weight_decay: Weight decay of the scores.
        include, exclude: As for :class:`~lightning_prune.WeightPruning`; all others are frozen as they are.
        floor, shrink, verify, recalibrate, directory: As for :class:`~lightning_prune.WeightPruning`.
        seed: Seed of the weights and the scores.

    Raises:
        ConfigurationError: If an argument is wrong, or the fit has no end.
        BudgetError: If the budget is out of reach on this network.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=100, callbacks=[EdgePopup(remove=0.5)], logger=False)
    """

    provenance = "published"

    def __init__(
        self,
        remove: float = 0.5,
        scope: Scope = "layer",
        init: Init = "kaiming_normal",
        optimizer: Step = "sgd",
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        include: Patterns | None = None, exclude: Patterns | None = None,
        floor: Union[int, float] = 0.001, shrink: Literal["end", "never"] = "end", verify: bool = True,  # noqa: UP007
        recalibrate: int = 0, seed: int = 0, directory: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            remove, scope, init, optimizer, lr, momentum, weight_decay, include, exclude, floor, shrink, verify,
            recalibrate, seed, directory,
        )  # fmt: skip

    @override
    def first_scores(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        bound = 1 / math.sqrt(weight[0].numel())
        return torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)

    @override
    def factors(self, scores: Tensor, count: int, share: float) -> Tensor:
        return top(scores.abs(), count)

    @override
    def ranking(self, scores: Tensor) -> Tensor:
        return scores.abs()

    @override
    def score_gradients(self, slopes: Tensor, scores: Tensor, factors: Tensor) -> Tensor:
        return slopes * scores.sign()

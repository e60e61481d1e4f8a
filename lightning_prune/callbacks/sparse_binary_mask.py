"""Sparse binary programming of the mask of a random network."""

from __future__ import annotations

from typing import Literal, Union

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.random_network import Init, RandomNetwork, Step, check_temperatures
from lightning_prune.errors import ConfigurationError
from lightning_prune.projection import entropic, top
from lightning_prune.weight_budget import Scope


class SparseBinaryMask(RandomNetwork):
    """Finds a sparse binary mask over a random network by annealed mirror descent on its budget.

    After the sparse binary programming of Lu, Ji & Yuan (2023), of which the abstract alone is public: it poses the
    training of a network by pruning as the choice of a binary mask of a given sum over random weights, and compares
    with edge-popup. How that program is solved here is ours: scores are moved by the gradient with respect to the
    relaxed mask (mirror descent), the mask is the point of the budget's polytope of the greatest score plus entropy at
    a temperature that falls, and for the last part of the fit the vertex itself. A relaxed mask is scaled to the second
    moment of a binary one, so that signals keep their size; the final network has no scale.

    ``examples/results/random_networks.md`` compares it with edge-popup: with 50 or 30 % of the weights it is three to
    four points above on two small nets without batch-norm; on a residual net with it by 1.6 with 30 %, and no better
    with 50 %. Train the weights if you can: this is for when you cannot.

    Args:
        remove: Fraction of the weights to switch off, in [0, 1).
        scope: Whether each tensor has a budget of its own, the same fraction of all (``"layer"``) or by an Erdos-Renyi
            kernel (``"erk"``), or all share one (``"global"``).
        init: Law that the weights are drawn from anew: ``"kaiming_normal"``, ``"kaiming_uniform"``,
            ``"signed_constant"`` (signs of a draw times one number per tensor), or ``"keep"`` for the module's own.
        forward: ``"anneal"`` as above, or ``"binary"``: the vertex from the first step on, with the gradient straight
            through.
        optimizer: What moves the scores: ``"normalised_sgd"``, with gradients of equal size in all tensors, so that all
            masks become binary at the same time; ``"sgd"``, ``"lion"`` or ``"adam"``.
        lr: Its learning rate at the start of the fit; for ``"sgd"`` about 10, for ``"lion"`` 0.01.
        momentum: Momentum of ``"normalised_sgd"`` and ``"sgd"``.
        temperature: Temperatures of the mask at the start of the fit and at the end of the annealing.
        anneal: Share of the fit after which the mask is binary, in (0, 1].
        variance_match: Whether relaxed masks are scaled as above.
        include, exclude: As for :class:`~lightning_prune.WeightPruning`; all others are frozen as they are.
        floor, shrink, verify, recalibrate, directory: As for :class:`~lightning_prune.WeightPruning`.
        seed: Seed of the weights and the scores.

    Raises:
        ConfigurationError: If an argument is wrong, or the fit has no end.
        BudgetError: If the budget is out of reach on this network.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[SparseBinaryMask(remove=0.7)], logger=False)
    """

    provenance = "reconstruction"

    def __init__(
        self,
        remove: float = 0.5, scope: Scope = "layer",
        init: Init = "kaiming_normal",
        forward: Literal["anneal", "binary"] = "anneal",
        optimizer: Step = "normalised_sgd", lr: float = 0.01, momentum: float = 0.9,
        temperature: tuple[float, float] = (1.0, 0.05), anneal: float = 0.8, variance_match: bool = True,
        include: Patterns | None = None, exclude: Patterns | None = None,
        floor: Union[int, float] = 0.001, shrink: Literal["end", "never"] = "end", verify: bool = True,  # noqa: UP007
        recalibrate: int = 0, seed: int = 0, directory: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            remove, scope, init, optimizer, lr, momentum, 0.0, include, exclude, floor, shrink, verify, recalibrate,
            seed, directory,
        )  # fmt: skip
        check_temperatures(temperature)
        if not 0 < anneal <= 1:
            raise ConfigurationError(f"anneal is a share of the fit in (0, 1], but is {anneal}.")
        self.forward, self.variance_match = forward, variance_match
        self.temperature, self.anneal = temperature, anneal

    @override
    def first_scores(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        # Annealing starts from the same mask everywhere; a binary start has to be some vertex.
        return torch.zeros(weight.shape) if self.forward == "anneal" else torch.rand(weight.shape, generator=generator)

    @override
    def factors(self, scores: Tensor, count: int, share: float) -> Tensor:
        if self.forward == "binary" or share >= self.anneal or count == len(scores):
            return top(scores, count)
        start, end = self.temperature
        return entropic(scores, count, start * (end / start) ** (share / self.anneal))

    @override
    def scale(self, factors: Tensor) -> Tensor:
        if not self.variance_match or not factors.any():
            return super().scale(factors)
        return (factors.mean() / factors.square().mean()).sqrt()

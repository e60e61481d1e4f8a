"""How a scorer is trained on one network, whose weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.criteria import Norm
from lightning_prune.criteria.base import entries
from lightning_prune.graph.channels import ChannelGroup
from lightning_prune.scoring.gates import BudgetGates
from lightning_prune.scoring.net import Scorer
from lightning_prune.scoring.stages import GateStep, Stage

_COLDEST = 0.1


@dataclass(frozen=True)
class Problem:
    """A network for a scorer to be trained on.

    Args:
        features: Features of the units by group name.
        ranks: As for :class:`GateStep`.
        energy: As for :class:`GateStep`.
        budget: Turns scores into probabilities.
        choose: The masks that a cut by given scores would leave.
        slopes: As for :class:`GateStep`.
    """

    features: Mapping[str, Tensor]
    ranks: Mapping[str, Tensor]
    energy: Mapping[str, Tensor]
    budget: BudgetGates
    choose: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    slopes: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

    def step(self, scores: Mapping[str, Tensor], noisy: bool, temperature: float, draw: torch.Generator) -> GateStep:
        """What a loss sees of a step with these scores."""
        open_with = self.budget.probabilities(scores)
        if noisy:
            gates = {name: sampled(p, temperature, draw) for name, p in open_with.items()}
        else:
            chosen = self.choose({name: score.detach() for name, score in scores.items()})
            gates = {name: straight_through(p, chosen[name]) for name, p in open_with.items()}
        return GateStep(scores, open_with, gates, self.ranks, self.energy, self.slopes, draw)


def train(scorer: Scorer, stages: Sequence[Stage], problem: Problem, generator: torch.Generator) -> None:
    """Train a scorer through all stages; the gates cool down over all of their steps."""
    whole, done = sum(stage.steps for stage in stages), 0
    for stage in stages:
        loss, optimizer = stage.make_loss(), stage.make_optimizer(scorer.parameters())
        for number in range(stage.steps):
            temperature = _COLDEST ** (done / whole)
            value = loss(problem.step(scorer(problem.features), loss.noisy, temperature, generator))
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = stage.rate(number)
            optimizer.step()
            done += 1


def sampled(probabilities: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Bernoulli gates, at least one of them open, with the gradients of relaxed ones (Maddison et al., 2017).

    Args:
        probabilities: Of being open, shape ``[units]``.
        temperature: Of the relaxation.
        generator: Source of the noise.
    """
    noise = torch.rand(probabilities.shape, generator=generator).clamp(1e-6, 1 - 1e-6).logit()
    relaxed = torch.sigmoid((probabilities.clamp(1e-6, 1 - 1e-6).logit() + noise.to(probabilities)) / temperature)
    hard = relaxed.detach() > 0.5
    hard[relaxed.detach().argmax()] = True
    return straight_through(relaxed, hard & (probabilities.detach() > 0))


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """The values of one tensor with the gradients of another.

    Example:
        >>> straight_through(torch.tensor([0.7]), torch.tensor([True]))
        tensor([1.])
    """
    return hard.to(soft) + (soft - soft.detach())


def mean_ranks(group: ChannelGroup, tensors: Mapping[str, Tensor], statistics: Tensor | None) -> Tensor:
    """Mean rank of each unit of a group by the 2-norm, by the scale or else the gradient's norm, and by the slope.

    Args:
        group: The group.
        tensors: Parameters and buffers by full name.
        statistics: As for :func:`~lightning_prune.scoring.features`.
    """
    rankings = [Norm(p=2, slots="all").score(group, tensors, {}, torch.Generator()).cpu()]
    if scales := group.with_role("scale"):
        rankings.append(entries(scales, tensors).abs().mean(1).cpu())
    elif statistics is not None:
        rankings.append(statistics[:, 3])
    if statistics is not None:
        rankings.append(statistics[:, 2])
    ranks = [_ranks(values) for values in rankings]
    return torch.stack(ranks).mean(0)


def _ranks(values: Tensor) -> Tensor:
    """Rank of each value, the mean one of those that are equal."""
    below = (values[:, None] > values).sum(1)
    return below + ((values[:, None] == values).sum(1) - 1) / 2


def energy(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """Squared 2-norm of what switches each unit of a group off."""
    return entries(group.off, tensors).abs().square().sum(1).cpu()

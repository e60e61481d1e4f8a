"""Stages of a scorer's training: each with a loss, an optimizer and a number of steps of its own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Union

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_prune.choices import unknown_name
from lightning_prune.errors import ConfigurationError

LossName = Literal["rank", "task", "commit"]
OptimizerName = Literal["adam", "sgd", "adamw"]


@dataclass(frozen=True)
class GateStep:
    """One step of a scorer's training, as a loss sees it; everything by group name, of shape ``[units]``.

    Args:
        scores: The scores; what a loss returns must depend on them.
        probabilities: Probabilities of being open, which meet the budget.
        gates: Gates of 0 and 1 whose gradients pass on to the scores: drawn, or those that a cut would leave now.
        ranks: Mean ranks of the units within their group by criteria made by hand.
        energy: Squared 2-norms of what switches the units off.
        slopes: Gives the derivatives of the user's own loss with respect to gates, on the next batch of training.
        generator: The only source of randomness to use.
    """

    scores: Mapping[str, Tensor]
    probabilities: Mapping[str, Tensor]
    gates: Mapping[str, Tensor]
    ranks: Mapping[str, Tensor]
    energy: Mapping[str, Tensor]
    slopes: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    generator: torch.Generator

    def task(self) -> Tensor:
        """A number with the gradient of the user's own loss under the gates; its value means nothing."""
        slopes = self.slopes({name: gate.detach() for name, gate in self.gates.items()})
        return torch.stack([(gate * slopes[name].to(gate)).sum() for name, gate in self.gates.items()]).sum()


class StageLoss(ABC):
    """What a scorer is trained on in a stage.

    Attributes:
        noisy: Whether gates are drawn; else they are those that a cut by the present scores would leave.

    Example:
        >>> class FewerRegrets(StageLoss):
        ...     def __call__(self, step):
        ...         return step.task() + 0.01 * sum(p.square().mean() for p in step.probabilities.values())
        >>> Stage(FewerRegrets(), "adam", lr=1e-3, steps=50).optimizer
        'adam'
    """

    noisy: bool = True

    @abstractmethod
    def __call__(self, step: GateStep) -> Tensor:
        """The loss of one step, a scalar that depends on the scores."""


@dataclass(frozen=True)
class RankLoss(StageLoss):
    """Pairwise logistic loss to the mean rank of criteria made by hand, within each group; runs no batch.

    Args:
        pairs: Number of pairs drawn in each group.
    """

    pairs: int = 256

    def __call__(self, step: GateStep) -> Tensor:
        """Mean over groups of log(1 + exp(-(s_i - s_j) sign(r_i - r_j)))."""
        losses = []
        for name, scores in step.scores.items():
            first, second = torch.randint(len(scores), (2, self.pairs), generator=step.generator)
            order = (step.ranks[name][first] - step.ranks[name][second]).sign().to(scores)
            losses.append(functional.softplus(-(scores[first] - scores[second]) * order).mean())
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class TaskLoss(StageLoss):
    """The user's own loss under gates that are drawn."""

    def __call__(self, step: GateStep) -> Tensor:
        """That loss."""
        return step.task()


@dataclass(frozen=True)
class CommitLoss(StageLoss):
    """The user's own loss of the network as it would be cut, with scores pushed apart and signals kept strong.

    Args:
        decisiveness: Weight of the mean of p (1 - p).
        variance: Weight of the squared logarithm of the share of the variance that is left of each group's signal,
            judged by the squared norms of the weights that read it.
    """

    decisiveness: float = 0.1
    variance: float = 0.05
    noisy = False

    def __call__(self, step: GateStep) -> Tensor:
        """The sum of the three."""
        every = torch.cat(list(step.probabilities.values()))
        losses = [step.task(), self.decisiveness * (every * (1 - every)).mean()]
        for name, p in step.probabilities.items():
            whole = step.energy[name].sum()
            if self.variance and whole > 0:
                left = (p * step.energy[name].to(p)).sum() / whole.to(p)
                losses.append(self.variance * left.clamp(min=1e-8).log().square())
        return torch.stack(losses).sum()


_LOSSES: dict[str, Callable[[], StageLoss]] = {"rank": RankLoss, "task": TaskLoss, "commit": CommitLoss}
_EPSILON = 1e-5  # gradients that are nothing but rounding errors should not make whole steps
_RATES = {"adam": 1e-3, "sgd": 0.05, "adamw": 2e-4}


@dataclass(frozen=True)
class Stage:
    """One stage of a scorer's training.

    Args:
        loss: ``"rank"`` (order the units as criteria made by hand do on the average), ``"task"`` (the user's own loss
            under gates that are drawn), ``"commit"`` (that of the network as it would be cut, with terms for decided
            gates and strong signals), or a :class:`~lightning_prune.StageLoss`.
        optimizer: ``"adam"``, ``"sgd"`` (momentum 0.9, learning rate falling along half a cosine) or ``"adamw"``
            (weight decay 1e-4).
        lr: Learning rate; default: 1e-3, 0.05 and 2e-4.
        steps: Number of steps.

    Raises:
        ConfigurationError: If a name is unknown or a number out of range.

    Example:
        >>> Stage("task", "adam", steps=200)
        Stage(loss='task', optimizer='adam', lr=None, steps=200)
    """

    loss: Union[LossName, StageLoss] = "task"  # noqa: UP007
    optimizer: OptimizerName = "adam"
    lr: float | None = None
    steps: int = 100

    def __post_init__(self) -> None:
        """Refuse what cannot be trained with."""
        if not isinstance(self.loss, StageLoss) and self.loss not in _LOSSES:
            raise unknown_name("loss of a stage", self.loss, _LOSSES)
        if self.optimizer not in _RATES:
            raise unknown_name("optimizer of a stage", self.optimizer, _RATES)
        if self.lr is not None and not self.lr > 0:
            raise ConfigurationError(f"the lr of a stage must be above 0, but is {self.lr}.")
        if self.steps < 1:
            raise ConfigurationError(f"the steps of a stage must be at least 1, but are {self.steps}.")

    def make_loss(self) -> StageLoss:
        """The loss."""
        return self.loss if isinstance(self.loss, StageLoss) else _LOSSES[self.loss]()

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """A new optimizer."""
        lr = self.lr or _RATES[self.optimizer]
        if self.optimizer == "sgd":
            return SGD(parameters, lr, momentum=0.9)
        if self.optimizer == "adam":
            return Adam(parameters, lr, eps=_EPSILON)
        return AdamW(parameters, lr, eps=_EPSILON, weight_decay=1e-4)

    def rate(self, done: int) -> float:
        """Learning rate after so many of the steps."""
        lr = self.lr or _RATES[self.optimizer]
        return lr * (1 + math.cos(math.pi * done / self.steps)) / 2 if self.optimizer == "sgd" else lr


def default_stages(steps: int) -> list[Stage]:
    """A fifth of the steps to warm up by ranks, three fifths for the task, a fifth to commit.

    Example:
        >>> [(stage.loss, stage.steps) for stage in default_stages(400)]
        [('rank', 80), ('task', 240), ('commit', 80)]
    """
    fifth = max(round(steps / 5), 1)
    middle = max(steps - 2 * fifth, 1)
    return [
        Stage("rank", "adam", steps=fifth),
        Stage("task", "sgd", steps=middle),
        Stage("commit", "adamw", steps=fifth),
    ]


def stages_from(
    stages: Sequence[Stage] | None, steps: int, scorer_path: str | None, freeze: bool, adapt_steps: int
) -> list[Stage]:
    """The stages that a scorer goes through; none if it only scores.

    Args:
        stages: Those that were asked for, if any.
        steps: Steps of the default ones.
        scorer_path: File of a scorer that was trained before, if any.
        freeze: Whether it only scores.
        adapt_steps: Steps of the default stage of such a scorer.

    Raises:
        ConfigurationError: If that does not fit together.
    """
    if freeze and (scorer_path is None or stages is not None):
        raise ConfigurationError(
            "freeze=True scores with a trained net as it is: give its file in scorer_path, and leave out stages."
        )
    if stages is not None and not stages:
        raise ConfigurationError("stages is empty: give at least one Stage, or leave it out for the default three.")
    if steps < 3 or adapt_steps < 1:
        raise ConfigurationError(
            f"steps must be at least 3 and adapt_steps at least 1, but they are {steps} and {adapt_steps}. To train "
            f"nothing, give scorer_path and freeze=True."
        )
    if freeze:
        return []
    if stages is not None:
        return list(stages)
    return default_stages(steps) if scorer_path is None else [Stage("commit", "adamw", steps=adapt_steps)]

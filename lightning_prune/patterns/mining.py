"""Patterns of units that imply what a network predicts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.errors import ConfigurationError, PruneError
from lightning_prune.patterns.tree import grow_tree

Literals = tuple[tuple[int, bool], ...]


class PatternError(PruneError):
    """Nothing can be said of the units by their patterns."""


@dataclass(frozen=True)
class Pattern:
    """Units whose being on or off together implies a prediction.

    Attributes:
        literals: The units, ascending, and whether each is on.
        predicted: The class.
        support: Number of samples in which the units are so.
        confidence: Share of them for which the class is predicted.
    """

    literals: Literals
    predicted: int
    support: int
    confidence: float


@dataclass(frozen=True)
class PatternMining:
    """How :class:`~lightning_prune.DecisionPatternPruning` looks for patterns.

    Args:
        samples: Number of training samples to look at.
        min_samples: Fewest samples (of each process) that anything is concluded from.
        purity: Share of the samples with a pattern for which its class must be predicted, in (0.5, 1].
        max_depth: Most units in a pattern, at least 1.
        min_support: Share of all samples that a pattern must cover, in [0, 1).
        positive: A unit is on where more than this share of the positions of its map is above zero, in [0, 1).
        outputs: Name of the child module whose output holds the class scores, or ``"forward"`` for the module itself.
            Default: the last output of shape ``[samples, classes]``.

    Raises:
        ConfigurationError: If a number is out of range.

    Example:
        >>> PatternMining(purity=0.95).max_depth
        8
    """

    samples: int = 10_000
    min_samples: int = 500
    purity: float = 0.99
    max_depth: int = 8
    min_support: float = 0.005
    positive: float = 0.0
    outputs: str | None = None

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if not 1 <= self.min_samples <= self.samples:
            raise ConfigurationError(
                f"min_samples must be at least 1 and no more than samples, but is {self.min_samples} of {self.samples}."
            )
        if not 0.5 < self.purity <= 1:
            raise ConfigurationError(f"purity must be a share in (0.5, 1], but is {self.purity}.")
        if self.max_depth < 1:
            raise ConfigurationError(f"max_depth must be at least 1, but is {self.max_depth}.")
        for name, value in (("min_support", self.min_support), ("positive", self.positive)):
            if not 0 <= value < 1:
                raise ConfigurationError(f"{name} must be a share in [0, 1), but is {value}.")

    def check(self, count: float) -> None:
        """Refuse to conclude anything from too few samples.

        Raises:
            PatternError: If there are fewer than ``min_samples``.
        """
        if count < self.min_samples:
            raise PatternError(
                f"{count:g} training samples are too few to find patterns in, with min_samples={self.min_samples}. "
                f"Give it more data, or lower min_samples."
            )


def mine(signatures: Tensor, predictions: Tensor, how: PatternMining | None = None) -> list[Pattern]:
    """The patterns of all classes, as short as their purity allows (after Gopinath et al., 2019).

    For each class a tree is fitted to the signatures. Each of its leaves that is pure enough gives a pattern, from
    which units are dropped one by one, always the one without which it is purest, as long as it is pure enough.

    Args:
        signatures: Which units are on, bool of shape ``[samples, units]``.
        predictions: What the network predicts, int64 of shape ``[samples]``.
        how: Purity, length and support of patterns.

    Returns:
        Each pattern once. One that would need no unit, because the class is nearly always predicted, is none.

    Example:
        >>> on = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.bool)
        >>> for pattern in mine(on, torch.tensor([0, 0, 0, 1])):
        ...     print(pattern)
        Pattern(literals=((0, False),), predicted=0, support=2, confidence=1.0)
        Pattern(literals=((1, False),), predicted=0, support=2, confidence=1.0)
        Pattern(literals=((0, True), (1, True)), predicted=1, support=1, confidence=1.0)
    """
    how = how or PatternMining()
    least = max(1, math.ceil(how.min_support * len(signatures) - 1e-9))
    found: dict[tuple[int, Literals], Pattern] = {}
    for predicted in torch.unique(predictions).tolist():
        hits = predictions == predicted
        for leaf in grow_tree(signatures, hits, how.max_depth, least).leaves():
            if leaf.samples and leaf.hits >= how.purity * leaf.samples:
                pattern = _minimised(leaf.path, signatures, hits, predicted, how.purity)
                if pattern.literals:
                    found.setdefault((predicted, pattern.literals), pattern)
    return list(found.values())


def _minimised(literals: Literals, signatures: Tensor, hits: Tensor, predicted: int, purity: float) -> Pattern:
    """The pattern without the units that it does not need."""
    while True:
        wanted = torch.tensor([on for _, on in literals], dtype=torch.bool, device=signatures.device)
        failed = signatures[:, [unit for unit, _ in literals]] != wanted
        failures = failed.sum(1)
        covered = failures == 0
        # Without one of its literals a pattern covers, besides, what fails in that one alone.
        more = failed & (failures == 1)[:, None]
        support = covered.sum() + more.sum(0)
        confidence = ((covered & hits).sum() + (more & hits[:, None]).sum(0)).double() / support
        if not literals or not bool((confidence >= purity).any()):
            count = int(covered.sum())
            return Pattern(tuple(sorted(literals)), predicted, count, int((covered & hits).sum()) / count)
        needless = int(confidence.argmax())
        literals = literals[:needless] + literals[needless + 1 :]

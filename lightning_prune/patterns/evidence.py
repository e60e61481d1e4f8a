"""What decision patterns say of each unit: how significant it is, and whether it is needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_prune.patterns.mining import PatternError, PatternMining, mine

STATUSES = ("dead", "duplicate", "idle", "saturated", "significant")
RARE = 0.001
"""Share of samples below which a unit is dead if it is on in no more, and saturated if it is off in no more."""
ALIKE = 0.995
"""Share of samples from which on a unit that does the same as another is its duplicate."""
INFORMATION = 0.1
"""What a bit that a unit alone tells of the prediction adds to its significance."""


@dataclass(frozen=True)
class Evidence:
    """What signatures and patterns say of the units of a group.

    Attributes:
        on_rate: Share of the samples in which each unit is on, ``[units]``.
        significance: How much of the predictions is implied by patterns that each unit is in, ``[units]``.
        mentions: Number of patterns that each unit is in, ``[units]``.
        agreement: Share of the samples in which two units are both on or both off, ``[units, units]``.
        patterns: Number of patterns, a scalar.
    """

    on_rate: Tensor
    significance: Tensor
    mentions: Tensor
    agreement: Tensor
    patterns: Tensor

    def check(self, group: str) -> None:
        """Refuse to tell the units of a group apart where there is nothing to tell them apart by.

        Args:
            group: Name of the group, for the message.

        Raises:
            PatternError: If no unit is ever on or off, or there is no pattern.
        """
        remedy = "prune later, leave the group out with `exclude`, or set unpruned_ok=True to go on without this round"
        lowest, highest = float(self.on_rate.min()), float(self.on_rate.max())
        if lowest > 1 - RARE or highest < RARE:
            never = "off" if lowest > 1 - RARE else "on"
            raise PatternError(
                f"no unit of channel group {group!r} is ever {never}, so there are no patterns of what is on and off. "
                f"Put an activation such as a ReLU in front of what reads it; for maps raise `positive`; or {remedy}."
            )
        if self.patterns == 0:
            raise PatternError(
                f"no pattern of the units of channel group {group!r} implies a prediction with the purity that is "
                f"asked for. Lower `purity` or `min_support`, raise `max_depth`, or {remedy}."
            )

    def statuses(self) -> Tensor:
        """The status of each unit as its place in ``STATUSES``, int64 of shape ``[units]``.

        Dead: hardly ever on. Saturated: hardly ever off. Duplicate: on with a more significant unit that is neither.
        Idle: in no pattern. Significant: all others. Of equal significance the earlier unit counts as more significant.
        """
        dead, saturated = self.on_rate < RARE, self.on_rate > 1 - RARE
        rank = torch.empty(len(dead), dtype=torch.int64)
        rank[self.significance.argsort(descending=True, stable=True)] = torch.arange(len(dead))
        stronger = (rank < rank[:, None]) & ~(dead | saturated)
        duplicate = ((self.agreement >= ALIKE) & stronger).any(1)
        status = torch.full_like(rank, STATUSES.index("significant"))
        kinds = {"idle": self.mentions == 0, "duplicate": duplicate, "saturated": saturated, "dead": dead}
        for name, where in kinds.items():
            status[where] = STATUSES.index(name)
        return status

    def counts(self) -> dict[str, int]:
        """Number of units of each status."""
        found = torch.bincount(self.statuses(), minlength=len(STATUSES))
        return dict(zip(STATUSES, found.tolist(), strict=True))

    def scores(self) -> Tensor:
        """Scores by which the dead go first, then duplicates, the idle, and all others, each by their significance."""
        # A saturated unit may well matter, as it hands on what it reads: it is no candidate, and goes with the others.
        tier = self.statuses().clamp_max(STATUSES.index("saturated"))
        return tier + self.significance / (1 + self.significance.max())

    def averaged(self, average: Callable[[Tensor], Tensor]) -> Evidence:
        """The evidence of several processes together, on the CPU."""
        return Evidence(*(average(getattr(self, field.name)).cpu() for field in fields(self)))


def evidence_of(signatures: Tensor, predictions: Tensor, how: PatternMining | None = None) -> Evidence:
    """Look for patterns and weigh the units by them.

    The significance of a unit is the sum of support times confidence, as a share of all samples, over the patterns that
    it is in, plus 0.1 for each bit that it alone tells of the prediction.

    Args:
        signatures: Which units are on, bool of shape ``[samples, units]``.
        predictions: What the network predicts, int64 of shape ``[samples]``.
        how: Purity, length and support of patterns.

    Example:
        >>> on = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.bool)
        >>> found = evidence_of(on, torch.tensor([0, 0, 1, 1]))
        >>> found.significance.tolist(), found.mentions.tolist()
        ([1.1, 0.0], [2.0, 0.0])
    """
    count = len(signatures)
    patterns = mine(signatures, predictions, how)
    significance = INFORMATION * information(signatures, predictions)
    mentions = torch.zeros_like(significance)
    for pattern in patterns:
        members = [unit for unit, _ in pattern.literals]
        significance[members] += pattern.support * pattern.confidence / count
        mentions[members] += 1
    data = signatures.float()
    both = (data.T @ data).double()
    on = both.diagonal()
    agreement = (count - on[:, None] - on + 2 * both) / count
    return Evidence(on / count, significance, mentions, agreement, torch.tensor(float(len(patterns))))


def information(signatures: Tensor, predictions: Tensor) -> Tensor:
    """Bits that each unit alone tells of the prediction (mutual information), float64 of shape ``[units]``.

    Args:
        signatures: Which units are on, bool of shape ``[samples, units]``.
        predictions: What the network predicts, int64 of shape ``[samples]``.
    """
    classes = torch.nn.functional.one_hot(predictions).double()
    on = classes.T @ signatures.double()
    joint = torch.stack([on, classes.sum(0)[:, None] - on]) / len(signatures)  # [2, classes, units]
    alone = joint.sum(1, keepdim=True) * joint.sum(0)
    return torch.xlogy(joint, joint / alone.clamp_min(1e-300)).sum((0, 1)).clamp_min(0) / math.log(2)

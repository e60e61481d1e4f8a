"""What a criterion is, and how criteria are found by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.errors import ConfigurationError, PruneError
from lightning_prune.graph.channels import ChannelGroup, Role, Slot

WEIGHT_ROLES: tuple[Role, ...] = ("producer", "bias", "scale", "consumer")


class Criterion(ABC):
    """Gives every unit of a channel group an importance score; higher means keep.

    Attributes:
        batches: Number of real batches whose gradients the criterion wants; 0 if it looks at the weights only. A caller
            scores once per batch and averages.
        normalised: Whether a caller that compares units of different groups should divide each group's scores by their
            mean first (see :func:`normalise`).

    Example:
        >>> class LargestWeight(Criterion):
        ...     def score(self, group, tensors, gradients, generator):
        ...         return entries(group.with_role("producer"), tensors).abs().amax(1)
        >>> index = torch.arange(2)[:, None]
        >>> group = ChannelGroup("conv", (Slot("conv.weight", 0, index, "producer"),), ())
        >>> weights = {"conv.weight": torch.tensor([[1.0, -3.0], [2.0, 0.0]])}
        >>> LargestWeight().score(group, weights, {}, torch.Generator())
        tensor([3., 2.])
    """

    batches: int = 0
    normalised: bool = True

    @abstractmethod
    def score(
        self,
        group: ChannelGroup,
        tensors: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """Score the units of one group.

        Args:
            group: The channel group.
            tensors: Present value of every parameter and buffer of the network, by full name.
            gradients: Gradient of the loss of one batch, by full name of the parameter. Empty if ``batches`` is 0.
            generator: The only source of randomness a criterion may use, so that all processes agree.

        Returns:
            Scores of shape ``[units]``; finite, higher = keep.
        """


@dataclass(frozen=True)
class GradientCriterion(Criterion):
    """A criterion that looks at weights and at the gradients of a number of batches.

    Args:
        batches: Number of real batches to average over, at least 1.

    Raises:
        ConfigurationError: If there is no batch.
    """

    batches: int = 8

    def __post_init__(self) -> None:
        """Refuse to work without a batch."""
        if self.batches < 1:
            raise ConfigurationError(f"{type(self).__name__}: batches must be at least 1, but is {self.batches}.")


def mean_scores(
    criterion: Criterion,
    groups: Mapping[str, ChannelGroup],
    tensors: Mapping[str, Tensor],
    gradients: Iterable[Mapping[str, Tensor]],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Scores of the units of several groups, averaged over batches.

    Args:
        criterion: The criterion.
        groups: The groups by name.
        tensors: Present value of every parameter and buffer of the network, by full name.
        gradients: Gradients of each batch, read only where the criterion wants some.
        generator: The only source of randomness.

    Returns:
        For each group scores of shape ``[units]``.

    Raises:
        PruneError: If the criterion gives another number of scores.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    for found in gradients if criterion.batches else [{}]:
        count += 1
        for name, group in groups.items():
            score = checked_score(group, criterion.score(group, tensors, found, generator))
            sums[name] = sums[name] + score if name in sums else score
    return {name: total / count for name, total in sums.items()}


def checked_score(group: ChannelGroup, score: Tensor) -> Tensor:
    """The scores of a group, one per unit.

    Raises:
        PruneError: If they are no tensor, or more or fewer.
    """
    if not isinstance(score, Tensor):
        raise PruneError(
            f"the scores of channel group {group.name!r} are of type {type(score).__name__}. A criterion must return a "
            f"tensor of shape [{group.width}], one score per unit."
        )
    if score.shape != (group.width,):
        raise PruneError(
            f"channel group {group.name!r} has {group.width} units, but its scores have shape {list(score.shape)}. A "
            "criterion must return one score per unit."
        )
    return score


def entries(slots: Iterable[Slot], tensors: Mapping[str, Tensor]) -> Tensor:
    """All entries of the given slots side by side, unit by unit.

    Args:
        slots: Slots of one group.
        tensors: Tensors by full name.

    Returns:
        Detached values of shape ``[units, entries]``, in single precision or better.

    Raises:
        PruneError: If ``tensors`` lacks one of the slots' tensors.

    Example:
        >>> slot = Slot("fc.weight", 0, torch.tensor([[0], [2]]), "producer")
        >>> entries([slot], {"fc.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}).tolist()
        [[1.0, 2.0], [5.0, 6.0]]
    """
    parts = []
    for slot in slots:
        if slot.tensor not in tensors:
            without = "" if tensors else " None were taken: for that the criterion needs batches of at least 1."
            raise PruneError(
                f"cannot score {slot.tensor!r}: there is no value or gradient for it.{without} Exclude the channel "
                'group that owns it, or use a criterion that looks at weights only, such as "l2".'
            )
        part = slot.gather(tensors[slot.tensor].detach())
        parts.append(part.to(torch.promote_types(part.dtype, torch.float32)))
    return torch.cat(parts, dim=1)


def producers(group: ChannelGroup) -> tuple[Slot, ...]:
    """The slots that make a group's channels, or every slot with weights where no parameter makes them.

    Example:
        >>> index = torch.arange(2)[:, None]
        >>> slots = Slot("a.weight", 0, index, "producer"), Slot("b.weight", 1, index, "consumer")
        >>> producers(ChannelGroup("a", slots, slots[1:]))
        (Slot('a.weight', dim=0, producer, 2 units),)
    """
    return group.with_role("producer") or group.with_role(*WEIGHT_ROLES)


def normalise(scores: Tensor, keep: Tensor | None = None) -> Tensor:
    """Divide a group's scores by their mean, which makes groups comparable (Fang et al., 2023).

    Args:
        scores: Scores of one group, shape ``[units]``.
        keep: Bool mask of shape ``[units]``; the mean is taken over these units only, so that units which are already
            off do not lift the others.

    Returns:
        Scores of shape ``[units]`` whose mean over the kept units is 1, or ``scores`` itself if their mean is 0.

    Example:
        >>> normalise(torch.tensor([1.0, 2.0, 3.0]))
        tensor([0.5000, 1.0000, 1.5000])
    """
    mean = (scores if keep is None else scores[keep.to(scores.device)]).mean()
    return scores if mean == 0 else scores / mean

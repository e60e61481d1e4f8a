"""What channels hold while the network runs."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.criteria.base import Criterion
from lightning_prune.errors import ConfigurationError, PruneError
from lightning_prune.graph.activations import Observer, Reading
from lightning_prune.graph.channels import ChannelGroup

UNREAD = "no operator reads it with a parameter in evaluation mode"


@dataclass(frozen=True)
class RunningNetwork:
    """A network to be looked at while it runs.

    Args:
        groups: All of its channel groups by name.
        tensors: Present value of every parameter and buffer, by full name.
        batches: For each batch a function that runs the network on it in evaluation mode, and calls an observer
            wherever an operator reads a group with a parameter, in the order of execution.
    """

    groups: Mapping[str, ChannelGroup]
    tensors: Mapping[str, Tensor]
    batches: Sequence[Callable[[Observer], None]]


class RunCriterion(Criterion):
    """Scores the units of all groups together from runs of the network.

    Attributes:
        batches: Number of real batches to run it on, at least 1.
    """

    batches: int = 8

    def __post_init__(self) -> None:
        """Refuse to work without a batch."""
        if self.batches < 1:
            raise ConfigurationError(f"{type(self).__name__}: batches must be at least 1, but is {self.batches}.")

    @abstractmethod
    def scores(
        self, network: RunningNetwork, wanted: Collection[str], generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Score the units of groups.

        Args:
            network: The network.
            wanted: Names of the groups whose scores are needed.
            generator: The only source of randomness a criterion may use, so that all processes agree.

        Returns:
            Scores of shape ``[units]`` by group name; finite, higher = keep.
        """

    def score(
        self,
        group: ChannelGroup,
        tensors: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """Raise: weights and gradients are not enough."""
        raise PruneError(
            f"{type(self).__name__} cannot score channel group {group.name!r} by its weights: it looks at the network "
            "while it runs. Use it as the criterion of ChannelPruning."
        )

    def refuse(self, groups: Collection[str], reason: str) -> None:
        """Raise if there are groups that cannot be scored.

        Raises:
            PruneError: If so; names them.
        """
        if groups:
            raise PruneError(
                f"{type(self).__name__} cannot score channel group {', '.join(map(repr, sorted(groups)))}: {reason}. "
                "Leave that out with `exclude`, or choose another criterion."
            )


class ActivationCriterion(RunCriterion):
    """Scores the units of a group by what its readers are given; higher means keep.

    Subclass it, and write :meth:`observe`. Where several operators read a group (on a residual stream, say), and over
    batches and processes, scores are averaged.

    Attributes:
        needs: What a reading must have to be scored, for messages.

    Example:
        >>> class MeanActivation(ActivationCriterion):
        ...     batches = 4
        ...
        ...     def observe(self, group, reading):
        ...         return reading.channels.abs().mean((0, 2))
        >>> from lightning_prune import ChannelPruning
        >>> pruning = ChannelPruning(criterion=MeanActivation(), remove=0.5)
    """

    needs: str = "channels"

    @abstractmethod
    def observe(self, group: ChannelGroup, reading: Reading) -> Tensor | None:
        """Score the units of one group on one batch, as one operator reads them.

        Args:
            group: The channel group.
            reading: Its channels ``[samples, units, positions]``, and what reads them.

        Returns:
            Scores of shape ``[units]``; None if this reading says nothing.
        """

    def scores(
        self, network: RunningNetwork, wanted: Collection[str], generator: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Mean of what was observed; see the base."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = defaultdict(int)
        read: set[str] = set()

        def observer(reading: Reading) -> None:
            name = reading.group
            if name not in wanted:
                return
            read.add(name)
            score = self.observe(network.groups[name], reading)
            if score is not None:
                sums[name] = sums[name] + score if name in sums else score
                counts[name] += 1

        for run in network.batches:
            run(observer)
        self.refuse(set(wanted) - read, UNREAD)
        self.refuse(read - sums.keys(), f"nothing that reads it is given {self.needs}")
        return {name: total / counts[name] for name, total in sums.items()}


@dataclass(frozen=True)
class APoZ(ActivationCriterion):
    """Share of positive activations (Hu et al., 2016: the average percentage of zeros, from the other side).

    Units that are zero on most of the data, as behind a ReLU, go first.

    Args:
        batches: Number of real batches to average over, at least 1.

    Example:
        >>> APoZ(batches=2)
        APoZ(batches=2)
    """

    provenance = "published"
    batches: int = 8

    def observe(self, group: ChannelGroup, reading: Reading) -> Tensor:
        """Share of positive activations of each unit."""
        return (reading.channels > 0).float().mean((0, 2))


@dataclass(frozen=True)
class HRank(ActivationCriterion):
    """Mean rank of a unit's feature maps (Lin et al., 2020).

    Takes maps of height and width as the next layer reads them; in front of a linear layer, as they were before they
    were pooled to single values or flattened.

    Args:
        batches: Number of real batches to average over, at least 1. The source takes about 500 images.

    Raises:
        PruneError: If nothing that reads a group is given maps of at least 2 x 2, or what is made from such; names it.

    Example:
        >>> HRank(batches=2)
        HRank(batches=2)
    """

    provenance = "published"
    batches: int = 8
    needs = "maps of height and width (at least 2 x 2), whose rank could differ"

    def observe(self, group: ChannelGroup, reading: Reading) -> Tensor | None:
        """Mean rank of each unit's maps."""
        maps = reading.feature_maps
        if maps is None:
            return None
        ranks: Tensor = torch.linalg.matrix_rank(maps)
        return ranks.float().transpose(0, 1).flatten(1).mean(1)


@dataclass(frozen=True)
class CHIP(ActivationCriterion):
    """Channel independence: how much the nuclear norm of all channels drops without the unit (Sui et al., 2021).

    The channels of a sample are the rows of a matrix, positions its columns; a row that others can stand in for adds
    little to the norm.

    Args:
        batches: Number of real batches to average over, at least 1.
        samples: Samples of each batch that are looked at, at least 1. The source takes all of them; each costs a
            singular value decomposition for every unit.

    Example:
        >>> CHIP(batches=2)
        CHIP(batches=2, samples=16)
    """

    provenance = "published"
    batches: int = 5
    samples: int = 16

    def __post_init__(self) -> None:
        """Refuse to work without a sample."""
        super().__post_init__()
        if self.samples < 1:
            raise ConfigurationError(f"CHIP: samples must be at least 1, but is {self.samples}.")

    def observe(self, group: ChannelGroup, reading: Reading) -> Tensor:
        """Drop of the nuclear norm, mean over samples."""
        # Rows turned into fewer dimensions keep their norms, together and without any of them.
        rows = torch.linalg.qr(reading.channels[: self.samples].mT, mode="r").R.mT
        whole = torch.linalg.matrix_norm(rows, "nuc")
        drops = []
        for unit in range(rows.shape[1]):
            others = rows.clone()
            others[:, unit] = 0
            drops.append((whole - torch.linalg.matrix_norm(others, "nuc")).mean())
        return torch.stack(drops)

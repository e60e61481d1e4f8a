"""An evolutionary search of how much to keep of each group."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Union

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.base import Shrink
from lightning_prune.callbacks.channels import ChannelPruning, Measure
from lightning_prune.callbacks.monitors import Monitors
from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.network import Network
from lightning_prune.criteria import Criterion, CriterionName
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.analysis import Norms
from lightning_prune.reinit import Reinit, ReinitName
from lightning_prune.schedules import OneShot, Unit
from lightning_prune.search import Genetic
from lightning_prune.sensitivity import switched_off

_LEAST = 0.01
"""Smallest share of a genome: what matters is the ratio of the shares, and nothing can be scaled up from zero."""


class EvolutionarySearch(ChannelPruning):
    """Looks for the share to keep of each channel group with a genetic algorithm: the expensive baseline.

    A genome holds one share for each group. Multiplied with a common factor, so that the budget is met to the channel,
    the shares say how many channels each group keeps; a criterion says which. A genome is judged by the loss of the
    network with the other channels masked, on a fixed set of training batches. The search starts from equal shares and
    from what the criterion alone would keep, and the best genome is pruned in one round. It takes ``batches`` forwards
    for each of up to ``population * (generations + 1)`` networks. Searches of this kind are many; this one stands for
    them and copies none.

    Args:
        remove: Fraction to remove in all, in [0, 1).
        of: What it is a fraction of. ``"latency"`` is measured for every new set of widths, which takes long.
        criterion: Which channels of a group matter.
        population: Genomes in each generation, at least 2.
        generations: Generations after the first one, at least 1.
        batches: Number of batches to look at the loss of.
        at: Position of the search and the only round.
        unit: Of ``at``: ``"fraction"`` of the fit, ``"epoch"`` or ``"step"``.
        include, exclude, ratios, round_to, min_channels: As for :class:`~lightning_prune.ChannelPruning`.
        reinit, shrink, norms, inner, verify, recalibrate, seed, directory, monitors: As there.

    Raises:
        ConfigurationError: If an argument is wrong, or can have no effect in this fit.
        BudgetError: If the budget is out of reach on this network.
        PruneError: If the training step gives no loss.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[EvolutionarySearch(remove=0.5)], logger=False)
    """

    provenance = "reconstruction"

    def __init__(
        self,
        remove: float = 0.5, of: Measure = "macs",
        criterion: Union[CriterionName, Criterion] = "l2",  # noqa: UP007
        population: int = 16, generations: int = 20, batches: int = 4, at: float = 0.3, unit: Unit = "fraction",
        include: Patterns | None = None, exclude: Patterns | None = None,
        ratios: Mapping[str, float] | None = None, round_to: int = 1,
        min_channels: Union[int, float] = 1, reinit: Union[ReinitName, Reinit] = "keep",  # noqa: UP007
        shrink: Shrink = "rounds", norms: Norms = "exact", inner: Patterns | None = None, verify: bool = True,
        recalibrate: int = 0, seed: int = 0, directory: str | None = None, monitors: Monitors = "keep",
    ) -> None:  # fmt: skip
        super().__init__(
            criterion, remove, of, OneShot(at, unit), "global", include, exclude, ratios, round_to, min_channels,
            reinit, shrink, norms, inner, verify, recalibrate, seed, directory, monitors,
        )  # fmt: skip
        if batches < 1:
            raise ConfigurationError(f"batches to look at the loss of must be at least 1, but they are {batches}.")
        self.population, self.generations, self.batches, self.at, self.unit = population, generations, batches, at, unit
        self._search = Genetic(population, generations)

    @override
    def select(self, network: Network, level: float) -> dict[str, Tensor]:
        start, batches = time.perf_counter(), network.probe.batches(self.batches)
        alone, scores, alive = super().select(network, level), self.scores(network), network.masks.keep
        values = {name: score.cpu().masked_fill(~alive[name], -torch.inf) for name, score in scores.items()}
        places = {name: value.argsort(descending=True, stable=True).argsort() for name, value in values.items()}
        losses: dict[tuple[int, ...], float] = {}

        def kept(genome: Tensor) -> dict[str, Tensor]:
            # A unit stays if its place is below factor times share times width: the first to go as the factor falls
            # has the lowest quotient.
            shares = dict(zip(places, genome.tolist(), strict=True))
            order = {name: shares[name] * len(place) / (place + 0.5) for name, place in places.items()}
            return self._selection(network, order, level)

        def loss(genome: Tensor) -> float:
            keep = kept(genome)
            widths = tuple(int(mask.sum()) for mask in keep.values())
            if widths not in losses:
                with switched_off(network.graph, network.tensors, keep):
                    losses[widths] = network.probe.loss(batches)
            return losses[widths]

        equal = torch.ones(len(places))
        starts = [torch.stack([alone[name].float().mean() for name in places]), equal]
        best = self._search.minimise(loss, starts, _LEAST * equal, equal, self.generator("search")).point
        seconds = float(network.average(torch.tensor(time.perf_counter() - start)))
        self.learnt["search"] = {"evaluations": len(losses), "seconds": seconds}
        return kept(best)

    @override
    def notes(self, network: Network) -> list[str]:
        if "search" not in self.learnt:
            return []
        evaluations, seconds = self.learnt["search"]["evaluations"], self.learnt["search"]["seconds"]
        return [f"the search looked at the loss of {evaluations} networks, which took {seconds:.1f} seconds"]

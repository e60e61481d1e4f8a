"""Pruning that keeps the large weights, and of the small ones those that an optimizer picks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Union

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.buckets import SmallWeights
from lightning_prune.callbacks.base import EarlyStoppingChoice
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.trial_masks import TrialMasks
from lightning_prune.callbacks.weights import WeightPruning
from lightning_prune.errors import ConfigurationError
from lightning_prune.reinit import Reinit, ReinitName
from lightning_prune.schedules import Schedule, ScheduleName
from lightning_prune.search import Search, SearchName, search_from
from lightning_prune.weight_budget import Scope


class SmallWeightSearch(WeightPruning):
    """Keeps the largest weights, and instead of the rest small ones that an optimizer picks."""

    provenance = "reconstruction"

    def __init__(
        self,
        remove: float = 0.9,
        small_fraction: float = 0.3,
        optimizer: Union[SearchName, Search] = "genetic",  # noqa: UP007
        batches: int = 16,
        sweeps: int = 10,
        schedule: Union[ScheduleName, Schedule] = "one_shot",  # noqa: UP007
        scope: Scope = "global",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        floor: Union[int, float] = 0.001,  # noqa: UP007
        reinit: Union[ReinitName, Reinit] = "keep",  # noqa: UP007
        shrink: Literal["end", "never"] = "end",
        verify: bool = True,
        recalibrate: int = 0,
        seed: int = 0,
        directory: str | None = None,
        early_stopping: EarlyStoppingChoice = "keep",
    ) -> None:
        super().__init__(
            "magnitude", remove, schedule, scope, include, exclude, floor, None, reinit, shrink, verify, recalibrate,
            seed, directory, early_stopping,
        )  # fmt: skip
        if not 0 <= small_fraction <= 1 or batches < 1 or sweeps < 0:
            raise ConfigurationError(
                f"small_fraction must lie in [0, 1], batches be at least 1 and sweeps at least 0, but they are "
                f"{small_fraction}, {batches} and {sweeps}."
            )
        self.small_fraction = small_fraction
        self.optimizer = optimizer
        self.batches = batches
        self.sweeps = sweeps
        self._search = search_from(optimizer)

    @override
    def carry_out(self, network: Network, level: float) -> None:
        sizes = {name: weight.abs().double() for name, weight in self._weights(network).items()}
        masks = network.weights.keep
        alive = {name: masks.get(name, torch.ones(size.shape, dtype=torch.bool)) for name, size in sizes.items()}
        trial = TrialMasks(network, self.batches)
        largest = self._select(network, sizes, level)
        sets = SmallWeights(sizes, trial.gains(largest), largest, alive, self.small_fraction)
        top = max(float(size.max()) for size in sizes.values()) or 1.0

        def allowed(chosen: dict[str, Tensor]) -> dict[str, Tensor]:
            """The set itself, or where floors or the scope forbid it, the nearest one that they allow."""
            return self._select(network, {n: size / top + 2 * chosen[n].to(size) for n, size in sizes.items()}, level)

        found = self._search.minimise(
            lambda point: trial.loss(allowed(sets.chosen(point))),
            sets.starts, sets.lower, sets.upper, self.generator("search"),
        )  # fmt: skip
        best, loss, most = allowed(sets.chosen(found.point)), found.value, max(1, sets.size // 200)
        for _ in range(self.sweeps):
            swapped = sets.swapped(best, trial.gains(best), most)
            if swapped is None:
                break
            swapped = allowed(swapped)
            changed = trial.loss(swapped)
            if changed < loss:
                best, loss = swapped, changed
            else:
                most = max(1, most // 2)
        network.weights.set(network.broadcast(best), network.tensors)
        network.hold_masks()

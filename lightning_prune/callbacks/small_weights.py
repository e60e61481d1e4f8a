"""Pruning that keeps the large weights, and of the small ones those that an optimizer picks."""

from __future__ import annotations

from typing import Literal, Union

from torch import Tensor
from typing_extensions import override

from lightning_prune.buckets import SmallWeights
from lightning_prune.callbacks.monitors import Monitors
from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.trial_masks import TrialMasks
from lightning_prune.callbacks.weights import WeightPruning
from lightning_prune.errors import ConfigurationError
from lightning_prune.reinit import Reinit, ReinitName
from lightning_prune.schedules import Schedule, ScheduleName
from lightning_prune.search import Search, SearchName, search_from
from lightning_prune.weight_budget import Scope


class SmallWeightSearch(WeightPruning):
    """Keeps the largest weights, and beside them small ones that an optimizer picks, after Y. Chung (thesis, 2021).

    Each round starts from the weights of largest magnitude. The smallest of them may be exchanged for others: an
    optimizer tries how many, from which tensors, of which magnitudes and of which estimated gain, and looks at the loss
    of the network on a fixed set of batches each time; sweeps of single exchanges follow. As many weights stay as by
    magnitude pruning, and the loss on these batches is never higher. It takes ``batches`` forwards for each of
    ``population * (generations + 1)`` trials, and up to three times that for each sweep, at each round.

    ``examples/results/small_weights.md`` compares it with magnitude on two small nets: it gains most right after the
    cut and where hardly any weights are left, and hundredths of a point where fine-tuning makes up for the choice.

    Only an abstract of the thesis could be read: the buckets, the estimate, the optimizers and the sweeps are ours.

    Args:
        remove: As for :class:`~lightning_prune.WeightPruning`.
        small_fraction: Largest share of the kept weights that are exchanged, in [0, 1].
        optimizer: ``"genetic"``, ``"particle_swarm"``, ``"annealing"``, ``"cross_entropy"``, or a
            :class:`~lightning_prune.Search`; None for the sweeps alone.
        batches: Number of batches to look at the loss of.
        sweeps: Exchanges to try afterwards.
        schedule: As for :class:`~lightning_prune.WeightPruning`; several rounds make a ladder of sparsities.
        scope, include, exclude, floor, reinit, shrink, verify, recalibrate, seed, directory, monitors: As for
            :class:`~lightning_prune.WeightPruning`.

    Raises:
        ConfigurationError: If an argument is wrong, or can have no effect in this fit.
        BudgetError: If the budget is out of reach on this network.
        PruneError: If the training step gives no loss, or gradients are not finite.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[SmallWeightSearch(remove=0.95)], logger=False)
    """

    provenance = "reconstruction"

    def __init__(
        self,
        remove: float = 0.9, small_fraction: float = 0.3,
        optimizer: Union[SearchName, Search, None] = "genetic", batches: int = 16, sweeps: int = 20,  # noqa: UP007
        schedule: Union[ScheduleName, Schedule] = "one_shot",  # noqa: UP007
        scope: Scope = "global", include: Patterns | None = None, exclude: Patterns | None = None,
        floor: Union[int, float] = 0.001, reinit: Union[ReinitName, Reinit] = "keep",  # noqa: UP007
        shrink: Literal["end", "never"] = "end", verify: bool = True, recalibrate: int = 0, seed: int = 0,
        directory: str | None = None, monitors: Monitors = "keep",
    ) -> None:  # fmt: skip
        super().__init__(
            "magnitude", remove, schedule, scope, include, exclude, floor, None, reinit, shrink, verify, recalibrate,
            seed, directory, monitors,
        )  # fmt: skip
        if not 0 <= small_fraction <= 1:
            raise ConfigurationError(f"small_fraction must lie in [0, 1], but is {small_fraction}.")
        if batches < 1 or sweeps < 0:
            raise ConfigurationError(f"At least 1 batch and 0 sweeps are needed, but they are {batches} and {sweeps}.")
        self.small_fraction, self.optimizer, self.batches, self.sweeps = small_fraction, optimizer, batches, sweeps
        self._search = None if optimizer is None else search_from(optimizer)

    @override
    def carry_out(self, network: Network, level: float) -> None:
        sizes = {name: weight.abs().cpu().double() for name, weight in self._weights(network).items()}
        scale = max(float(size.max()) for size in sizes.values()) or 1.0

        def allowed(chosen: dict[str, Tensor]) -> dict[str, Tensor]:
            """The set itself, or the nearest one where floors or the scope forbid it."""
            scores = {name: size / scale + 2 * chosen[name].to(size) for name, size in sizes.items()}
            return self._select(network, scores, level)

        largest, trial = self._select(network, sizes, level), TrialMasks(network, self.batches)
        sets = SmallWeights(sizes, trial.gains(largest), largest, network.weights.keep, self.small_fraction)
        picked = largest
        if self._search is not None:
            loss, draw = lambda point: trial.loss(allowed(sets.chosen(point))), self.generator("search")
            found = self._search.minimise(loss, sets.starts, sets.lower, sets.upper, draw)
            picked = allowed(sets.chosen(found.point))
        picked = sets.refined(picked, self.sweeps, trial.gains, trial.loss, allowed)
        network.weights.set(network.broadcast(picked), network.tensors)
        network.hold_masks()

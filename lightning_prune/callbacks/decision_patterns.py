"""Pruning by the decision patterns of neurons."""

from __future__ import annotations

from dataclasses import replace
from typing import Union

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_prune.budget import Scope
from lightning_prune.callbacks.base import Shrink
from lightning_prune.callbacks.channels import Measure
from lightning_prune.callbacks.monitors import Monitors
from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.width_record import WidthSearch
from lightning_prune.callbacks.width_search import WidthSearching, budget_for, schedule_for
from lightning_prune.patterns import PatternError, PatternMining, evidence_of, signatures_of
from lightning_prune.reinit import Reinit, ReinitName
from lightning_prune.schedules import Schedule, ScheduleName


class DecisionPatternPruning(WidthSearching):
    """Removes units that no pattern of units being on or off needs to imply a prediction, then starts the rest anew.

    Training data show which units are on (above zero where a parameter reads them) when a class is predicted. Decision
    trees over these signatures give patterns that imply a class. Dead units go first, then duplicates of others, those
    in no pattern, and then the rest; of each kind the least significant. A search finds how many can go. After
    ``reinit="random"`` it matters only how many units are left, not which.

    Patterns are those of Gopinath, Converse, Pasareanu & Taly, "Property Inference for Deep Neural Networks" (2019).
    Pruning by them and the search are after an unpublished work of which only the abstract was at hand: significance,
    kinds of units, their order, all thresholds and the search are ours, and that what is predicted counts, be it right
    or wrong. Units that are always on are not folded into a bias: their values vary, so that would not be exact.

    Args:
        remove: Fraction to remove in all, in [0, 1); default one half, or with a search what that finds.
        of: As for :class:`~lightning_prune.ChannelPruning`, by default the channels.
        search: A :class:`~lightning_prune.WidthSearch` for the number of units, which sets rounds and budget itself.
        schedule: When rounds are due, without a search.
        reinit: What becomes of the weights after each round: drawn anew, or as for ChannelPruning.
        mining: How patterns are looked for, a :class:`~lightning_prune.PatternMining`; default: that with its defaults.
        unpruned_ok: Whether a round that finds no patterns is left out with a warning; it is an error otherwise.
        scope: This and all others: as for :class:`~lightning_prune.ChannelPruning`.
        include, exclude: Channels that may go, and channels that stay.
        round_to: Widths become multiples of this.
        min_channels: Fewest channels of a group.
        shrink: When channels are removed physically.
        verify: Whether each shrink is checked.
        seed: Seed of the reinitialisation.
        directory: Where checkpoint, report and ``width_search.csv`` go.
        monitors: What ``EarlyStopping`` and ``ModelCheckpoint`` do about a round.

    Raises:
        ConfigurationError: If an argument is wrong, or the network gives no class scores.
        PruneError: In a round that finds no pattern, nothing that is ever off, or too few samples.
        BudgetError: If the budget is out of reach on this network.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[DecisionPatternPruning(remove=0.5)], logger=False)
    """

    provenance = "reconstruction"
    _skipped = False

    def __init__(
        self, remove: float | None = None, of: Measure = "channels", search: WidthSearch | None = None,
        schedule: Union[ScheduleName, Schedule] = "one_shot",  # noqa: UP007
        reinit: Union[ReinitName, Reinit] = "random",  # noqa: UP007
        mining: PatternMining | None = None, unpruned_ok: bool = False, scope: Scope = "group",
        include: Patterns | None = None, exclude: Patterns | None = None, round_to: int = 1,
        min_channels: Union[int, float] = 1, shrink: Shrink = "rounds", verify: bool = True,  # noqa: UP007
        seed: int = 0, directory: str | None = None, monitors: Monitors = "keep",
    ) -> None:  # fmt: skip
        super().__init__(
            "random", budget_for(remove, search), of, schedule_for(schedule, search), scope, include, exclude, None,
            round_to, min_channels, reinit, shrink, verify=verify, seed=seed, directory=directory,
            monitors=monitors,
        )  # fmt: skip
        self.search, self.mining, self.unpruned_ok = search, mining, unpruned_ok
        self._mining = mining or PatternMining()

    @override
    def prepare(self, network: Network) -> None:
        super().prepare(network)
        first = replace(self._mining, samples=1, min_samples=1)  # what cannot be looked at is better known at once
        signatures_of(network.graph, network.probe.evaluations, self._eligible(network), first)

    @override
    def select(self, network: Network, level: float) -> dict[str, Tensor]:
        try:
            keep, self._skipped = super().select(network, level), False
        except PatternError as problem:
            if not self.unpruned_ok:
                raise
            rank_zero_warn(f"{problem} This round removes nothing.")
            keep, self._skipped = {}, True
        return keep

    @override
    def scores(self, network: Network) -> dict[str, Tensor]:
        found = signatures_of(network.graph, network.probe.evaluations, self._eligible(network), self._mining)
        self._mining.check(float(network.average(torch.tensor(float(len(found.predictions))))))
        scores = {}
        for name, on in found.units.items():
            seen = on & network.masks.keep[name]  # what is masked is still computed, but nothing sees it
            evidence = evidence_of(seen, found.predictions, self._mining).averaged(network.average)
            evidence.check(name)
            scores[name] = evidence.scores()
            self.learnt.setdefault("statuses", {})[name] = evidence.counts()
        return scores

    @override
    def _reinitialise(self, network: Network) -> None:
        if not self._skipped:
            super()._reinitialise(network)

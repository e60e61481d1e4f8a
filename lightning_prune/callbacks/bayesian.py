"""Iterative channel pruning that remembers the evidence of earlier rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Union

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from typing_extensions import override

from lightning_prune.bayes import Beta, Readers, evidence_of, hand_over, observe, put_back, ranking, share_gone
from lightning_prune.budget import Scope
from lightning_prune.callbacks.base import Shrink
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.phases import PhasedPruning
from lightning_prune.callbacks.support import shadows
from lightning_prune.criteria import normalise
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.tracer import named_leaves
from lightning_prune.schedules import Linear, Position, Schedule


class BayesianPruning(PhasedPruning):
    """Prunes in many small rounds, each of which knows what the earlier ones saw (after Lu et al., ACM MM 2022).

    The evidence for a channel is how far the laws of what its readers compute would move without it. Each round draws
    some of the batches with replacement, several times, and notes which channels would go by each draw. These notes
    feed a Beta posterior per channel; the likeliest to go do, up to the budget, and those on which draws or rounds
    disagree are put off. Before a channel goes, the channels that stay take over what they can predict of it.

    Only the abstract of "Bayesian based Re-parameterization for DNN Model Pruning" was read. Ours are the normal laws,
    the draws, the discounted posteriors, the forecast and the ridge regression. Weights that the survivors take over
    keep their state in the optimizer. A group that nothing reads with a parameter has its L2 norms for evidence, with
    the mean evidence of the other groups. Weights that are cast or worked out before they read, as under autocast or
    weight norm, are not re-parameterised. Each round looks at the network in evaluation mode.

    Args:
        remove: Fraction to remove in all.
        of: What it is a fraction of; not latency, which is too slow to measure for every draw.
        rounds: Number of equal rounds in the first 60 % of the fit; no more than it has epochs.
        schedule: Rounds at positions of your own, in place of ``rounds``.
        draws: How many times batches are drawn in a round.
        batches: Number of batches that a round looks at, at least 2.
        memory: What is left of a posterior after a round, in [0, 1]; 0 is pruning without memory.
        weight: How many observations a round counts as.
        reparameterise: Whether what goes is handed over to what stays.
        ridge: Strength of the regression that does it, relative to the mean variance of the channels.
        scope: This and all others: as for :class:`~lightning_prune.ChannelPruning`.
        include: Channels that may go.
        exclude: Channels that stay.
        ratios: Fixed fractions by pattern.
        round_to: Widths become multiples of this.
        min_channels: Fewest channels of a group.
        shrink: When channels are removed physically.
        recalibrate: Batches to re-estimate batch-norm statistics on after each round.
        seed: Seed of the draws.
        directory: Where the checkpoint and the report are written.

    Raises:
        ConfigurationError: If an argument is wrong, or there are more rounds than the fit has room for.
        BudgetError: If the budget is out of reach on this network.
        TraceError: If the training step cannot be followed in evaluation mode.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[BayesianPruning(remove=0.5)], logger=False)
    """

    provenance = "reconstruction"

    def __init__(
        self,
        remove: float = 0.5,
        of: Literal["channels", "params", "macs"] = "macs",
        rounds: int = 10,
        schedule: Schedule | None = None,
        draws: int = 16,
        batches: int = 8,
        memory: float = 0.8,
        weight: float = 4.0,
        reparameterise: bool = True,
        ridge: float = 1e-3,
        scope: Scope = "global",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        ratios: Mapping[str, float] | None = None,
        round_to: int = 1,
        min_channels: Union[int, float] = 1,  # noqa: UP007
        shrink: Shrink = "rounds",
        recalibrate: int = 8,
        seed: int = 0,
        directory: str | None = None,
    ) -> None:
        for name, value, least in (("rounds", rounds, 1), ("draws", draws, 1), ("batches", batches, 2)):
            if value < least:
                raise ConfigurationError(f"{name} must be at least {least}, but is {value}.")
        if not (0 <= memory <= 1 and weight > 0 and ridge >= 0):
            raise ConfigurationError(
                f"memory must lie in [0, 1], weight above 0 and ridge not below 0, but they are {memory}, {weight} and "
                f"{ridge}."
            )
        if of == "latency":
            raise ConfigurationError("latency is too slow to measure for every draw. Use of='macs'.")
        part = 0.6 / rounds
        super().__init__(
            "l2", remove, of, schedule or Linear(part, 0.6, part), scope, include, exclude, ratios, round_to,
            min_channels, shrink=shrink, recalibrate=recalibrate, seed=seed, directory=directory,
        )  # fmt: skip
        self.schedule = schedule
        self.rounds, self.draws, self.batches, self.memory, self.weight = rounds, draws, batches, memory, weight
        self.reparameterise, self.ridge = reparameterise, ridge
        self._readers: Readers = {}
        self._before: list[tuple[Tensor, Tensor]] = []

    @property
    def predictions(self) -> list[dict[str, dict[str, Tensor]]]:
        """For each round by group: what the round before predicted for the units left by then, and which were pruned.

        The first round has none.
        """
        found: list[dict[str, dict[str, Tensor]]] = self.learnt.setdefault("predictions", [])
        return found

    @override
    def check_phases(self, last: Position) -> None:
        rounds, schedule = len(self._schedule.rounds()), self._schedule
        if self.schedule is None and rounds > last.epoch / schedule.end:
            raise ConfigurationError(
                f"{rounds} rounds are more than the {last.epoch / schedule.end:g} epochs of this fit. Train longer, "
                f"have fewer rounds, or give a schedule of your own."
            )
        if rounds > 1 and schedule.interval * last.step < schedule.end:
            raise ConfigurationError(
                f"{schedule} has several rounds in the same of the {last.step:g} optimizer steps up to its end: have "
                f"fewer."
            )

    @override
    def prepare(self, network: Network) -> None:
        super().prepare(network)
        observe(network.graph, network.probe.evaluations(1), network.tensors)  # else it would fail amid the fit

    @override
    def carry_out(self, network: Network, level: float) -> None:
        programs = network.probe.evaluations(self.batches)
        self._readers = observe(network.graph, programs, network.tensors)
        for reader in self._readers.values():
            reader.share(network.average)
        self._count = len(programs)
        forecast, alive = dict(self.per_unit.get("forecast", {})), dict(network.masks.keep)
        try:
            super().carry_out(network, level)
        except BaseException:
            put_back(self._before)
            raise
        self._readers, self._before = {}, []
        came = {name: alive[name] for name in self._chosen if name in forecast}
        self.predictions.append(
            {n: {"predicted": forecast[n][left], "pruned": ~self._chosen[n][left]} for n, left in came.items()}
        )

    @override
    def select(self, network: Network, level: float) -> dict[str, Tensor]:
        if self.learnt.get("heard") != len(self._record["rounds"]):
            self._learn(network, level)
            self.learnt["heard"] = len(self._record["rounds"])
        names = self._eligible(network)
        likely = {name: Beta(self.per_unit["a"][name], self.per_unit["b"][name]).mean for name in names}
        return self._selection(network, ranking(likely, self.per_unit["evidence"]), level)

    def _learn(self, network: Network, level: float) -> None:
        """Take the tentative decisions of this round into the posteriors, and forecast the next round from them."""
        schedule = self._schedule
        levels = sorted({schedule.level(Position(p, p, p), self.remove) for p in schedule.rounds()} | {level})
        ahead = next((later for later in levels if later > level), level)
        picks = torch.randint(self._count, (self.draws, self._count), generator=self.generator("draws"))
        evidence = [self._evidence(network, draw) for draw in one_hot(picks, self._count).sum(1)]
        now, later = (share_gone([self._selection(network, one, at) for one in evidence]) for at in (level, ahead))
        for name, share in now.items():
            before = Beta(*(self.per_unit.setdefault(key, {}).get(name, torch.ones(len(share))) for key in "ab"))
            self.per_unit["a"][name], self.per_unit["b"][name] = before.updated(share, self.memory, self.weight)
            expected = Beta(self.per_unit["a"][name], self.per_unit["b"][name])
            forecast = expected.updated(later[name], self.memory, self.weight).mean
            self.per_unit.setdefault("forecast", {})[name] = forecast
        self.per_unit["evidence"] = self._evidence(network, torch.ones(self._count))

    def _evidence(self, network: Network, draw: Tensor) -> dict[str, Tensor]:
        """What speaks for each unit that may go, from some of the batches."""
        names = self._eligible(network)
        found = evidence_of(self._readers, network.tensors, names, draw)
        if unread := [name for name in names if name not in found]:
            typical = torch.cat(list(found.values())).mean() if found else torch.ones(())
            norms = self._scores(network)
            found |= {name: normalise(norms[name], network.masks.keep[name]).cpu() * typical for name in unread}
        return found

    @override
    def _selected(self, network: Network, level: float, otherwise: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        put_back(self._before)  # what was chosen before could not be carried out
        keep = self._chosen = super()._selected(network, level, otherwise)
        if self.reparameterise:
            copies = [network.tensors, *map(named_leaves, shadows(network.module))]
            self._before = hand_over(copies, self._readers, keep, network.masks.keep, self.ridge)
        return keep

"""Iterative channel pruning that remembers the evidence of earlier rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Union

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from typing_extensions import override

from lightning_prune.bayes import Beta, ranking, share_gone
from lightning_prune.budget import Scope
from lightning_prune.callbacks.base import Shrink
from lightning_prune.callbacks.monitors import Monitors
from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.soft_exit import SoftExit
from lightning_prune.choices import check_at_least, check_switches, unknown_name
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.analysis import Norms
from lightning_prune.schedules import Linear, Position, Schedule


class BayesianPruning(SoftExit):
    """Prunes in many small rounds, each of which knows what the earlier ones saw (after Lu et al., ACM MM 2022).

    The evidence for a channel is how far the laws of what its readers compute would move without it, after the
    channels that stay have taken over what they can predict of it, relative to the mean over its group. Each round
    draws some of the batches with replacement, several times, and notes which channels would go by each draw at the
    budgets of the rounds to come. These notes feed a Beta posterior per channel; the likeliest to go do, up to the
    budget, and those on which draws or rounds disagree are put off.

    Only the abstract of "Bayesian based Re-parameterization for DNN Model Pruning" was read. Ours are the normal laws,
    the draws, the budgets they look ahead to, the discounted posteriors, the fading and the ridge regression. Weights
    that take something over keep their state in the optimizer. A group that nothing reads with a parameter has its L2
    norms for evidence. Weights that are worked out before they read, as under weight norm, take nothing over. Each
    round looks at the network in evaluation mode.

    Args:
        remove: Fraction to remove in all.
        of: What it is a fraction of; latency is too slow to measure for each draw.
        rounds: Number of equal rounds in the first 60 % of the fit; no more than it has epochs.
        schedule: Rounds at positions of your own, in place of ``rounds``.
        draws: How many times batches are drawn in a round.
        batches: Number of batches that a round looks at, at least 2.
        memory: What is left of a posterior after a round, in [0, 1]; 0 is pruning without memory.
        weight: How many observations a round counts as.
        reparameterise: Whether what goes is handed over to what stays.
        soft: Whether, in the second half of the time between two rounds, what will probably go fades out.
        ridge: Strength of the regression that does it, relative to the mean variance of the channels.
        scope: This and all others: as for :class:`~lightning_prune.ChannelPruning`.
        include: Channels that may go.
        exclude: Channels that stay.
        ratios: Fixed fractions by pattern.
        round_to: Widths become multiples of this.
        min_channels: Fewest channels of a group.
        shrink: When channels are removed physically.
        norms, inner: What else may go of transformers.
        recalibrate: Batches to re-estimate batch-norm statistics on after each round.
        seed: Seed of the draws.
        directory: Where the checkpoint and the report are written.
        monitors: What ``EarlyStopping`` and ``ModelCheckpoint`` do about a round.

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
        soft: bool = True,
        scope: Scope = "global",
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        ratios: Mapping[str, float] | None = None,
        round_to: int = 1,
        min_channels: Union[int, float] = 1,  # noqa: UP007
        shrink: Shrink = "rounds",
        norms: Norms = "exact",
        inner: Patterns | None = None,
        recalibrate: int = 8,
        seed: int = 0,
        directory: str | None = None,
        monitors: Monitors = "keep",
    ) -> None:
        check_at_least(1, whole=True, rounds=rounds, draws=draws)
        check_at_least(2, whole=True, batches=batches)
        check_switches(reparameterise=reparameterise, soft=soft)
        if not (0 <= memory <= 1 and weight > 0 and ridge >= 0):
            raise ConfigurationError(
                f"memory must lie in [0, 1], weight above 0 and ridge not below 0, but they are {memory}, {weight} and "
                f"{ridge}."
            )
        if of not in ("channels", "params", "macs"):
            raise unknown_name("measure", of, ["channels", "params", "macs"])
        part = 0.6 / rounds
        super().__init__(
            "l2", remove, of, schedule or Linear(part, 0.6, part), scope, include, exclude, ratios, round_to,
            min_channels, shrink=shrink, norms=norms, inner=inner, recalibrate=recalibrate, seed=seed,
            directory=directory, monitors=monitors,
        )  # fmt: skip
        self._equal = schedule is None
        self.rounds, self.draws, self.batches, self.memory, self.weight = rounds, draws, batches, memory, weight
        self.reparameterise, self.ridge, self.soft = reparameterise, ridge, soft

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
        if self._equal and rounds > last.epoch / schedule.end:
            raise ConfigurationError(
                f"{rounds} rounds are more than the {last.epoch / schedule.end:g} epochs of this fit. Train longer, "
                f"have fewer rounds, or give a schedule of your own."
            )
        if rounds > 1 and schedule.interval * last.step < schedule.end:
            raise ConfigurationError(
                f"{schedule} has several rounds in the same of the {last.step:g} optimizer steps up to its end: have "
                f"fewer."
            )

    @property
    @override
    def fades(self) -> bool:
        return self.soft

    @override
    def gates(self, position: Position) -> Mapping[str, Tensor]:
        rounds, now = self._schedule.rounds(), position.along(self._schedule.unit)
        done = sum(due <= now + 1e-6 * self._schedule.interval for due in rounds)
        if done in (0, len(rounds)):
            return {}
        closing = 2 * (now - rounds[done - 1]) / (rounds[done] - rounds[done - 1]) - 1
        likely = {name: p * (p > 0.5) for name, p in self.per_unit.get("forecast", {}).items()}
        return {name: 1 - closing * p for name, p in likely.items() if closing > 0 and bool(p.any())}

    @override
    def carry_out(self, network: Network, level: float) -> None:
        forecast, alive = dict(self.per_unit.get("forecast", {})), dict(network.masks.keep)
        super().carry_out(network, level)
        came = {name: (alive[name], keep) for name, keep in self.chosen.items() if name in forecast}
        self.predictions.append(
            {n: {"predicted": forecast[n][left], "pruned": ~keep[left]} for n, (left, keep) in came.items()}
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
        """Take what would go by the draws, at the budgets of the rounds to come, into the posteriors."""
        schedule = self._schedule
        levels = {schedule.level(Position(p, p, p), self.remove) for p in schedule.rounds()}
        ahead = sorted(later for later in levels if later > level) or [level]
        picks = torch.randint(self.looked_at, (self.draws, self.looked_at), generator=self.generator("draws"))
        evidence = [self.evidence(network, draw) for draw in one_hot(picks, self.looked_at).sum(1)]
        gone = share_gone([self._selection(network, one, at) for one in evidence for at in ahead])
        for name, share in gone.items():
            before = Beta(*(self.per_unit.setdefault(key, {}).get(name, torch.ones(len(share))) for key in "ab"))
            law = before.updated(share, self.memory, self.weight)
            self.per_unit["a"][name], self.per_unit["b"][name] = law
            self.per_unit.setdefault("forecast", {})[name] = law.mean
        self.per_unit["evidence"] = self.evidence(network, torch.ones(self.looked_at))

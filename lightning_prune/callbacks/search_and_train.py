"""Search for a subnet and training of it in one fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning import Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.callbacks.base import Shrink
from lightning_prune.callbacks.monitors import Monitors
from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.subnet_methods import SubnetPruning
from lightning_prune.callbacks.subnets import SubnetTraining
from lightning_prune.choices import check_at_least, unknown_name
from lightning_prune.errors import ConfigurationError
from lightning_prune.gated_training import moved_by, refuse_repeated_losses
from lightning_prune.graph.analysis import Norms
from lightning_prune.schedules import OneShot, Position, Unit
from lightning_prune.subnet_search import THRESHOLDS, SubnetSearch
from lightning_prune.threshold_net import relative


class SearchAndTrain(SubnetPruning):
    """Finds a subnet while it trains the network from scratch, in one fit (Lu et al., 2020 and 2023).

    After a coarse training of the whole network, subnets are drawn again and again: each channel has an importance,
    and of each group the most important ones stay that together have a share of the mass which a small network draws
    from the importances; all shares are scaled so that the subnet meets the budget. The losses of the candidates of a
    time teach the small network (REINFORCE), and the best of them is trained if it beats the present subnet on the
    same batches. Some optimizer steps move the importances, and with them factors of the channels, the others the
    weights of the subnet; what it leaves out keeps its values. Once all candidates are nearly the present subnet, or
    time is up, the rest is removed, and the subnet trains on.

    Only an abstract of the later work could be read. Ours are: that subnets meet the budget, where theirs pay for
    their cost, and that of several only one is trained, if it is better, where theirs trains each; importances that
    begin in the order of the norms after the coarse training (theirs are drawn), factors that begin at 1 and follow
    what a channel's mass gains against the mean of the subnet, Adam for the importances, all training by the module's
    own optimizer and schedule without restarts, and of ``robust`` the whole: who teaches, when, and with what weights.

    Args:
        remove, of, include, exclude, round_to, min_channels, shrink, norms, inner, verify, recalibrate, seed,
            directory, monitors: As for :class:`~lightning_prune.ChannelPruning`.
        coarse, at, unit: When the search begins, when it ends and channels go, and in what: ``"fraction"`` of the fit,
            ``"epoch"`` or ``"step"``.
        iterations: How many times subnets are drawn in this time; default: 5, or as many as there are steps for.
        candidates, batches: How many are drawn each time, at least 2; how many batches their losses are measured on.
        alpha_every: Every how many-th optimizer step moves the importances instead of weights.
        variance: How much it counts, against the loss, that they lie apart.
        thresholds: Shares of the mass to draw from, each in (0, 1], of which only ratios count; default: 0.5 to 1.
        alpha_lr, threshold_lr: Learning rates of the importances and of the small network.
        noise: Size of the Gumbel noise on the importances that subnets are drawn by, in the first half of the search.
        robust: Whether subnets learn half from teachers, each the more for a sample the less it errs on it: the moving
            average (0.999, less at first) of the coarse network, the subnet with the best reward so far, and
            ``teachers``. For class scores; costs a run of each teacher in each step, and two more networks in memory.
        teachers: Paths of checkpoints of further teachers, pruned or not.
        output_of, labels: As for :class:`~lightning_prune.Distillation`.

    Raises:
        ConfigurationError: If an argument is wrong, or the phases do not fit into the fit.
        BudgetError: If the budget is below what the smallest subnet costs.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[SearchAndTrain(remove=0.5)], logger=False)
    """

    provenance = "reconstruction"

    def __init__(
        self, remove: float = 0.5, of: Literal["channels", "params", "macs"] = "macs", coarse: float = 0.1,
        at: float = 0.15, unit: Unit = "fraction", iterations: int | None = None, alpha_every: int = 5,
        alpha_lr: float = 0.005, variance: float = 0.1, thresholds: Sequence[float] | None = None,
        threshold_lr: float = 0.01, candidates: int = 8, noise: float = 0.05, batches: int = 16,
        include: Patterns | None = None, exclude: Patterns | None = None, round_to: int = 1,
        min_channels: int | float = 1, shrink: Shrink = "rounds", norms: Norms = "exact",
        inner: Patterns | None = None, verify: bool = True, recalibrate: int = 0, seed: int = 0,
        directory: str | None = None, robust: bool = False, teachers: Sequence[str] | None = None,
        output_of: str | None = None, labels: str | int | None = None, monitors: Monitors = "keep",
    ) -> None:  # fmt: skip
        super().__init__(
            "l2", remove, of, OneShot(at, unit), "global", include, exclude, None, round_to, min_channels, "keep",
            shrink, norms, inner, verify, recalibrate, seed, directory, monitors,
        )  # fmt: skip
        if of not in ("channels", "params", "macs"):
            raise unknown_name("measure of SearchAndTrain", of, ["channels", "params", "macs"])
        if not 0 <= coarse < at:
            raise ConfigurationError(f"the search must begin before it ends, but it is from {coarse} to {at}.")
        check_at_least(1, whole=True, optional=True, iterations=iterations, batches=batches)
        check_at_least(2, whole=True, alpha_every=alpha_every, candidates=candidates)
        if not min(alpha_lr, threshold_lr) > 0:
            raise ConfigurationError(f"learning rates must be above 0, but are {alpha_lr} and {threshold_lr}.")
        if thresholds is not None and not (thresholds and all(0 < share <= 1 for share in thresholds)):
            raise ConfigurationError(f"thresholds must be shares in (0, 1], but are {list(thresholds)}.")
        if teachers and not robust:
            raise ConfigurationError("teachers are asked only with robust=True: set it, or leave them out.")
        self.coarse, self.at, self.unit, self.iterations, self.batches = coarse, at, unit, iterations, batches
        self.alpha_every, self.alpha_lr, self.variance, self.noise = alpha_every, alpha_lr, variance, noise
        self.thresholds, self.threshold_lr, self.candidates = thresholds, threshold_lr, candidates
        self.robust, self.teachers, self.output_of, self.labels = robust, teachers, output_of, labels

    @override
    def check_phases(self, last: Position) -> None:
        super().check_phases(last)
        steps = last.step * (1 - self.coarse / self.at)
        self._times = self.iterations or max(int(min(steps / self.alpha_every, 5)), 1)
        if steps < self._times * self.alpha_every:
            raise ConfigurationError(
                f"{self._times} subnets of {self.alpha_every} or more optimizer steps each do not fit into the "
                f"{steps:g} steps of the search. Train longer, have fewer iterations, or a lower alpha_every."
            )

    @override
    def prepare(self, network: Network) -> None:
        super().prepare(network)
        groups = self.groups(network)
        self.per_unit["start"] = {name: torch.zeros(group.width) for name, group in groups.items()}
        self.per_unit["alpha"] = {name: torch.zeros(group.width) for name, group in groups.items()}
        self.per_unit["keep"] = {}
        state = {"thresholds": self.thresholds or THRESHOLDS}
        self.learnt.update(search=state, count=0, step=-1, iteration=-1, settled=False)

    @override
    def resume(self, network: Network) -> None:
        refuse_repeated_losses(network.optimizers, type(self).__name__)
        if self.under_way(network):
            state, rates = self.learnt["search"], (self.alpha_lr, self.threshold_lr)
            start, alpha, keep = (self.per_unit[name] for name in ("start", "alpha", "keep"))
            self._search = SubnetSearch(start, alpha, keep, state, *rates, self.variance, self.seed)
            if self.searching:
                self.open(network).enter(self._search.gates())
        super().resume(network)

    @override
    def before_batch(self, network: Network, position: Position) -> None:
        share = (position.along(self.unit) - self.coarse) / (self.at - self.coarse)
        if share < 0 or not self.under_way(network):
            return
        if not self.searching:
            self._search.begin(self.scores(network))
        subnet = self._subnet or self.open(network)
        iteration = min(math.floor(share * self._times + 1e-9), self._times - 1)
        if iteration != self.learnt["iteration"]:
            self.learnt.update(iteration=iteration, settled=self._compete(network, subnet, iteration))
            subnet.enter(self._search.gates())
        if position.step != self.learnt["step"]:  # else gradients of this step are accumulating
            self.learnt.update(step=position.step, count=self.learnt["count"] + 1)

    @override
    def before_step(self, network: Network, optimizer: Optimizer) -> None:
        moved = moved_by(optimizer, network.tensors)
        if self._subnet is not None and self.learnt["count"] % self.alpha_every:
            self._subnet.before_step(moved)
        elif self._subnet is not None:
            self._search.step(self._subnet.slopes(moved))
            self._subnet.enter(self._search.gates())
            optimizer.zero_grad(set_to_none=True)

    @override
    def select(self, network: Network, level: float) -> dict[str, Tensor]:
        return self._selection(network, self._search.present().standings, level)

    @override
    def carry_out(self, network: Network, level: float) -> None:
        if self._subnet is not None:
            chosen = self._selected(network, level, {})
            self._subnet.settle({name: relative(self.per_unit["alpha"][name], k) for name, k in chosen.items()})
            self._subnet = None
            del self.learnt["dense"], self.per_unit["keep"], self.per_unit["start"]
        super().carry_out(network, level)

    @override
    def _round_if_due(self, trainer: Trainer, position: Position) -> bool:
        settled = self._record.get("learnt", {}).get("settled", False)
        return super()._round_if_due(trainer, Position(math.inf, math.inf, 1.0) if settled else position)

    def _compete(self, network: Network, subnet: SubnetTraining, iteration: int) -> bool:
        """See whether another subnet is better than the present one, and whether all of them are nearly it by now."""
        batches, trained = network.probe.batches(self.batches), bool(self._search.keep)
        noise = self.noise if iteration < self._times / 2 else 0.0
        meet, reward = partial(self._selection, network, level=1.0), partial(self._reward, network, subnet, batches)
        draw = self.generator(f"subnet {iteration}")
        present, alike = self._search.compete(self.candidates, noise, meet, reward, draw)
        if trained:
            self.rank_subnet(network, present)
        return trained and alike >= 0.98

    def _reward(
        self, network: Network, subnet: SubnetTraining, batches: Sequence[Any], keep: Mapping[str, Tensor]
    ) -> float:
        """How good a subnet is, which the network holds afterwards."""
        subnet.enter(self._search.gates(keep))
        return -network.probe.loss(batches)

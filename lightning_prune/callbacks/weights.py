"""Pruning of single weights by a criterion."""

from __future__ import annotations

from typing import Literal, Union, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.monitors import Monitors
from lightning_prune.callbacks.naming import Patterns, as_patterns, check_names, chosen_names, maskable_names
from lightning_prune.callbacks.network import Network
from lightning_prune.choices import check_at_least, unknown_name
from lightning_prune.criteria.weights import (
    WatchingCriterion,
    WeightCriterion,
    WeightCriterionName,
    checked_scores,
    weight_criterion_from,
)
from lightning_prune.probe.source import ProbeSource
from lightning_prune.reinit import Reinit, ReinitName
from lightning_prune.schedules import Schedule, ScheduleName
from lightning_prune.weight_budget import Scope, check_pattern, select_weights


class WeightPruning(PruningCallback):
    """Switches the least important weights off while the network trains.

    Weights that are off are zero and stay so through every optimizer step. When training ends, channels of which
    nothing reads anything any more are removed physically; all other zeros stay inside tensors of their old size, so
    this saves nothing on dense hardware, and the report says so. With ``schedule="cubic"`` it is gradual magnitude
    pruning (Zhu & Gupta, 2017), with a few rounds of ``schedule="geometric"`` magnitude pruning with retraining (Han et
    al., 2015).

    Args:
        criterion: What matters: ``"magnitude"``, ``"lamp"`` (Lee et al., 2021), ``"snip"`` (Lee et al., 2019),
            ``"grasp"`` (Wang et al., 2020), ``"synflow"`` (Tanaka et al., 2020), ``"movement"`` (Sanh et al., 2020),
            ``"wanda"`` (Sun et al., 2024), ``"random"``, or a :class:`~lightning_prune.WeightCriterion`.
        remove: Fraction of the weights to switch off in all, in [0, 1).
        schedule: When rounds are due, as for :class:`~lightning_prune.ChannelPruning`.
        scope: Weights compete with all others (``"global"``), with those of their tensor (``"layer"``) or of their
            output (``"row"``), or each tensor keeps the share that an Erdos-Renyi kernel gives it (``"erk"``, Evci et
            al., 2020). Default is that of the criterion: ``"row"`` for ``"wanda"``, ``"global"`` for all others.
        include: Patterns (as in ``fnmatch``) of names of parameters or of their modules whose weights may go; default
            all parameters of two or more dimensions.
        exclude: Patterns of those whose weights stay.
        floor: Least share (or number) of weights that each tensor keeps.
        pattern: ``(n, m)``: of every ``m`` neighbours along the input dimension at most ``n`` stay; of a convolution
            that is among the input channels at each place of the kernel.
        reinit: What becomes of the weights after each round, as for :class:`~lightning_prune.ChannelPruning`.
        shrink: Remove dead channels physically when training ends (``"end"``) or not at all (``"never"``).
        verify: Whether that removal is compared with the masked network, and undone if it differs.
        recalibrate: Number of batches to re-estimate batch-norm statistics on after each round; 0 leaves them.
        seed: Seed of random criteria and reinitialisations.
        directory: Where the final checkpoint and the report are written, as for
            :class:`~lightning_prune.ChannelPruning`.
        monitors: As for :class:`~lightning_prune.ChannelPruning`.

    Raises:
        ConfigurationError: If an argument is wrong, or can have no effect in this fit.
        BudgetError: If the budget is out of reach on this network.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[WeightPruning(remove=0.9)], logger=False)
    """

    def __init__(
        self,
        criterion: Union[WeightCriterionName, WeightCriterion] = "magnitude",  # noqa: UP007
        remove: float = 0.9,
        schedule: Union[ScheduleName, Schedule] = "cubic",  # noqa: UP007
        scope: Scope | None = None,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        floor: Union[int, float] = 0.001,  # noqa: UP007
        pattern: tuple[int, int] | None = None,
        reinit: Union[ReinitName, Reinit] = "keep",  # noqa: UP007
        shrink: Literal["end", "never"] = "end",
        verify: bool = True,
        recalibrate: int = 0,
        seed: int = 0,
        directory: str | None = None,
        monitors: Monitors = "keep",
    ) -> None:
        if shrink not in ("end", "never"):
            raise unknown_name("shrink", shrink, ["end", "never"])
        super().__init__(
            remove, "weights", schedule, reinit, shrink, "exact", verify, recalibrate, seed, directory, None,
            monitors,
        )  # fmt: skip
        if scope is not None and scope not in get_args(Scope):
            raise unknown_name("scope", scope, list(get_args(Scope)))
        check_at_least(0, floor=floor)
        self.criterion = criterion
        self.include = as_patterns("include", include)
        self.exclude = as_patterns("exclude", exclude)
        self.floor = floor
        self.pattern = pattern
        self._criterion = weight_criterion_from(criterion)
        self.scope: Scope = self._criterion.scope if scope is None else scope
        if pattern is not None:
            check_pattern(pattern, remove, final=True)

    @override
    def can_prune(self, network: Network) -> bool:
        return bool(maskable_names(network.module))

    @override
    def prepare(self, network: Network) -> None:
        check_names(maskable_names(network.module), self.include, self.exclude)
        weights = self._weights(network)
        self._record["eligible"] = {name: weight.numel() for name, weight in weights.items()}
        draw = self.generator("rehearsal")
        scores = {name: torch.rand(weight.shape, generator=draw) for name, weight in weights.items()}
        # What chance would empty, the scores may not.
        self._reduced(network, scores, 1 - self.remove, floor=self.floor or 1)

    @override
    def carry_out(self, network: Network, level: float) -> None:
        for kept in self._steps(1 - self.removed(network), 1 - self.remove * level):
            weights = self._weights(network)
            source = ProbeSource(network.probe, weights, network.average, self._watched)
            scores = checked_scores(
                self._criterion, weights, self._criterion.score(weights, source, self.generator("criterion"))
            )
            averaged = {name: network.average(score.to_dense()) for name, score in scores.items()}
            network.weights.set(network.broadcast(self._reduced(network, averaged, kept)), network.tensors)
            network.hold_masks()

    @override
    def resume(self, network: Network) -> None:
        tensors = network.tensors
        if any(seen.shape != tensors[name].shape for name, seen in self._watched.items()):
            self._watched.clear()  # an earlier fit ended with channels being removed
        self._watched.update({name: seen.to(tensors[name].device) for name, seen in self._watched.items()})

    @override
    def before_step(self, network: Network, optimizer: Optimizer) -> None:
        if isinstance(self._criterion, WatchingCriterion):
            moved = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            weights = {name: network.tensors[name] for name in self._eligible(network)}
            weights = {name: weight for name, weight in weights.items() if weight in moved and weight.grad is not None}
            gradients = {name: w.grad.to_dense() for name, w in weights.items() if w.grad is not None}
            self._criterion.watch(weights, gradients, self._watched)

    @property
    @override
    def acts_at_steps(self) -> bool:
        return super().acts_at_steps and (
            type(self) is not WeightPruning or isinstance(self._criterion, WatchingCriterion)
        )

    @override
    def removed(self, network: Network) -> float:
        total = sum(self._record.get("eligible", {}).values())
        return 1 - self._kept(network) / total if total else 0.0

    @override
    def before_the_end(self, network: Network) -> None:
        network.masks.set(network.living_units())

    def _steps(self, start: float, end: float) -> list[float]:
        """Fractions kept after each step of a round; every step keeps the same share of what is left."""
        count = self._criterion.rounds
        return [*(start * (end / start) ** (step / count) for step in range(1, count)), end]

    def _select(self, network: Network, scores: dict[str, Tensor], level: float) -> dict[str, Tensor]:
        """Masks that keep the best, as many as a round keeps that must reach this share of the budget."""
        return self._reduced(network, scores, 1 - self.remove * level)

    def _reduced(
        self, network: Network, scores: dict[str, Tensor], kept: float, floor: float | None = None
    ) -> dict[str, Tensor]:
        # Of the weights that there are; an earlier fit may have removed some of them physically.
        left = kept * sum(self._record["eligible"].values())
        present = sum(score.numel() for score in scores.values())
        return select_weights(
            scores,
            {name: network.weights.keep.get(name, torch.ones_like(s, dtype=torch.bool)) for name, s in scores.items()},
            remove=max(0.0, 1 - left / present),
            scope=self.scope,
            floor=self.floor if floor is None else floor,
            pattern=self.pattern,
            regrow=self._criterion.regrow,
        )

    @property
    def _watched(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.learnt.setdefault("watched", {})
        return found

    def _kept(self, network: Network) -> int:
        kept = network.weights.kept
        return sum(kept.get(name, network.tensors[name].numel()) for name in self._eligible(network))

    def _weights(self, network: Network) -> dict[str, Tensor]:
        return {name: network.tensors[name].detach() for name in self._eligible(network)}

    def _eligible(self, network: Network) -> list[str]:
        return chosen_names(maskable_names(network.module), self.include, self.exclude)

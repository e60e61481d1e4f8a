"""Pruning of single weights by a criterion."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal, Union

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.base import EarlyStoppingChoice, PruningCallback
from lightning_prune.callbacks.network import Network
from lightning_prune.choices import unknown_name
from lightning_prune.criteria.weights import WeightCriterion, WeightCriterionName, weight_criterion_from
from lightning_prune.errors import ConfigurationError
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
            ``"random"``, or a :class:`~lightning_prune.WeightCriterion`.
        remove: Fraction of the weights to switch off in all, in [0, 1).
        schedule: When rounds are due, as for :class:`~lightning_prune.ChannelPruning`.
        scope: Weights compete with all others (``"global"``), with those of their tensor (``"layer"``), or each tensor
            keeps the share that an Erdos-Renyi kernel gives it (``"erk"``, Evci et al., 2020).
        include: Patterns (as in ``fnmatch``) of names of parameters or of their modules whose weights may go; default
            all parameters of two or more dimensions.
        exclude: Patterns of those whose weights stay.
        floor: Least share (or number) of weights that each tensor keeps.
        pattern: ``(n, m)``: of every ``m`` neighbours along the input dimension at most ``n`` stay.
        reinit: What becomes of the weights after each round, as for :class:`~lightning_prune.ChannelPruning`.
        shrink: Remove dead channels physically when training ends (``"end"``) or not at all (``"never"``).
        verify: Whether that removal is compared with the masked network, and undone if it differs.
        recalibrate: Number of batches to re-estimate batch-norm statistics on after each round; 0 leaves them.
        seed: Seed of random criteria and reinitialisations.
        directory: Where the final checkpoint and the report are written, as for
            :class:`~lightning_prune.ChannelPruning`.
        early_stopping: As for :class:`~lightning_prune.ChannelPruning`.

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
        scope: Scope = "global",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        floor: Union[int, float] = 0.001,  # noqa: UP007
        pattern: tuple[int, int] | None = None,
        reinit: Union[ReinitName, Reinit] = "keep",  # noqa: UP007
        shrink: Literal["end", "never"] = "end",
        verify: bool = True,
        recalibrate: int = 0,
        seed: int = 0,
        directory: str | None = None,
        early_stopping: EarlyStoppingChoice = "keep",
    ) -> None:
        if shrink not in ("end", "never"):
            raise unknown_name("shrink", shrink, ["end", "never"])
        super().__init__(
            remove,
            "weights",
            schedule,
            reinit,
            shrink,
            "exact",
            verify,
            recalibrate,
            seed,
            directory,
            None,
            early_stopping,
        )
        if scope not in ("global", "layer", "erk"):
            raise unknown_name("scope", scope, ["global", "layer", "erk"])
        self.criterion = criterion
        self.scope: Scope = scope
        self.include = include
        self.exclude = exclude
        self.floor = floor
        self.pattern = pattern
        self._criterion = weight_criterion_from(criterion)
        if pattern is not None:
            check_pattern(pattern, remove, final=True)

    @override
    def can_prune(self, network: Network) -> bool:
        return bool(self._names(network))

    @override
    def prepare(self, network: Network) -> None:
        names = self._names(network)
        for option, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns or ():
                if not any(_matches(name, [pattern]) for name in names):
                    raise unknown_name(f"parameter in {option}", pattern, names)
        weights = self._weights(network)
        if not weights:
            raise ConfigurationError(
                f"include={self.include} and exclude={self.exclude} leave no weight to prune; there are: "
                f"{', '.join(names)}."
            )
        self._record["eligible"] = {name: weight.numel() for name, weight in weights.items()}
        draw = self.generator("rehearsal")
        scores = {name: torch.rand(weight.shape, generator=draw) for name, weight in weights.items()}
        self._select(network, scores, 1.0, floor=self.floor or 1)  # what chance would empty, the scores may not

    @override
    def carry_out(self, network: Network, level: float) -> None:
        scores = self._criterion.score(self._weights(network), self._gradients(network), self.generator("criterion"))
        averaged = {name: network.average(score) for name, score in scores.items()}
        network.weights.set(network.broadcast(self._select(network, averaged, level)), network.tensors)
        network.hold_masks()

    @override
    def removed(self, network: Network) -> float:
        total = sum(self._record.get("eligible", {}).values())
        return 1 - self._kept(network) / total if total else 0.0

    @override
    def before_the_end(self, network: Network) -> None:
        network.masks.set(network.living_units())

    def _select(
        self, network: Network, scores: dict[str, Tensor], level: float, floor: float | None = None
    ) -> dict[str, Tensor]:
        # Of the weights that there are; an earlier fit may have removed some of them physically.
        left = (1 - self.remove * level) * sum(self._record["eligible"].values())
        present = sum(score.numel() for score in scores.values())
        return select_weights(
            scores,
            {name: network.weights.keep.get(name, torch.ones_like(s, dtype=torch.bool)) for name, s in scores.items()},
            remove=max(0.0, 1 - left / present),
            scope=self.scope,
            floor=self.floor if floor is None else floor,
            pattern=self.pattern,
        )

    def _gradients(self, network: Network) -> dict[str, Tensor]:
        """Gradients of all eligible weights, summed over the batches that the criterion asks for."""
        sums: dict[str, Tensor] = {}
        if self._criterion.batches:
            names = self._eligible(network)
            for gradients in network.probe.gradients(self._criterion.batches):
                for name in names:
                    sums[name] = sums[name] + gradients[name] if name in sums else gradients[name]
        return {name: network.average(total) for name, total in sums.items()}

    def _kept(self, network: Network) -> int:
        kept = network.weights.kept
        return sum(kept.get(name, network.tensors[name].numel()) for name in self._eligible(network))

    def _weights(self, network: Network) -> dict[str, Tensor]:
        return {name: network.tensors[name].detach() for name in self._eligible(network)}

    def _eligible(self, network: Network) -> list[str]:
        chosen = [name for name in self._names(network) if self.include is None or _matches(name, self.include)]
        return [name for name in chosen if not _matches(name, self.exclude or ())]

    def _names(self, network: Network) -> list[str]:
        """Parameters of two or more dimensions; biases and the scales of norms are not worth a mask."""
        named = network.module.named_parameters()
        return [name for name, parameter in named if parameter.dim() > 1 and parameter.is_floating_point()]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    path = name.replace("_orig_mod.", "")
    return any(fnmatchcase(candidate, p) for p in patterns for candidate in (path, path.rpartition(".")[0]))

"""Dynamic network surgery: weights that were cut go on learning, and may be spliced in again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Union

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_prune.callbacks.base import EarlyStoppingChoice
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.weights import WeightPruning
from lightning_prune.effective import EffectiveWeights
from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import Schedule, ScheduleName
from lightning_prune.weight_budget import Scope, select_weights


class DynamicNetworkSurgery(WeightPruning):
    """Cuts weights that have become small and splices those in again that have grown (Guo et al., 2016).

    From the first round of the schedule on, the network computes with masked weights while the optimizer moves all of
    them, by the gradients at the masked ones. Updates of the masks cut what is below 0.9 times a threshold, splice in
    what is above 1.1 times it, and leave the rest as it is. The last round settles on the largest weights, so a
    schedule needs several. The paper sets the threshold of a tensor by the mean and deviation of its weights; here each
    round sets it to the least magnitude that the budget would keep in that tensor then.

    Args:
        remove: Fraction of the weights to switch off in all, in [0, 1).
        schedule: When thresholds are set, as for :class:`~lightning_prune.WeightPruning`.
        scope: Which weights compete for the budget, as for :class:`~lightning_prune.WeightPruning`.
        gamma, power: After the t-th step the masks are updated with probability ``(1 + gamma * t) ** -power``.
        include, exclude, floor, shrink, verify, seed, directory, early_stopping: As for
            :class:`~lightning_prune.WeightPruning`.

    Raises:
        ConfigurationError: If an argument is wrong, or an optimizer computes the loss again in its step (LBFGS).
        BudgetError: If the budget is out of reach on this network.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[DynamicNetworkSurgery(remove=0.9)], logger=False)
    """

    provenance = "published"

    def __init__(
        self, remove: float = 0.9, schedule: Union[ScheduleName, Schedule] = "cubic", scope: Scope = "global",  # noqa: UP007
        gamma: float = 1e-4, power: float = 1.0, include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None, floor: Union[int, float] = 0.001,  # noqa: UP007
        shrink: Literal["end", "never"] = "end", verify: bool = True, seed: int = 0, directory: str | None = None,
        early_stopping: EarlyStoppingChoice = "keep",
    ) -> None:  # fmt: skip
        super().__init__(
            "magnitude", remove, schedule, scope, include, exclude, floor, shrink=shrink, verify=verify, seed=seed,
            directory=directory, early_stopping=early_stopping,
        )  # fmt: skip
        if gamma < 0 or power < 0:
            raise ConfigurationError(f"gamma and power must be at least 0, but they are {gamma} and {power}.")
        self.gamma, self.power = gamma, power
        self._effective: EffectiveWeights | None = None

    @override
    def resume(self, network: Network) -> None:
        super().resume(network)
        if any(isinstance(optimizer, LBFGS) for optimizer in network.optimizers):
            raise ConfigurationError(
                "LBFGS computes the loss again in the middle of its step, when no weight is masked. Use an optimizer "
                "that computes it once, such as SGD or AdamW."
            )
        self._effective = self._operate(network) if "surgery" in self.learnt else None

    @override
    def before_step(self, network: Network, optimizer: Optimizer) -> None:
        if self._effective is not None:
            self._effective.place_dense()

    @override
    def after_step(self, network: Network, optimizer: Optimizer) -> None:
        if self._effective is None:
            return
        surgery = self.learnt["surgery"]
        self._effective.take_over()
        surgery["steps"] += 1
        chance = (1 + self.gamma * surgery["steps"]) ** -self.power
        if torch.rand((), generator=self.generator(f"surgery {surgery['steps']}")) < chance:
            self._update_masks()
        self._effective.place(surgery["keep"])

    @override
    def carry_out(self, network: Network, level: float) -> None:
        if "surgery" not in self.learnt:
            dense = {name: network.tensors[name] for name in self._eligible(network)}
            keep = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in dense.items()}
            self.learnt["surgery"] = {"dense": dense, "keep": keep | network.weights.keep, "steps": 0}
            network.weights.keep.clear()
        effective = self._effective = self._operate(network)
        if level == 1:
            self._settle(network, effective, level)
            return
        surgery, size = self.learnt["surgery"], {name: dense.abs() for name, dense in effective.dense.items()}
        best = network.broadcast(select_weights(size, {}, self.remove * level, self.scope, self.floor))
        surgery["thresholds"] = {name: float(size[name].cpu()[best[name]].min()) for name in size}
        self._update_masks()
        effective.place(surgery["keep"])

    @override
    def before_the_end(self, network: Network) -> None:
        if self._effective is not None:
            self._settle(network, self._effective, self._record["level"])
            self._note(network)
        super().before_the_end(network)

    @override
    def removed(self, network: Network) -> float:
        if self._effective is None:
            return super().removed(network)
        kept = sum(int(keep.sum()) for keep in self.learnt["surgery"]["keep"].values())
        return 1 - kept / float(sum(self._record["eligible"].values()))

    def _operate(self, network: Network) -> EffectiveWeights:
        """Have the network compute with masked weights, and what was learnt hold the dense ones."""
        surgery = self.learnt["surgery"]
        tensors = {name: network.tensors[name] for name in surgery["dense"]}
        effective = EffectiveWeights(tensors, surgery["dense"])
        surgery["dense"] = effective.dense
        surgery["keep"] = {name: keep.to(tensors[name].device) for name, keep in surgery["keep"].items()}
        effective.place(surgery["keep"])
        return effective

    def _update_masks(self) -> None:
        surgery = self.learnt["surgery"]
        dense, thresholds = surgery["dense"], surgery["thresholds"]
        surgery["keep"] = {name: spliced(keep, dense[name], thresholds[name]) for name, keep in surgery["keep"].items()}

    def _settle(self, network: Network, effective: EffectiveWeights, level: float) -> None:
        """Keep the largest weights for good, and forget the others."""
        effective.place_dense()
        self._effective = None
        del self.learnt["surgery"]
        super().carry_out(network, level)


def spliced(keep: Tensor, dense: Tensor, threshold: float) -> Tensor:
    """Mask without the weights well below a threshold, and with those well above it."""
    return (keep & (dense.abs() >= 0.9 * threshold)) | (dense.abs() >= 1.1 * threshold)

"""Dynamic network surgery: weights that were cut go on learning, and may be spliced in again."""

from __future__ import annotations

from typing import Literal, Union

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.monitors import Monitors
from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.revivable import RevivablePruning, Tensors
from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import Schedule, ScheduleName
from lightning_prune.weight_budget import Scope, select_weights


class DynamicNetworkSurgery(RevivablePruning):
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
        include, exclude, floor, shrink, verify, seed, directory, monitors: As for
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
        gamma: float = 1e-4, power: float = 1.0, include: Patterns | None = None,
        exclude: Patterns | None = None, floor: Union[int, float] = 0.001,  # noqa: UP007
        shrink: Literal["end", "never"] = "end", verify: bool = True, seed: int = 0, directory: str | None = None,
        monitors: Monitors = "keep",
    ) -> None:  # fmt: skip
        super().__init__(
            "magnitude", remove, schedule, scope, include, exclude, floor, shrink=shrink, verify=verify, seed=seed,
            directory=directory, monitors=monitors,
        )  # fmt: skip
        if gamma < 0 or power < 0:
            raise ConfigurationError(f"gamma and power must be at least 0, but they are {gamma} and {power}.")
        self.gamma, self.power = gamma, power

    @override
    def masks_at_round(self, network: Network, dense: Tensors, keep: Tensors, level: float) -> Tensors:
        size = {name: weight.abs() for name, weight in dense.items()}
        best = network.broadcast(select_weights(size, {}, self.remove * level, self.scope, self.floor))
        self.learnt["thresholds"] = {name: float(size[name].cpu()[best[name]].min()) for name in size}
        return self._updated(dense, keep)

    @override
    def masks_after_step(self, dense: Tensors, keep: Tensors) -> Tensors:
        self.learnt["steps"] = step = self.learnt.get("steps", 0) + 1
        chance = (1 + self.gamma * step) ** -self.power
        due = torch.rand((), generator=self.generator(f"surgery {step}")) < chance
        return self._updated(dense, keep) if due else keep

    def _updated(self, dense: Tensors, keep: Tensors) -> Tensors:
        return {name: spliced(keep[name], dense[name], self.learnt["thresholds"][name]) for name in keep}


def spliced(keep: Tensor, dense: Tensor, threshold: float) -> Tensor:
    """Mask without the weights well below a threshold, and with those well above it."""
    return (keep & (dense.abs() >= 0.9 * threshold)) | (dense.abs() >= 1.1 * threshold)

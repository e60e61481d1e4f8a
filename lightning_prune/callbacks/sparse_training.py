"""Training that is sparse from its first step, and keeps looking for the weights that are worth it."""

from __future__ import annotations

import math
from typing import Literal, Union

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.callbacks.monitors import Monitors
from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.support import has_no_end, length_of, warn_of_no_update
from lightning_prune.callbacks.weights import WeightPruning
from lightning_prune.choices import check_at_least
from lightning_prune.errors import ConfigurationError
from lightning_prune.rewiring import rewired
from lightning_prune.schedules import OneShot, Position
from lightning_prune.weight_budget import Scope


class SET(WeightPruning):
    """Sparse evolutionary training: the smallest weights trade places with random others (Mocanu et al., 2018).

    Random weights are off from the first step on. In an update each tensor drops some of the others and grows as many,
    at zero, somewhere else. How much, and when, is as in :class:`RigL`; the paper drops a constant share every epoch.

    Args:
        remove: Fraction of the weights that is off at any time, in [0, 1).
        every: Number of optimizer steps between updates; in a shorter fit there is none.
        fraction: Share of the kept weights of a tensor that an update drops; it falls to 0 along half a cosine.
        stop: Share of the fit at which it is 0 and updates end.
        scope: How many weights each tensor has, always, as for :class:`~lightning_prune.WeightPruning`.
        include, exclude, floor, shrink, verify, seed, directory, monitors: As for
            :class:`~lightning_prune.WeightPruning`.

    Raises:
        ConfigurationError: If an argument is wrong.
        BudgetError: If the budget is out of reach on this network.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[SET(remove=0.9)], logger=False)
    """

    provenance = "published"

    def __init__(
        self, remove: float = 0.9, every: int = 100, fraction: float = 0.3, stop: float = 0.75, scope: Scope = "erk",
        include: Patterns | None = None, exclude: Patterns | None = None,
        floor: Union[int, float] = 0.001, shrink: Literal["end", "never"] = "end", verify: bool = True,  # noqa: UP007
        seed: int = 0, directory: str | None = None, monitors: Monitors = "keep",
    ) -> None:  # fmt: skip
        super().__init__(
            "random", remove, OneShot(0, "step"), scope, include, exclude, floor, shrink=shrink, verify=verify,
            seed=seed, directory=directory, monitors=monitors,
        )  # fmt: skip
        check_at_least(1, whole=True, every=every)
        if not 0 < fraction < 1 or not 0 < stop <= 1:
            raise ConfigurationError(f"fraction must be in (0, 1), stop in (0, 1], but they are {fraction} and {stop}.")
        self.every, self.fraction, self.stop = every, fraction, stop

    def growth(self, network: Network) -> dict[str, Tensor]:
        """Scores of all weights; of those that are off the highest grow. The same in all processes."""
        draw = self.generator(f"growth {self.learnt['updates']}")
        return {name: torch.rand(keep.shape, generator=draw) for name, keep in network.weights.keep.items()}

    def share(self, position: Position) -> float:
        """Share of the kept weights that an update drops."""
        return self.fraction / 2 * (1 + math.cos(math.pi * position.fraction / self.stop))

    @override
    def resume(self, network: Network) -> None:
        super().resume(network)
        length = length_of(network.module.trainer)
        if has_no_end(length):
            raise ConfigurationError(
                f"{type(self).__name__} drops fewer weights the nearer the end of the fit is, but this fit has no end "
                f"that is known. Give the Trainer max_epochs or max_steps."
            )
        warn_of_no_update(self.every, self.stop, length)

    @override
    def before_batch(self, network: Network, position: Position) -> None:
        due = int(position.step) // self.every
        done, self.learnt["updates"] = self.learnt.get("updates", 0), due
        old = dict(network.weights.keep)
        if due <= done or position.fraction >= self.stop or not old:
            return
        growth, share = self.growth(network), self.share(position)
        size = {name: network.tensors[name].detach().abs() for name in old}
        new = network.broadcast({name: rewired(name, old[name], size[name], growth[name], share) for name in old})
        # All that is not on both before and after starts afresh, with nothing left of it anywhere.
        network.weights.set({name: old[name] & new[name] for name in old}, network.tensors)
        network.hold_masks()
        network.weights.set(new, network.tensors)
        self._note(network)

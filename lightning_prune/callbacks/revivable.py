"""Weights that go on learning while they are off, until the masks are settled."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.weights import WeightPruning
from lightning_prune.effective import EffectiveWeights
from lightning_prune.gated_training import refuse_repeated_losses

Tensors = dict[str, Tensor]


class RevivablePruning(WeightPruning):
    """From the first round to the last, the optimizer moves all weights, by the gradients at the masked ones.

    The module holds the masked weights, except in the step itself. The last round, or the end of the fit before it,
    settles on what the criterion wants; from then on what is off stays off.
    """

    _effective: EffectiveWeights | None = None
    _stepping: bool = False

    @abstractmethod
    def masks_at_round(self, network: Network, dense: Tensors, keep: Tensors, level: float) -> Tensors:
        """New masks at a round before the last, the same in all processes.

        Args:
            network: The network as it is.
            dense: The weights behind the masks.
            keep: The present masks.
            level: Share of the budget that should be reached.
        """

    @abstractmethod
    def masks_after_step(self, dense: Tensors, keep: Tensors) -> Tensors:
        """New masks after a step of an optimizer, the same in all processes.

        Args:
            dense: The weights behind the masks.
            keep: The present masks.
        """

    @override
    def resume(self, network: Network) -> None:
        super().resume(network)
        refuse_repeated_losses(network.optimizers, type(self).__name__)
        self._effective = self._behind_masks(network) if "dense" in self.learnt else None
        self._stepping = False

    @override
    def before_step(self, network: Network, optimizer: Optimizer) -> None:
        super().before_step(network, optimizer)
        if self._effective is not None:
            self._effective.place_dense()
            self._stepping = True

    @override
    def after_step(self, network: Network, optimizer: Optimizer) -> None:
        super().after_step(network, optimizer)
        if self._effective is not None:
            if not self._stepping:  # nobody announced the step, so it has moved the masked weights
                for name, keep in self.learnt["keep"].items():
                    network.tensors[name].detach().add_(self._effective.dense[name].masked_fill(keep, 0))
            self._stepping = False
            self._effective.take_over()
            self.learnt["keep"] = self.masks_after_step(self._effective.dense, self.learnt["keep"])
            self._effective.place(self.learnt["keep"])

    @override
    def carry_out(self, network: Network, level: float) -> None:
        if "dense" not in self.learnt:
            dense = {name: network.tensors[name].detach() for name in self._eligible(network)}
            keep = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in dense.items()}
            self.learnt.update(dense=dense, keep=keep | network.weights.keep)
            network.weights.keep.clear()  # what the base holds at zero could not come back
        effective = self._effective = self._behind_masks(network)
        if level == 1:
            self._settle(network, effective, level)
        else:
            self.learnt["keep"] = self.masks_at_round(network, effective.dense, self.learnt["keep"], level)
            effective.place(self.learnt["keep"])

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
        kept = sum(int(keep.sum()) for keep in self.learnt["keep"].values())
        return 1 - kept / float(sum(self._record["eligible"].values()))

    def _behind_masks(self, network: Network) -> EffectiveWeights:
        """Put the masks before the weights; what was learnt then holds the dense ones themselves."""
        tensors = {name: network.tensors[name] for name in self.learnt["dense"]}
        effective = EffectiveWeights(tensors, self.learnt["dense"])
        keep = {name: mask.to(tensors[name].device) for name, mask in self.learnt["keep"].items()}
        self.learnt.update(dense=effective.dense, keep=keep)
        effective.place(keep)
        return effective

    def _settle(self, network: Network, effective: EffectiveWeights, level: float) -> None:
        effective.place_dense()
        self._effective = None
        del self.learnt["dense"], self.learnt["keep"]
        super().carry_out(network, level)

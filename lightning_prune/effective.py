"""Effective weights: tensors that hold dense values times a mask or gate, while the dense values are kept elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.graph.channels import ChannelGroup, Slot
from lightning_prune.surgery.resize import Cut, read


class EffectiveWeights:
    """Parameters that hold effective values, with the dense values behind them.

    The gradient that backward leaves in ``.grad`` is then the one at the effective values. Nothing is wrapped, hooked
    or renamed, so whatever works with the parameters goes on working.

    Args:
        tensors: The parameters, by full name.
        dense: Dense values by name, where they are not what the parameters hold now.

    Attributes:
        dense: The dense values by name, on the devices of the parameters.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
        >>> effective = EffectiveWeights({"weight": weight})
        >>> effective.place({"weight": torch.tensor([0.0, 1.0])})
        >>> (weight**2).sum().backward()
        >>> weight.tolist(), effective.slopes()["weight"].tolist()
        ([0.0, 3.0], [0.0, 18.0])
    """

    def __init__(self, tensors: Mapping[str, Tensor], dense: Mapping[str, Tensor] | None = None) -> None:
        self._tensors = dict(tensors)
        self.dense = {
            name: (dense or {}).get(name, tensor).detach().to(tensor.device, copy=True)
            for name, tensor in self._tensors.items()
        }

    def place(self, factors: Mapping[str, Tensor]) -> None:
        """Have the named parameters hold their dense values times a factor that broadcasts."""
        for name, factor in factors.items():
            torch.mul(self.dense[name], factor, out=self._tensors[name].detach())

    def place_dense(self) -> None:
        """Have all parameters hold their dense values, as for a step of an optimizer that is to move those."""
        for name, tensor in self._tensors.items():
            tensor.detach().copy_(self.dense[name])

    def take_over(self) -> None:
        """Take what the parameters hold for their dense values, as after a step of an optimizer."""
        for name, tensor in self._tensors.items():
            self.dense[name].copy_(tensor.detach())

    def slopes(self) -> dict[str, Tensor]:
        """Derivatives of the loss with respect to the factors, entry by entry; none for parameters without gradient."""
        return {
            name: tensor.grad * self.dense[name] for name, tensor in self._tensors.items() if tensor.grad is not None
        }

    def cut(self, cuts: Mapping[str, Sequence[Cut]]) -> None:
        """Follow a resize of the parameters."""
        self.dense.update({name: read(self.dense[name], axes) for name, axes in cuts.items() if name in self.dense})


class ChannelGates:
    """One factor for each unit of channel groups, multiplied into the weights that can switch the unit off.

    A gate of 0 switches the unit off exactly, one of 1 leaves it as it is. Where a group is switched off in the weights
    that read it, its gate is what the channel itself is multiplied with.

    Args:
        groups: The gated groups.
        tensors: Parameters and buffers of the network by full name.

    Example:
        >>> reads = Slot("head.weight", 1, torch.arange(2)[:, None], "consumer")
        >>> weight = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> gates = ChannelGates([ChannelGroup("fc", (reads,), (reads,))], {"head.weight": weight})
        >>> effective = EffectiveWeights({"head.weight": weight})
        >>> effective.place(gates.factors({"fc": torch.tensor([1.0, 0.5])}))
        >>> weight.tolist()
        [[1.0, 1.0], [3.0, 2.0]]
        >>> weight.sum().backward()
        >>> gates.gradients({"fc": torch.tensor([1.0, 0.5])}, effective.slopes())["fc"].tolist()
        [4.0, 6.0]
    """

    def __init__(self, groups: Iterable[ChannelGroup], tensors: Mapping[str, Tensor]) -> None:
        self._slots: dict[str, list[tuple[str, Slot]]] = {}
        for group in groups:
            for slot in group.off:
                self._slots.setdefault(slot.tensor, []).append((group.name, slot))
        self._like = {name: tensors[name].detach() for name in self._slots}

    @property
    def names(self) -> list[str]:
        """Full names of the tensors that gates are multiplied into."""
        return list(self._slots)

    def factors(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each tensor is multiplied with.

        Args:
            gates: Gates of shape ``[units]`` by group name; other groups count as open.

        Returns:
            By full name a tensor that broadcasts over the named one.
        """
        ones = torch.ones(())
        return {
            name: math.prod(self._vectors(name, gates).values(), start=ones.to(self._like[name]))
            for name in self._slots
        }

    def gradients(self, gates: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Derivatives of the loss with respect to the gates.

        Args:
            gates: The gates in use.
            slopes: What :meth:`EffectiveWeights.slopes` gives.

        Returns:
            Tensors of shape ``[units]`` by group name.
        """
        found = {name: torch.zeros_like(gate) for name, gate in gates.items()}
        for name in (name for name in self._slots if name in slopes):  # in order, as sums depend on it
            vectors = self._vectors(name, gates)
            for group, slot in self._slots[name]:
                if group not in found:
                    continue
                partial = math.prod((v for dim, v in vectors.items() if dim != slot.dim), start=slopes[name])
                along = partial.movedim(slot.dim, 0).reshape(partial.shape[slot.dim], -1).sum(1)
                found[group] += along[slot.index.to(along.device)].sum(1).to(found[group])
        return found

    def _vectors(self, name: str, gates: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Factors along each gated dimension of a tensor, shaped to broadcast over it."""
        like = self._like[name]
        vectors: dict[int, Tensor] = {}
        for group, slot in self._slots[name]:
            if group not in gates:
                continue
            shape = [n if d == slot.dim else 1 for d, n in enumerate(like.shape)]
            vector = vectors.setdefault(slot.dim, like.new_ones(shape))
            index = slot.index.to(like.device)
            values = gates[group].to(like).repeat_interleave(index.shape[1])
            vector.view(-1).index_copy_(0, index.flatten(), values)
        return vectors

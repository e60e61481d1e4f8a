"""Masks over single weights: what is off stays zero, in weights, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.errors import ConfigurationError
from lightning_prune.masks import Enforced
from lightning_prune.surgery.resize import Cut, read


class WeightMasks(Enforced):
    """Which weights are kept, tensor by tensor.

    Args:
        keep: Masks to begin with, by full name of the tensor; tensors that are not named have none.

    Attributes:
        keep: Bool masks on the CPU, True = kept. Change them through :meth:`set`.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> masks = WeightMasks()
        >>> masks.set({"fc.weight": weight > 2.5}, {"fc.weight": weight})
        >>> masks.apply({"fc.weight": weight})
        >>> weight
        tensor([[0., 0.],
                [3., 4.]])
    """

    def __init__(self, keep: Mapping[str, Tensor] | None = None) -> None:
        self.keep = {name: mask.clone() for name, mask in (keep or {}).items()}
        self._off: dict[tuple[str, torch.device], Tensor] = {}

    def set(self, keep: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Replace the masks of the given tensors.

        Args:
            keep: Bool masks by full name.
            tensors: The tensors of the network by full name.

        Raises:
            ConfigurationError: If a mask does not fit its tensor; nothing is changed then.
        """
        for name, mask in keep.items():
            shape = tuple(tensors[name].shape) if name in tensors else None
            if mask.dtype != torch.bool or tuple(mask.shape) != shape:
                raise ConfigurationError(
                    f"the mask of {name!r} must be bool of the shape of that tensor ({shape}), but is {mask.dtype} of "
                    f"shape {tuple(mask.shape)}."
                )
        self.keep.update({name: mask.detach().cpu().clone() for name, mask in keep.items()})
        self._off.clear()

    @property
    def kept(self) -> dict[str, int]:
        """Number of weights kept in each tensor."""
        return {name: int(mask.sum()) for name, mask in self.keep.items()}

    def cut(self, cuts: Mapping[str, Sequence[Cut]]) -> None:
        """Follow a resize of the tensors."""
        self.keep.update({name: read(self.keep[name], axes) for name, axes in cuts.items() if name in self.keep})
        self._off.clear()

    def state_dict(self) -> dict[str, Tensor]:
        """The keep masks by name."""
        return {name: mask.clone() for name, mask in self.keep.items()}

    def _names(self) -> Iterable[str]:
        return self.keep

    def _fill(self, name: str, target: Tensor) -> None:
        key = name, target.device
        if key not in self._off:
            self._off[key] = ~self.keep[name].to(target.device)
        off, target = self._off[key], target.detach()
        if target.layout is torch.sparse_coo:
            target._values().masked_fill_(off[tuple(target._indices())], 0)
        else:
            target.masked_fill_(off, 0)

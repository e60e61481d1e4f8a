"""Back to the values before training."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_prune.reinit.base import Reinit
from lightning_prune.reinit.targets import check_origin, targets_of, zero_the_rest


@dataclass(frozen=True)
class Rewind(Reinit):
    """What survives takes its value from before training again: the winning ticket of Frankle & Carbin (2019).

    Buffers such as running statistics are rewound too, as far as their first values are known.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> origin = {"weight": torch.tensor([[3.0, 4.0]])}
        >>> Rewind()(layer, ["weight"], torch.Generator(), origin, {"weight": torch.tensor([[True, False]])})
        []
        >>> layer.weight.tolist()
        [[3.0, 0.0]]
    """

    provenance: ClassVar[str] = "Frankle & Carbin (2019): the winning ticket"
    needs_origin: ClassVar[bool] = True

    def __call__(
        self,
        model: nn.Module,
        tensors: Collection[str],
        generator: torch.Generator,
        origin: Mapping[str, Tensor] | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> list[str]:
        """Rewind the named tensors; returns the buffers whose first value is not known.

        Raises:
            PruneError: If the network has no tensor of one of the names, or the value before training of a parameter
                is missing, or a shape does not fit; nothing is changed then.
        """
        targets = targets_of(model, tensors, kept)
        known = {n: t for n, t in targets.items() if isinstance(t, nn.Parameter) or n in (origin or {})}
        initial = check_origin(type(self).__name__, known, origin)
        for name, tensor in known.items():
            tensor.detach().copy_(initial[name])
        zero_the_rest(targets, kept)
        return [name for name in targets if name not in known]

"""What a reinitialisation is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


class Reinit(ABC):
    """Gives tensors of a network the values from which training goes on after a round.

    Attributes:
        provenance: Where the method comes from; it says so if the method is a reconstruction.
        needs_origin: Whether the values that the network starts from must be remembered and given as ``origin``.

    Example:
        >>> class Zero(Reinit):
        ...     def __call__(self, model, tensors, generator, origin=None, kept=None):
        ...         with torch.no_grad():
        ...             for name in tensors:
        ...                 model.get_parameter(name).zero_()
        ...         return []
        >>> layer = nn.Linear(2, 1)
        >>> Zero()(layer, ["weight"], torch.Generator())
        []
        >>> layer.weight.tolist()
        [[0.0, 0.0]]
    """

    provenance: ClassVar[str] = ""
    needs_origin: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self,
        model: nn.Module,
        tensors: Collection[str],
        generator: torch.Generator,
        origin: Mapping[str, Tensor] | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> list[str]:
        """Change the named tensors in place.

        Args:
            model: The network.
            tensors: Full names of the parameters and buffers to reinitialise; all others must stay as they are.
            generator: The only source of randomness, so that all processes agree.
            origin: Values by full name that the network once started from, before training or at the step that is
                rewound to; cut to the present shapes, on any device.
            kept: Bool masks of the surviving entries by full name, True = kept; tensors without one survive whole.
                Entries that are not kept become zero.

        Returns:
            Names of the tensors for which no new value was known, and which were kept.
        """


@dataclass(frozen=True)
class Keep(Reinit):
    """Training goes on from the values at hand.

    Example:
        >>> Keep()(nn.Linear(2, 1), ["weight"], torch.Generator())
        []
    """

    provenance: ClassVar[str] = "Han et al. (2015): the network is fine-tuned from its surviving weights"

    def __call__(
        self,
        model: nn.Module,
        tensors: Collection[str],
        generator: torch.Generator,
        origin: Mapping[str, Tensor] | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> list[str]:
        """Change nothing."""
        return []

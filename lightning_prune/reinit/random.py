"""A fresh draw, as at the start."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_prune.reinit.base import Reinit
from lightning_prune.reinit.redraw import redraw
from lightning_prune.reinit.targets import targets_of, zero_the_rest


@dataclass(frozen=True)
class Random(Reinit):
    """A fresh draw, as each module's own ``reset_parameters`` makes it, at the present sizes.

    The control experiment of Frankle & Carbin (2019) and Liu et al. (2019). Parameters keep their identity and the
    global random state is left alone.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> before = layer.weight.clone()
        >>> Random()(layer, ["weight"], torch.Generator().manual_seed(1))
        []
        >>> bool((layer.weight != before).all())
        True
    """

    provenance: ClassVar[str] = "Frankle & Carbin (2019), Liu et al. (2019): the control experiment"

    def __call__(
        self,
        model: nn.Module,
        tensors: Collection[str],
        generator: torch.Generator,
        origin: Mapping[str, Tensor] | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> list[str]:
        """Redraw the named tensors; returns those whose module has no ``reset_parameters``.

        Raises:
            PruneError: If the network has no tensor of one of the names, or a mask does not fit.
        """
        targets = targets_of(model, tensors, kept)
        unknown = redraw(model, targets, generator)
        zero_the_rest(targets, kept)
        return unknown

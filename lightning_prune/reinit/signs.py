"""Reinitialisations that take signs and absolute values apart, and keep the one or the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_prune.reinit.draws import permuted
from lightning_prune.reinit.laws import Survivors, WeightLaw


@dataclass(frozen=True)
class KeepSign(WeightLaw):
    """Every surviving weight keeps the sign it had before training; its size is drawn anew.

    ``w' = sign(w0) * |e|`` with ``e`` from the module's own initialisation. The property that Zhou et al. (2019) found
    to matter most in tickets, and one of the three that are kept by the reinitialisations after S. Wang (2024).

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> KeepSign()(layer, ["weight"], torch.Generator(), {"weight": torch.tensor([[3.0, -4.0]])})
        []
        >>> layer.weight.sign().tolist()
        [[1.0, -1.0]]
    """

    provenance: ClassVar[str] = "reconstruction after S. Wang (2024); the law is that of Zhou et al. (2019)"

    def draw(self, survivors: Survivors, generator: torch.Generator) -> Tensor:
        """New sizes under the old signs."""
        return survivors.initial.sign() * survivors.fresh.abs()


@dataclass(frozen=True)
class KeepMagnitude(WeightLaw):
    """Every surviving weight keeps the absolute value it had before training; its sign is drawn anew.

    One of the three reinitialisations after S. Wang (2024): a reconstruction.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> KeepMagnitude()(layer, ["weight"], torch.Generator(), {"weight": torch.tensor([[3.0, -4.0]])})
        []
        >>> layer.weight.abs().tolist()
        [[3.0, 4.0]]
    """

    provenance: ClassVar[str] = "reconstruction after S. Wang (2024)"

    def draw(self, survivors: Survivors, generator: torch.Generator) -> Tensor:
        """Either sign, with the same probability."""
        size = survivors.initial.shape
        flip = torch.randint(2, size, generator=generator, device=generator.device)
        return survivors.initial.abs() * (2 * flip - 1)


@dataclass(frozen=True)
class KeepSignAndDistribution(WeightLaw):
    """Every surviving weight keeps its sign, and the absolute values before training change places within the layer.

    A control for the other laws: it keeps what ``"sign"`` keeps and what ``"distribution"`` keeps, but not which weight
    was large. Zhou et al. (2019) shuffle values within a layer in the same way.

    Example:
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> first = {"weight": torch.tensor([[3.0, -4.0, 5.0]])}
        >>> KeepSignAndDistribution()(layer, ["weight"], torch.Generator(), first)
        []
        >>> layer.weight.sign().tolist(), sorted(layer.weight.abs().flatten().tolist())
        ([[1.0, -1.0, 1.0]], [3.0, 4.0, 5.0])
    """

    provenance: ClassVar[str] = "Zhou et al. (2019): signs kept, values reshuffled"

    def draw(self, survivors: Survivors, generator: torch.Generator) -> Tensor:
        """The old sizes in another order under the old signs."""
        first = survivors.initial
        # An exact zero has no sign to give to a size, so it does not take part.
        return first.sign() * permuted(first.abs(), (first == 0).long(), generator)

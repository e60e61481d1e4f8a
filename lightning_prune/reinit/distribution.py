"""A new draw from the law of the ticket's initial weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_prune.choices import unknown_name
from lightning_prune.reinit.draws import bootstrapped, gaussian, permuted, smoothed
from lightning_prune.reinit.laws import Survivors, WeightLaw

How = Literal["permute", "bootstrap", "kernel", "normal"]
Per = Literal["layer", "filter"]

_DRAWS: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "permute": permuted,
    "bootstrap": bootstrapped,
    "kernel": smoothed,
    "normal": gaussian,
}


@dataclass(frozen=True)
class KeepDistribution(WeightLaw):
    """The surviving weights are drawn anew from the empirical law of their own values before training.

    That law differs from the module's initialisation, because tickets keep few tiny weights. One of the three
    reinitialisations after S. Wang (2024): a reconstruction. Zhou et al. (2019) shuffle values within a layer, which is
    ``how="permute"``.

    Args:
        how: ``"permute"`` shuffles the values, ``"bootstrap"`` draws among them with replacement, ``"kernel"`` adds
            Gaussian noise of Silverman's width to that, ``"normal"`` draws from a normal law of their mean and
            deviation.
        per: Whether the law is that of a whole ``"layer"`` or of each ``"filter"`` (output channel).
        sign_conditional: Whether each weight keeps its sign and is drawn from the law of the values of that sign; what
            ``"kernel"`` and ``"normal"`` draw on the other side of zero is mirrored.

    Example:
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> first = {"weight": torch.tensor([[3.0, -4.0, 5.0]])}
        >>> KeepDistribution()(layer, ["weight"], torch.Generator(), first)
        []
        >>> sorted(layer.weight.flatten().tolist())
        [-4.0, 3.0, 5.0]
    """

    provenance: ClassVar[str] = "reconstruction after S. Wang (2024); permuting is that of Zhou et al. (2019)"

    how: How = "permute"
    per: Per = "layer"
    sign_conditional: bool = False

    def __post_init__(self) -> None:
        if self.how not in _DRAWS:
            raise unknown_name("how", self.how, _DRAWS)
        if self.per not in ("layer", "filter"):
            raise unknown_name("per", self.per, ["layer", "filter"])

    def draw(self, survivors: Survivors, generator: torch.Generator) -> Tensor:
        """A draw from the law of each entry's layer or filter, and sign if that is to stay."""
        first = survivors.initial
        classes = survivors.filters if self.per == "filter" else torch.zeros_like(survivors.filters)
        if self.sign_conditional:
            classes = 3 * classes + first.sign().long() + 1
        values = _DRAWS[self.how](first, classes, generator)
        return first.sign() * values.abs() if self.sign_conditional else values

"""What the reinitialisations have in common that keep a property of the ticket's initial weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.reinit.base import Reinit
from lightning_prune.reinit.draws import filters_of
from lightning_prune.reinit.redraw import redraw
from lightning_prune.reinit.targets import check_origin, targets_of, zero_the_rest


class Survivors(NamedTuple):
    """The surviving entries of one weight, flattened.

    Args:
        initial: Their values before training.
        fresh: Values newly drawn from the module's own initialisation.
        filters: The number of the filter (output channel) that each belongs to.
    """

    initial: Tensor
    fresh: Tensor
    filters: Tensor


class WeightLaw(Reinit):
    """Base of the reinitialisations that draw each weight by a law of its own, given its initial values.

    Weights are the parameters of two or more dimensions. Biases, the gains of norms and running statistics are reset
    as their module's own ``reset_parameters`` does it; so is a weight to which that gives one and the same value
    everywhere, because it is none that is drawn. Entries that the module sets to zero (the padding row of an embedding)
    are left out of the law and stay zero. What has no ``reset_parameters`` is kept.

    Example:
        >>> class Negative(WeightLaw):
        ...     def draw(self, survivors, generator):
        ...         return -survivors.initial
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> Negative()(layer, ["weight"], torch.Generator(), {"weight": torch.tensor([[3.0, 4.0]])})
        []
        >>> layer.weight.tolist()
        [[-3.0, -4.0]]
    """

    needs_origin: ClassVar[bool] = True

    @abstractmethod
    def draw(self, survivors: Survivors, generator: torch.Generator) -> Tensor:
        """New values of the surviving entries of one weight, in the same order."""

    def __call__(
        self,
        model: nn.Module,
        tensors: Collection[str],
        generator: torch.Generator,
        origin: Mapping[str, Tensor] | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ) -> list[str]:
        """Reinitialise the named tensors; returns those whose module has no ``reset_parameters``.

        Raises:
            PruneError: If the network has no tensor of one of the names, or the value before training of a weight is
                missing, or a shape does not fit; nothing is changed then.
        """
        targets = targets_of(model, tensors, kept)
        weights = {n: t for n, t in targets.items() if isinstance(t, nn.Parameter) and t.dim() > 1}
        initial = check_origin(type(self).__name__, weights, origin)
        unknown = redraw(model, targets, generator)
        for name in (name for name in weights if name not in unknown):
            filters = filters_of(model.get_submodule(name.rpartition(".")[0]), weights[name].shape)
            self._renew(weights[name].detach(), initial[name], (kept or {}).get(name), filters, generator)
        zero_the_rest(targets, kept)
        return unknown

    def _renew(
        self, weight: Tensor, initial: Tensor, mask: Tensor | None, filters: Tensor, generator: torch.Generator
    ) -> None:
        """Replace what the module's own reset has just put into a weight."""
        if weight.numel() > 1 and bool((weight == weight.flatten()[0]).all()):
            return
        # All of it is computed where the generator draws, so that the result is the same whatever the device.
        fresh, first = weight.to(generator.device), initial.detach().to(generator.device)
        drawn = (fresh != 0) | (first != 0)
        if mask is not None:
            drawn &= mask.to(generator.device)
        survivors = Survivors(first[drawn], fresh[drawn], filters.to(generator.device)[drawn])
        values = torch.zeros_like(first)
        values[drawn] = self.draw(survivors, generator).to(values.dtype)
        weight.copy_(values)

"""Sets of weights described by few numbers: the largest ones, and quotas of small ones from buckets of like ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.errors import PruneError

ByName = dict[str, Tensor]
"""Tensors, of which some are bool masks, by name of the tensor whose weights they are about."""

STEEPEST = 3.0
"""Largest preference; shares are powers of e of preferences."""


class SmallWeights:
    """Sets of as many weights as a first set has, of which a part may be exchanged for small weights.

    A set is described by a vector: the number of exchanged weights as a share of all in the set, then a preference for
    each tensor, for each quantile of magnitude and for each quantile of gain, from the lowest on. As many of the
    smallest weights of the first set as the share says are let go. Buckets then send the same number of those that are
    not in the set, each the ones of highest gain first. What was let go may come back that way.

    A bucket holds the weights of one tensor that lie in the same quantiles of that tensor; its share is the power of e
    of the sum of its three preferences. Weights that no description lets go are in none.

    Args:
        magnitudes: Magnitudes of all weights, by name of the tensor.
        gains: Estimated fall of the loss if a weight is on instead of off.
        first: Bool masks of the first set.
        alive: Bool masks of the weights that may be in a set.
        fraction: Largest share of exchanged weights.
        quantiles: Number of quantiles that magnitudes and gains are each cut into.

    Raises:
        PruneError: If gains are not finite.

    Example:
        >>> weights, gains = {"fc": torch.tensor([4.0, 3.0, 2.0, 1.0])}, {"fc": torch.tensor([0.0, 0.0, 1.0, 5.0])}
        >>> first, alive = {"fc": weights["fc"] > 2.5}, {"fc": weights["fc"] > 0}
        >>> sets = SmallWeights(weights, gains, first, alive, fraction=0.5, quantiles=1)
        >>> sets.chosen(sets.starts[0])["fc"], sets.chosen(sets.starts[-1])["fc"]
        (tensor([ True,  True, False, False]), tensor([ True, False, False,  True]))
    """

    def __init__(
        self,
        magnitudes: Mapping[str, Tensor],
        gains: Mapping[str, Tensor],
        first: Mapping[str, Tensor],
        alive: Mapping[str, Tensor],
        fraction: float,
        quantiles: int = 4,
    ) -> None:
        if broken := [name for name, gain in gains.items() if not bool(gain.isfinite().all())]:
            raise PruneError(
                f"the gradients of {', '.join(broken)} are NaN or infinite in the pruned network: the training has "
                "probably diverged. Lower the learning rate, or prune in smaller rounds."
            )
        self._shapes = {name: magnitude.shape for name, magnitude in magnitudes.items()}
        kept = _flat(first)
        self._descending = kept.nonzero().flatten()[_flat(magnitudes)[kept].argsort(descending=True, stable=True)]
        self.size = len(self._descending)
        always = self._descending[: self.size - round(fraction * self.size)]
        candidates = _flat({name: alive.get(name, torch.ones(shape)).bool() for name, shape in self._shapes.items()})
        candidates[always] = False
        parts = [
            number * quantiles**2 + _quantile(magnitude, mask, quantiles) * quantiles + _quantile(gain, mask, quantiles)
            for number, (magnitude, gain, mask) in enumerate(
                zip(self._split(_flat(magnitudes)), self._split(_flat(gains)), self._split(candidates), strict=True)
            )
        ]
        self._buckets = len(parts) * quantiles**2
        members = candidates.nonzero().flatten()
        by_gain = members[_flat(gains)[members].argsort(descending=True, stable=True)]
        bucket = torch.cat(parts)[by_gain]
        order = bucket.argsort(stable=True)
        self._members, self._bucket = by_gain[order], bucket[order]
        self._quantiles, self._fraction = quantiles, fraction

    @property
    def upper(self) -> Tensor:
        """Largest values of a description."""
        preferences = len(self._shapes) + 2 * self._quantiles
        return torch.tensor([self._fraction] + [STEEPEST] * preferences, dtype=torch.float64)

    @property
    def lower(self) -> Tensor:
        """Least values of a description."""
        return torch.cat([torch.zeros(1, dtype=torch.float64), -self.upper[1:]])

    @property
    def starts(self) -> list[Tensor]:
        """The first set itself; then half and all that can be exchanged is, for whatever gains most."""
        start = torch.zeros_like(self.upper)
        start[-self._quantiles :] = torch.linspace(-STEEPEST, STEEPEST, self._quantiles)
        return [start, *(torch.cat([share * self.upper[:1], start[1:]]) for share in (0.5, 1.0))]

    def chosen(self, description: Tensor) -> dict[str, Tensor]:
        """Bool masks of the described set."""
        exchanged = round(float(description[0]) * self.size)
        chosen = torch.zeros(sum(shape.numel() for shape in self._shapes.values()), dtype=torch.bool)
        chosen[self._descending[: self.size - exchanged]] = True
        free = ~chosen[self._members]
        members, bucket = self._members[free], self._bucket[free]
        counts = bucket.bincount(minlength=self._buckets)
        parts = len(self._shapes), self._quantiles, self._quantiles
        by_tensor, by_magnitude, by_gain = description[1:].split(parts)
        preferences = by_tensor[:, None, None] + by_magnitude[:, None] + by_gain
        sent = quotas(preferences.flatten(), exchanged, counts)
        rank = torch.arange(len(members)) - (counts.cumsum(0) - counts)[bucket]
        chosen[members[rank < sent[bucket]]] = True
        return self._named(chosen)

    def refined(
        self,
        keep: ByName,
        sweeps: int,
        gains: Callable[[ByName], ByName],
        loss: Callable[[ByName], float],
        allowed: Callable[[ByName], ByName],
    ) -> ByName:
        """The set after exchanging its worst small weights for the best outside, again and again while the loss falls.

        At first a fiftieth of the set is exchanged at once, and half as many after each exchange that is taken back.

        Args:
            keep: Bool masks of the set.
            sweeps: How many exchanges are tried.
            gains: Estimated gains of all weights at a set.
            loss: Loss of a set.
            allowed: The set itself, or the nearest one that may be chosen.
        """
        least, most, estimated = loss(keep), max(1, self.size // 50), gains(keep)
        for _ in range(sweeps):
            swapped = self.swapped(keep, estimated, most)
            if swapped is None:
                break
            changed = allowed(swapped)
            if (value := loss(changed)) < least:
                keep, least, estimated = changed, value, gains(changed)
            else:
                most = max(1, most // 2)
        return keep

    def swapped(self, keep: ByName, gains: ByName, most: int) -> ByName | None:
        """The set with the worst small weights in it exchanged for the best outside, where these gain more.

        Args:
            keep: Bool masks of the set.
            gains: Estimated gains now.
            most: Most weights to exchange.

        Returns:
            Bool masks, or None if no weight outside gains more than one inside.
        """
        chosen, gain = _flat(keep), _flat(gains)
        inside = self._members[chosen[self._members]]
        outside = self._members[~chosen[self._members]]
        worst = inside[gain[inside].argsort(stable=True)[:most]]
        best = outside[gain[outside].argsort(descending=True, stable=True)[:most]]
        pairs = min(len(worst), len(best))
        count = int((gain[best[:pairs]] > gain[worst[:pairs]]).sum())
        chosen[worst[:count]], chosen[best[:count]] = False, True
        return self._named(chosen) if count else None

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        parts = zip(self._shapes.items(), self._split(flat), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def _split(self, flat: Tensor) -> Sequence[Tensor]:
        parts: Sequence[Tensor] = flat.split([shape.numel() for shape in self._shapes.values()])
        return parts


def quotas(preferences: Tensor, count: int, sizes: Tensor) -> Tensor:
    """Whole numbers in proportion to powers of e of preferences, none above its size, that add up to ``count``.

    What one has not is spread over the others in proportion; what is left of rounding down goes by largest remainder,
    and of equal ones to the earlier.

    Args:
        preferences: One for each.
        count: The sum; at most that of the sizes.
        sizes: Largest value of each.

    Example:
        >>> quotas(torch.tensor([0.0, 0.0, 0.0]), 11, torch.tensor([2, 30, 30]))
        tensor([2, 5, 4])
    """
    shares, sizes = preferences.double().softmax(0), sizes.double()
    full = sizes == 0
    while True:
        exact = sizes.where(full, shares * (count - sizes[full].sum()) / shares[~full].sum())
        if not bool((exact > sizes).any()):
            break
        full = full | (exact > sizes)
    whole = exact.floor()
    whole[(whole - exact).argsort(stable=True)[: count - int(whole.sum())]] += 1
    return whole.long()


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.detach().cpu().flatten() for tensor in tensors.values()])


def _quantile(values: Tensor, among: Tensor, quantiles: int) -> Tensor:
    """In which of equally large parts each of the given values lies, from the smallest on; 0 for the others."""
    parts = torch.zeros(len(values), dtype=torch.long)
    order = among.nonzero().flatten()[values[among].argsort(stable=True)]
    parts[order] = torch.arange(len(order)) * quantiles // max(len(order), 1)
    return parts

"""Gates on channels: open with probabilities that meet a budget, and what the loss has to say of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

import torch
from torch import Tensor

from lightning_prune.budget import Cost
from lightning_prune.effective import ChannelGates, EffectiveWeights
from lightning_prune.graph.channels import ChannelGroup

_STEPS = 60


class BudgetGates:
    """Turns scores into probabilities whose expected widths cost what is allowed.

    A unit of score s is open with the probability sigmoid(s - b); one threshold b for all is found by bisection, and
    differentiated implicitly. What a network of fractional widths would cost is interpolated: whole widths around them
    are passed through in the order of their fractions, and each step counts with its fraction. That is exact at whole
    widths, continuous, and grows with each width as the cost itself does.

    Args:
        cost: Cost of the network with given widths of every group; must not rise when a width falls.
        allowed: What it may cost.
        alive: Bool masks of the units that are not off yet, of every group.
        floors: Fewest units of the groups that are gated.

    Example:
        >>> whole = {"a": torch.ones(2, dtype=torch.bool)}
        >>> gates = BudgetGates(lambda widths: 10 * widths["a"], allowed=15, alive=whole, floors={"a": 1})
        >>> gates.probabilities({"a": torch.zeros(2)})["a"]
        tensor([0.7500, 0.7500])
    """

    def __init__(self, cost: Cost, allowed: float, alive: Mapping[str, Tensor], floors: Mapping[str, int]) -> None:
        self._cost = cost
        self.allowed = allowed
        self._alive = {name: mask.cpu() for name, mask in alive.items()}
        self._widths = {name: int(mask.sum()) for name, mask in alive.items()}
        self._floors = floors
        self._known: dict[tuple[int, ...], float] = {}

    def cost(self, widths: Mapping[str, float]) -> float:
        """Cost of the network with these widths of the gated groups, whole or not."""
        return self._interpolated(widths)[0]

    def _interpolated(self, widths: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """That cost, and its derivative along each width that is not whole."""
        all_widths = {**self._widths, **widths}
        corner = {name: math.floor(width) for name, width in all_widths.items()}
        fractions = {name: all_widths[name] - whole for name, whole in corner.items()}
        slopes = {}
        total = before = self._at(corner)
        for name in sorted((name for name in fractions if fractions[name] > 0), key=lambda name: -fractions[name]):
            corner[name] += 1
            after = self._at(corner)
            slopes[name] = after - before
            total += fractions[name] * slopes[name]
            before = after
        return total, slopes

    def expected_cost(self, probabilities: Mapping[str, Tensor]) -> float:
        """Cost at the expected widths, none counted below its floor."""
        return self.cost(self._expected_widths(probabilities))

    def _expected_widths(self, probabilities: Mapping[str, Tensor]) -> dict[str, float]:
        return {n: max(float(p.detach().double().sum()), self._floors[n]) for n, p in probabilities.items()}

    def probabilities(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Probabilities of being open, by group name, whose gradients leave the expected cost as it is.

        The threshold depends on the scores. Were it taken for a constant, all scores would rise together, to no effect,
        and no unit would be charged for what it costs.
        """
        values = {name: score.detach().double() for name, score in scores.items()}
        every = torch.cat(list(values.values()))
        low, high = float(every.min()) - 30, float(every.max()) + 30
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if self.expected_cost(self._opened(values, middle)) > self.allowed:
                low = middle
            else:
                high = middle
        prices = self._prices(self._opened(values, high))
        moved = [(prices[name] * (score - score.detach())).sum() for name, score in scores.items()]
        return self._opened(scores, high + torch.stack(moved).sum())

    def _prices(self, probabilities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Derivatives of the threshold with respect to the scores."""
        _, slopes = self._interpolated(self._expected_widths(probabilities))
        prices = {name: slopes.get(name, 0.0) * p * (1 - p) for name, p in probabilities.items()}
        whole = torch.stack([price.sum() for price in prices.values()]).sum().clamp(min=torch.finfo(torch.float64).tiny)
        return {name: (price / whole).float() for name, price in prices.items()}

    def _opened(self, scores: Mapping[str, Tensor], threshold: Tensor | float) -> dict[str, Tensor]:
        return {name: torch.sigmoid(score - threshold) * self._alive[name] for name, score in scores.items()}

    def _at(self, widths: Mapping[str, int]) -> float:
        key = tuple(widths.values())
        if key not in self._known:
            self._known[key] = self._cost(dict(widths))
        return self._known[key]


class GatedNetwork:
    """A network whose channels are multiplied with gates, and the slopes of its loss along them.

    As a context manager, it leaves the weights as it found them, bit by bit.

    Args:
        groups: The groups to gate.
        tensors: Parameters and buffers of the network by full name.
        gradients: Gives, again and again, the gradients of the loss of a batch with the weights as they are then.
        average: Mean of a tensor over all processes.
        rescale: Whether the open channels of a group are scaled up by the root of their share, so that signals keep
            their size.
    """

    def __init__(
        self,
        groups: Mapping[str, ChannelGroup],
        tensors: Mapping[str, Tensor],
        gradients: Iterator[Mapping[str, Tensor]],
        average: Callable[[Tensor], Tensor],
        rescale: bool,
    ) -> None:
        self._gates = ChannelGates(groups.values(), tensors)
        self._effective = EffectiveWeights({name: tensors[name] for name in self._gates.names})
        self._gradients = gradients
        self._average = average
        self._rescale = rescale

    def slopes(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Derivatives of the loss of the next batch with respect to the gates, averaged over processes.

        Args:
            gates: Gates of shape ``[units]`` by group name, in [0, 1].

        Returns:
            Tensors of the same shapes, on the CPU.
        """
        scales = {
            name: float(z.mean()) ** -0.5 if self._rescale and bool(z.any()) else 1.0 for name, z in gates.items()
        }
        placed = {name: z.detach() * scales[name] for name, z in gates.items()}
        self._effective.place(self._gates.factors(placed))
        gradients = next(self._gradients)
        slopes = {name: gradients[name] * w for name, w in self._effective.dense.items() if name in gradients}
        found = self._gates.gradients(placed, slopes)
        mean = self._average(torch.cat([found[name] * scales[name] for name in gates])).cpu()
        return dict(zip(gates, mean.split([len(z) for z in gates.values()]), strict=True))

    def __enter__(self) -> GatedNetwork:
        """Nothing to do yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the weights back."""
        self._effective.place_dense()

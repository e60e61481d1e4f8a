"""The network of a running fit, as a scorer sees it and is trained on it, and what its method decides before a fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_prune.budget import Cost, Limits
from lightning_prune.callbacks.network import Network
from lightning_prune.choices import unknown_name
from lightning_prune.errors import ConfigurationError
from lightning_prune.probe.stream import gradient_stream
from lightning_prune.schedules import OneShot, Schedule, ScheduleName
from lightning_prune.scoring import (
    BudgetGates,
    GatedNetwork,
    Problem,
    Scorer,
    Stage,
    energy,
    features,
    gradient_statistics,
    mean_ranks,
    rehearsed,
    train,
)


class ScoredNetwork:
    """Features of the units that may go, taken once; the same in all processes, which must call alike.

    Args:
        network: The network; it is as before after each call.
        names: Names of the groups that may be cut.
        batches: Number of batches whose gradients are among the features; 0 for none.
    """

    def __init__(self, network: Network, names: Sequence[str], batches: int) -> None:
        """Take the features."""
        self._network = network
        self._groups = {name: network.graph.groups[name] for name in names}
        self._statistics = self._gradient_statistics(batches) if batches else {}
        found = features(self._groups, network.tensors, self._statistics, self._shares())
        self._features = network.broadcast(found)  # processes have running statistics of their own

    def scores(self, scorer: Scorer) -> dict[str, Tensor]:
        """Scores by group name."""
        with torch.no_grad():
            found: dict[str, Tensor] = scorer(self._features)
            return found

    def train(
        self,
        scorer: Scorer,
        stages: Sequence[Stage],
        cost: Cost,
        allowed: float,
        limits: Limits,
        choose: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
        rescale: bool,
        generator: torch.Generator,
    ) -> None:
        """Train a scorer on batches of the training data, with the weights of the network frozen.

        Args:
            scorer: The scorer, changed in place.
            stages: What it goes through.
            cost: Cost of the network with given widths of every group.
            allowed: What the gated network may cost.
            limits: What must be left of every group.
            choose: The masks that a cut by given scores would leave.
            rescale: As for :class:`~lightning_prune.scoring.GatedNetwork`.
            generator: Source of randomness, the same in all processes.
        """
        network, tensors, widths = self._network, self._network.tensors, self._network.masks.widths
        floors = {name: limits.width(1, widths[name], network.original[name]) for name in self._groups}
        budget, gradients = BudgetGates(cost, allowed, network.masks.keep, floors), gradient_stream(network.probe)
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            GatedNetwork(self._groups, tensors, gradients, network.average, rescale) as gated,
        ):
            ranks = {name: mean_ranks(g, tensors, self._statistics.get(name)) for name, g in self._groups.items()}
            norms = {name: energy(group, tensors) for name, group in self._groups.items()}
            train(scorer, stages, Problem(self._features, ranks, norms, budget, choose, gated.slopes), generator)

    def _gradient_statistics(self, batches: int) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        number = 0
        for number, gradients in enumerate(self._network.probe.gradients(batches), 1):
            for name, group in self._groups.items():
                found = gradient_statistics(group, self._network.tensors, gradients)
                sums[name] = sums[name] + found if number > 1 else found
        return {name: self._network.average(total / number).cpu() for name, total in sums.items()}

    def _shares(self) -> dict[str, tuple[float, float]]:
        """Share of the MACs and of the parameters that go with the units of each group, one at a time."""
        widths = self._network.graph.widths
        found: dict[str, list[float]] = {name: [] for name in self._groups}
        for measure in ("macs", "params"):
            cost = self._network.cost_function(measure)
            whole = cost(widths)
            for name, shares in found.items():
                saved = whole - cost({**widths, name: widths[name] - 1})
                shares.append(saved * widths[name] / whole if whole else 0.0)
        return {name: (macs, params) for name, (macs, params) in found.items()}


@contextmanager
def scored_network(network: Network, names: Sequence[str], batches: int, rehearse: int = 0) -> Iterator[ScoredNetwork]:
    """The network as a scorer sees it after some steps of learning; afterwards it is as it was before.

    Args:
        network: As for :class:`ScoredNetwork`.
        names: As there.
        batches: As there.
        rehearse: Number of steps by which the weights learn.
    """
    gradients = gradient_stream(network.probe)
    with rehearsed(network.tensors, gradients, rehearse, network.average, network.mask_weights):
        yield ScoredNetwork(network, names, batches)


def schedule_of(mode: str, of: str, schedule: ScheduleName | Schedule | None) -> ScheduleName | Schedule:
    """When the rounds of a method with a scorer are due.

    Args:
        mode: ``"init"`` or ``"post"``.
        of: The measure of the budget.
        schedule: What was asked for, if anything.

    Raises:
        ConfigurationError: If the mode is unknown, or gates cannot be given a budget in this measure.
    """
    if mode not in ("init", "post"):
        raise unknown_name("mode", mode, ["init", "post"])
    if of == "latency":
        raise ConfigurationError(
            'of="latency" would have to be measured many times in each step of the scorer. Give of="macs", or use '
            "ChannelPruning, whose criteria need no budget to learn."
        )
    if schedule is None:
        return OneShot(0, "step") if mode == "init" else OneShot(0.3)
    return schedule

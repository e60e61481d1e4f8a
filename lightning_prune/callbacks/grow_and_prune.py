"""Growing before pruning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Union

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_prune.annealing import annealed, best, falling, gaussian_scales, weighed
from lightning_prune.callbacks.branching import branch_out, move_branches
from lightning_prune.callbacks.monitors import Monitors
from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.phases import PhasedPruning
from lightning_prune.callbacks.widening import grow
from lightning_prune.choices import check_at_least, unknown_name
from lightning_prune.criteria.base import WEIGHT_ROLES, entries
from lightning_prune.errors import ConfigurationError
from lightning_prune.gated_training import GatedTraining, refuse_repeated_losses
from lightning_prune.penalties import add_decay
from lightning_prune.schedules import Linear, Position, Unit

_SHUT, _LARGEST_DECAY = 0.05, 0.01
"""Gate below which a unit goes for good; largest share of a weight that the penalty takes away in one step."""


class GrowAndPrune(PhasedPruning):
    """Makes the network wider before it trains, then lets channels compete for what the original network may keep.

    Growth copies channels without a change to what the network computes. With ``branches`` each convolution is trained
    as a sum of linear ones until the last round, while the module holds the kernel that they fold into. From the first
    step a Gaussian scale mixture prior pushes weak channels ever harder towards zero. While annealed, each channel has
    a soft gate: the probability that it belongs to the active one of two Gaussians fitted to the scales of all
    channels, at a falling temperature, under a budget that falls from the cost of the wide network to the target. The
    last round meets the target exactly; what is left is fine-tuned. ``remove`` is a fraction of the original network.

    After Lu, Dong, Fang, Lin, Li & Shi, "Growing-before-pruning" (Pattern Recognition 166, 2025), of which only the
    abstract was at hand. Folding is published (Diverse Branch Block, Ding et al., 2021; training a linear layer as
    several: ExpandNets, Guo et al., 2020). Ours are: growth in width, branches without norms, started at zero
    and moved by SGD with momentum 0.9, begun anew where a round cuts a kernel; the penalty, its coefficient, the two
    Gaussians, temperatures, thresholds, phases. No whole layer vanishes, unlike there. That it pays to grow was not
    seen so far: ``examples/results/growth.md``.

    Args:
        remove: Fraction of the original network to remove in all, in [0, 1).
        of: What it is a fraction of: ``"macs"``, ``"params"``, or ``"channels"`` of the groups that may be pruned.
        expand: Factor by which groups grow; 1 prunes without growth in width.
        noise: How much copies differ in the weights that read them, relative to these; they add up to the same.
        branches: Whether each k*k convolution has parallel branches: 1*1, 1*1 and then k*k, and the identity where
            shapes allow. All strides, paddings, dilations and groups; not what is shared, parametrized or transposed.
        strength: Weight decay by the penalty of the unit of median scale in each group; weaker ones have more.
        start, end: Positions of the first round, at which gates come into being, and the last, at which they harden.
        interval: Distance of the rounds.
        unit: Of these three: ``"fraction"`` of the fit, ``"epoch"`` or ``"step"``.
        include, exclude, round_to, shrink: As for :class:`~lightning_prune.ChannelPruning`; what stays does not widen.
        min_channels: Fewest channels of a group, as a number or a share of the original width.
        seed: Of the growth.
        directory, monitors: As for :class:`~lightning_prune.ChannelPruning`.

    Raises:
        ConfigurationError: If an argument is wrong, nothing can grow, or the annealing cannot finish within the fit.
        BudgetError: If the budget is out of reach on this network.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[GrowAndPrune(remove=0.8)], logger=False)
    """

    provenance = "reconstruction"
    _gated: GatedTraining | None = None

    def __init__(
        self,
        remove: float = 0.7,
        of: Literal["channels", "params", "macs"] = "macs",
        expand: float = 1.5, noise: float = 0.1, branches: bool = False,
        strength: float = 5e-4, start: float = 0.1, end: float = 0.7, interval: float = 0.05, unit: Unit = "fraction",
        include: Patterns | None = None, exclude: Patterns | None = None, round_to: int = 1,
        min_channels: Union[int, float] = 0.1,  # noqa: UP007
        shrink: Literal["rounds", "end"] = "rounds",
        seed: int = 0, directory: str | None = None, monitors: Monitors = "keep",
    ) -> None:  # fmt: skip
        super().__init__(
            remove=remove, of=of, schedule=Linear(start, end, interval, unit), include=include, exclude=exclude,
            round_to=round_to, min_channels=min_channels, shrink=shrink, seed=seed, directory=directory,
            monitors=monitors,
        )  # fmt: skip
        if of not in ("channels", "params", "macs"):
            raise unknown_name("measure of a budget for gates", of, ["channels", "params", "macs"])
        if shrink not in ("rounds", "end"):
            raise unknown_name("shrink of a network that grows", shrink, ["rounds", "end"])
        check_at_least(1, expand=expand)
        check_at_least(0, noise=noise, strength=strength)
        self.expand, self.noise, self.branches, self.strength = expand, noise, branches, strength
        self.start, self.end, self.interval, self.unit = start, end, interval, unit

    @override
    def can_prune(self, network: Network) -> bool:
        found = super().can_prune(network)
        if not found and "grown" not in self.learnt and (self.expand > 1 or self.branches):
            reasons = "; ".join(f"{path}: {reason}" for path, reason in network.graph.refused[:5])
            raise ConfigurationError(f"nothing in this network can grow or be pruned ({reasons}).")
        return found

    @override
    def check_phases(self, last: Position) -> None:
        if 1 <= last.fraction < math.inf:
            raise ConfigurationError(
                f"the annealing ends at {self.unit} {self.end:g}, which is not before the end of the fit, so it cannot "
                f"finish. Train longer, or give it an earlier end."
            )

    @override
    def prepare(self, network: Network) -> None:
        refuse_repeated_losses(network.optimizers, type(self).__name__)
        super().prepare(network)
        if self.branches:
            branch_out(network, self.learnt.setdefault("branches", {}))
        if self.expand > 1:
            grow(network, self._eligible(network), self.expand, self.noise, self.generator("growth"))
        self.learnt.update(grown=self._cost(network)(network.graph.widths), floors={})

    @override
    def resume(self, network: Network) -> None:
        if "branches" in self.learnt:
            branch_out(network, self.learnt["branches"])
        self._gated = None
        if "gates" in self.per_unit:  # what was learnt then holds the weights behind them
            gates = {name: gate for name, gate in self.per_unit["gates"].items() if name in network.graph.groups}
            groups = [network.graph.groups[name] for name in gates]
            self._gated = GatedTraining(groups, network.tensors, gates, self.learnt.get("dense"))
            self.learnt["dense"] = self._gated.dense

    @override
    def before_batch(self, network: Network, position: Position) -> None:
        if self.under_way(network) and self.learnt.get("refreshed") != int(position.epoch):
            self.learnt["refreshed"] = int(position.epoch)
            self._refresh(network)

    @override
    def before_step(self, network: Network, optimizer: Optimizer) -> None:
        if not self.under_way(network):
            return
        step = self.step(network, optimizer)
        if self._gated is not None:
            self._gated.before_step(step.rates)
        ceiling = _LARGEST_DECAY / max([*step.rates.values(), torch.finfo(torch.float32).tiny])
        for name, group in step.groups.items():
            scales = self.per_unit["scales"][name]
            add_decay(group, step, (self.strength * scales.median() / scales).clamp_max(ceiling))

    @override
    def after_step(self, network: Network, optimizer: Optimizer) -> None:
        if "branches" in self.learnt:
            move_branches(network, self.learnt["branches"], optimizer)
        if self._gated is not None:
            self._gated.after_step()

    @override
    def carry_out(self, network: Network, level: float) -> None:
        if self._gated is not None and level < 1:  # at the last round they stay in the weights for good
            self._gated.open()
        super().carry_out(network, level)
        self.learnt.pop("dense", None)
        if level == 1:
            self.per_unit.clear()
            self.learnt.pop("branches", None)
        self.resume(network)

    @override
    def select(self, network: Network, level: float) -> dict[str, Tensor]:
        self._refresh(network)
        present, original, fit = network.masks.widths, self._record["original"], self._limits.width
        evidence, self.learnt["floors"] = weighed(self.per_unit["scales"], network.masks.keep)
        if level == 1:
            return self._selection(network, evidence, level)
        cost, target = self._cost(network), self._dense_cost() * (1 - self.remove)

        def expected(counts: Mapping[str, float]) -> float:
            return cost({**present, **{name: round(count) for name, count in counts.items()}})

        least = {name: fit(0, present[name], original[name]) for name in evidence}
        gates = annealed(evidence, level, expected, falling(self.learnt["grown"], target, level), least)
        self.per_unit["gates"] = gates = dict(network.broadcast(gates))
        widths = {n: fit(int((gate >= _SHUT).sum()), present[n], original[n]) for n, gate in gates.items()}
        within = {name: best(evidence[name], width) for name, width in widths.items()}
        return within if expected(widths) >= target else self._selection(network, evidence, 1.0)

    def _refresh(self, network: Network) -> None:
        """Estimate the scale of each unit anew, from the weights behind the gates."""
        tensors = {**network.tensors, **({} if self._gated is None else self._gated.dense)}
        groups, floors = network.graph.groups, self.learnt["floors"]
        weights = {name: entries(groups[name].with_role(*WEIGHT_ROLES), tensors) for name in self._eligible(network)}
        self.per_unit["scales"] = {n: gaussian_scales(w, scale=floors.get(n, 0.0)) for n, w in weights.items()}

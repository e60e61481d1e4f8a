"""Channel pruning by a criterion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Literal, Union

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_prune.budget import Limits, Scope, check_fraction, reachable, select
from lightning_prune.callbacks.base import Shrink
from lightning_prune.callbacks.monitors import Monitors
from lightning_prune.callbacks.naming import Patterns, as_patterns
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.repair import RepairingRounds, RepairName, checked_repair
from lightning_prune.callbacks.support import warn_of_zeros
from lightning_prune.choices import unknown_name
from lightning_prune.compiled import uncompiled_name
from lightning_prune.criteria import Criterion, CriterionName, RunCriterion, criterion_from, normalise
from lightning_prune.criteria.activations import RunningNetwork
from lightning_prune.criteria.base import checked_score, mean_scores
from lightning_prune.errors import BudgetError, ConfigurationError, PruneError
from lightning_prune.graph.activations import watch
from lightning_prune.graph.analysis import Norms
from lightning_prune.graph.channels import ChannelGroup
from lightning_prune.graph.inner import NO_EFFECT
from lightning_prune.graph.labels import NORMALISED_OVER
from lightning_prune.reinit import Reinit, ReinitName
from lightning_prune.schedules import Schedule, ScheduleName
from lightning_prune.text import listed

Measure = Literal["channels", "params", "macs", "latency"]
_TOLD = 4
"""How many of the refusals an error tells."""


class ChannelPruning(RepairingRounds):
    """Removes the least important channels while the network trains, and hands back a smaller network.

    Channels are found by running the module on a real batch; what belongs together goes together, and what cannot be
    proven prunable stays whole and is listed in the report. In each round the channels are scored and selected under
    the budget. With ``shrink="rounds"`` they are removed physically at once: the module computes what it did with the
    removed channels switched off, and its optimizers keep their state for what is left.

    Args:
        criterion: What matters: ``"l1"`` (Li et al., 2017), ``"l2"`` (over all coupled weights), ``"bn_scale"`` (Liu
            et al., 2017), ``"taylor"`` (Molchanov et al., 2016, 2019), ``"hessian"`` (LeCun et al., 1990, by the Fisher
            diagonal), ``"fpgm"`` (He et al., 2019), ``"random"``; of what channels hold while the network runs
            ``"apoz"`` (Hu et al., 2016), ``"hrank"`` (Lin et al., 2020), ``"chip"`` (Sui et al., 2021), ``"nisp"`` (Yu
            et al., 2018), ``"thinet"`` (Luo et al., 2017); or a
            :class:`~lightning_prune.Criterion`, such as an :class:`~lightning_prune.ActivationCriterion` of your own.
        remove: Fraction to remove in all, in [0, 1). Whole channels go, in the order of their scores, until no other
            number of them would come nearer to it.
        of: What it is a fraction of: ``"macs"``, ``"params"`` or ``"latency"`` (measured) of the whole network, or the
            ``"channels"`` of the groups that may be pruned. MACs and latency are those of ``forward`` on
            ``example_input_array`` where the module has one, else of the training step in evaluation mode, with all
            that it runs (a teacher, a second view).
        schedule: When rounds are due: ``"one_shot"``, ``"linear"``, ``"cubic"`` (Zhu & Gupta, 2017), ``"geometric"``,
            ``"cosine"``, or a :class:`~lightning_prune.Schedule`.
        scope: Channels compete with all others (``"global"``), with those of their group (``"group"``), or with those
            of groups of the same shape (``"isomorphic"``, Fang et al., 2024).
        include: Patterns of module names (as in ``fnmatch``), or a single one, whose channels may go; default all.
        exclude: Patterns of module names whose channels stay.
        ratios: Fraction of channels to remove for the groups that match a pattern; the others meet the budget. Of
            several patterns that match, the last one counts. Where there is a fraction for each group, ``remove`` does
            not count.
        round_to: Widths become multiples of this.
        min_channels: Fewest channels of a group, as a number or as a share of its width in (0, 1).
        reinit: What becomes of the weights after each round: ``"keep"``, ``"random"`` (drawn anew), something of the
            initial weights (``"rewind"``, ``"sign"``, ``"distribution"``, ``"magnitude"``, ``"sign+distribution"``),
            or a :class:`~lightning_prune.Reinit`. That is of the whole network, also of layers that ``include`` and
            ``exclude`` leave whole; what is frozen (``requires_grad=False``) stays as it is.
        shrink: Remove channels physically at each round (``"rounds"``), when training ends (``"end"``; masked until
            then), or not at all (``"never"``; nothing gets faster).
        norms: ``"exact"`` keeps whole what a layer, group or RMS norm takes its statistics over, such as the residual
            streams of transformers. ``"approximate"`` lets it go: the shrunk module equals the masked one whose norms
            see the kept channels only, and whose attention scales by the kept width of a head where it computes that
            scale. Training under masks (``shrink="end"``) then ends in a jump.
        inner: Patterns of the names of modules (or tensors) that make the queries, keys or values of attention heads,
            or other channels in equal blocks: equal positions of every head go, not whole heads. Default: whole ones.
        verify: Whether each shrink is compared with the masked network on a real batch, and undone if it differs.
        recalibrate: Number of batches to re-estimate batch-norm statistics on after each round; 0 leaves them.
        seed: Seed of random criteria and reinitialisations.
        directory: Where the final checkpoint ``pruned.ckpt`` and the report are written; default: beside the
            checkpoints of the fit's ``ModelCheckpoint``, if it has one.
        monitors: What the fit's ``EarlyStopping`` and ``ModelCheckpoint`` callbacks that look for the best do about a
            round: go on comparing with what they saw before (``"keep"``), forget it after each round (``"reset"``), or
            after the last one, before which none stops the fit (``"wait"``). No file is deleted for that.
        repair: Whether the weights that read channels are refitted by least squares to those that stay, before the
            others go: not (``"none"``), with one factor for each channel that stays (``"scale"``, as ThiNet does, Luo
            et al., 2017), or such that they take over what they can tell of those that go (``"regression"``, in the
            manner of He et al., 2017). Weights of which it cannot be proven to be safe are left as they are.
        repair_batches: Number of real batches that each round looks at for that.

    Raises:
        ConfigurationError: If an argument is wrong, or can have no effect in this fit.
        BudgetError: If the budget is out of reach on this network; says how much can be reached.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[ChannelPruning(remove=0.5, of="macs")], logger=False)
    """

    def __init__(
        self,
        criterion: Union[CriterionName, Criterion] = "l2",  # noqa: UP007 - jsonargparse shows the names in its help
        remove: float = 0.5,
        of: Measure = "macs",
        schedule: Union[ScheduleName, Schedule] = "cubic",  # noqa: UP007
        scope: Scope = "global",
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        ratios: Mapping[str, float] | None = None,
        round_to: int = 1,
        min_channels: Union[int, float] = 1,  # noqa: UP007
        reinit: Union[ReinitName, Reinit] = "keep",  # noqa: UP007
        shrink: Shrink = "rounds",
        norms: Norms = "exact",
        inner: Patterns | None = None,
        verify: bool = True,
        recalibrate: int = 0,
        seed: int = 0,
        directory: str | None = None,
        monitors: Monitors = "keep",
        repair: RepairName = "none",
        repair_batches: int = 8,
    ) -> None:
        super().__init__(
            remove, of, schedule, reinit, shrink, norms, verify, recalibrate, seed, directory, inner, monitors
        )
        if of not in ("channels", "params", "macs", "latency"):
            raise unknown_name("measure", of, ["channels", "params", "macs", "latency"])
        if scope not in ("global", "group", "isomorphic"):
            raise unknown_name("scope", scope, ["global", "group", "isomorphic"])
        self.criterion = criterion
        self.scope = scope
        self.include = as_patterns("include", include)
        self.exclude = as_patterns("exclude", exclude)
        self.ratios = ratios
        self.round_to = round_to
        self.min_channels = min_channels
        self.repair = repair
        self.repair_batches = repair_batches
        self._repair = checked_repair(repair, repair_batches, self._reinit)
        self._criterion = criterion_from(criterion)
        self._limits = Limits(min_channels, round_to)
        self._dense_latency: float | None = None
        self._latencies: dict[tuple[tuple[str, int], ...], float] = {}
        if not isinstance(ratios, (Mapping, type(None))):
            raise ConfigurationError(f"ratios must map patterns to fractions, as {{'conv1': 0.3}}, but is {ratios!r}.")
        for pattern, ratio in (ratios or {}).items():
            check_fraction(ratio, f"the ratio of {pattern!r}")

    @override
    def prepare(self, network: Network) -> None:
        super().prepare(network)
        warn_of_zeros(network.module)
        self._dense_latency = None
        self._check_patterns(network)
        for pattern, reason in network.graph.refused:
            if reason == NO_EFFECT:
                rank_zero_warn(f"{pattern!r} {reason}: it has no effect, and can be left out.")
        eligible = self._record["eligible"] = self._eligible(network)
        if not eligible:
            raise ConfigurationError(
                f"include={self.include} and exclude={self.exclude} leave no channel group to prune; there are: "
                f"{', '.join(network.graph.groups)}."
            )
        for pattern in self.ratios or ():
            if not any(_matches(network.graph.groups[name], [pattern]) for name in eligible):
                raise ConfigurationError(
                    f"{pattern!r} has a place in ratios, but include={self.include} and exclude={self.exclude} leave "
                    f"all of its channels whole. Take it out of the one or the other."
                )
        if self.of != "latency" and self._all_fixed(network, eligible):
            fixed, widths = self._fixed_ratios(network.graph.groups), network.graph.widths
            cost, original = self._cost(network), self._record["original"]
            least = reachable(eligible, widths=widths, original=original, cost=cost, limits=self._limits, ratios=fixed)
            self._record["goal"] = 1 - least / self._dense_cost()
        if self.of == "latency":  # measuring one for every step of a search is kept for the rounds
            network.cost_function("latency")(network.graph.widths)
        else:
            even = {name: torch.zeros(network.graph.groups[name].width) for name in eligible}
            try:
                self._selection(network, even, 1.0)
            except BudgetError as problem:
                raise _explained(problem, network) from None
        if isinstance(self._criterion, RunCriterion):  # what it cannot score it should not say in the middle of the fit
            self._scores_of_runs(network, self._criterion, batches=1)

    @property
    @override
    def goal(self) -> float:
        return float(self._record.get("goal", self.remove))

    @override
    def select(self, network: Network, level: float) -> dict[str, Tensor]:
        if self.of == "latency":
            # Measured against the present network each time: the machine may be busier than it was, or another one.
            self._latencies.clear()
            left = 1 - self._record["now"]["removed"]
            self._dense_latency = self._cost(network)(network.masks.widths) / left
        scores = self.scores(network)
        if missing := [name for name in self._eligible(network) if name not in scores]:
            raise PruneError(
                f"{type(self).__name__}.scores has given none for {listed(missing, 90)}. It must score every channel "
                f"group that may be pruned."
            )
        unknown = self._without_gradients(scores)
        if self.scope == "global" and self._criterion.normalised:
            scores = {name: normalise(score, network.masks.keep[name]) for name, score in scores.items()}
        known = {name: score for name, score in scores.items() if name not in unknown}
        return self._selection(network, known, level)

    def _without_gradients(self, scores: Mapping[str, Tensor]) -> list[str]:
        """The groups that a criterion which looks at gradients can say nothing of, because none arrive there."""
        if not self._criterion.batches or isinstance(self._criterion, RunCriterion):
            return []
        silent = [name for name, score in scores.items() if not bool(score.any())]
        if silent:
            remedy = (
                f"{type(self._criterion).__name__} cannot score their channels. Exclude what runs under no_grad or is "
                f"detached, or use a criterion that looks at weights only, such as 'l2'."
            )
            if len(silent) == len(scores):
                raise PruneError(f"no gradient of the loss reaches any of {', '.join(silent)}, so {remedy}")
            rank_zero_warn(f"{', '.join(silent)} stay as they are: no gradient of the loss reaches them, so {remedy}")
        return silent

    @override
    def removed(self, network: Network) -> float:
        if self.of == "latency" and self._dense_latency is None:  # nothing was removed in this fit so far
            return float(self._record["now"]["removed"]) if "now" in self._record else 0.0
        self._latencies.clear()
        dense = self._dense_cost()
        return 1 - self._cost(network)(network.masks.widths) / dense if dense > 0 else 0.0

    def scores(self, network: Network) -> dict[str, Tensor]:
        """Score all groups that may be pruned; what a method of its own may do in another way.

        Args:
            network: The network as it is.

        Returns:
            For each such group (others are passed over) scores of shape ``[units]``, the same in all processes; finite,
            higher = keep. With ``scope="global"`` they are divided by their mean over the group, if the criterion says
            so.
        """
        if isinstance(self._criterion, RunCriterion):
            found = self._scores_of_runs(network, self._criterion, self._criterion.batches)
            return {name: network.average(score) for name, score in found.items()}
        groups = {name: network.graph.groups[name] for name in self._eligible(network)}
        found = mean_scores(
            self._criterion, groups, network.tensors, network.probe.gradients(self._criterion.batches),
            self.generator("criterion"),
        )  # fmt: skip
        return {name: network.average(score) for name, score in found.items()}

    def _scores_of_runs(self, network: Network, criterion: RunCriterion, batches: int) -> dict[str, Tensor]:
        """Scores in this process of all groups that may be cut, by a criterion that looks at runs of the network."""
        groups = network.graph.groups
        runs = [partial(watch, network.graph, program) for program in network.probe.evaluations(batches)]
        wanted = self._eligible(network)
        found = criterion.scores(RunningNetwork(groups, network.tensors, runs), wanted, self.generator("criterion"))
        return {name: checked_score(groups[name], found[name]) for name in wanted}

    def _selection(self, network: Network, scores: Mapping[str, Tensor], level: float) -> dict[str, Tensor]:
        groups = network.graph.groups
        return select(
            scores,
            widths=network.graph.widths,
            original=self._record["original"],
            cost=self._cost(network),
            allowed=math.inf if self._all_fixed(network, scores) else self._dense_cost() * (1 - self.remove * level),
            scope=self.scope,
            limits=self._limits,
            patterns={name: group.pattern for name, group in groups.items()},
            ratios={name: ratio * level for name, ratio in self._fixed_ratios(groups).items() if name in scores},
            keep=network.masks.keep,
            dense=self._dense_cost(),
            of=self.of,
        )

    def _cost(self, network: Network) -> Callable[[Mapping[str, int]], float]:
        if self.of == "latency":
            return lambda widths: self._latency_at(network, widths)
        if self.of != "channels":
            return network.cost_function(self.of)
        eligible: list[str] = self._record.get("eligible", [])
        return lambda widths: sum(network.with_others(widths)[name] for name in eligible)

    def _latency_at(self, network: Network, widths: Mapping[str, int]) -> float:
        """Measured once for the same widths, so that noise does not make a network cheaper than itself."""
        key = tuple(widths.items())
        if key not in self._latencies:
            self._latencies[key] = network.cost_function("latency")(widths)
        return self._latencies[key]

    def _dense_cost(self) -> float:
        if self.of == "channels":
            return float(sum(self._record["original"][name] for name in self._record.get("eligible", ())))
        if self.of == "latency":
            assert self._dense_latency is not None
            return self._dense_latency
        return float(self._record["before"]["parameters" if self.of == "params" else "macs"])

    def _eligible(self, network: Network) -> list[str]:
        return [
            name
            for name, group in network.graph.groups.items()
            if (self.include is None or _matches(group, self.include)) and not _matches(group, self.exclude or ())
        ]

    def _fixed_ratios(self, groups: Mapping[str, ChannelGroup]) -> dict[str, float]:
        return {
            name: ratio
            for name, group in groups.items()
            for pattern, ratio in (self.ratios or {}).items()
            if _matches(group, [pattern])
        }

    def _all_fixed(self, network: Network, names: Iterable[str]) -> bool:
        """Whether each of these groups loses a fixed fraction, so that the budget has nothing to choose."""
        return self._fixed_ratios(network.graph.groups).keys() >= set(names)

    def _check_patterns(self, network: Network) -> None:
        groups = network.graph.groups.values()
        for option, patterns in (("include", self.include), ("exclude", self.exclude), ("ratios", self.ratios)):
            for pattern in patterns or ():
                if not any(_matches(group, [pattern]) for group in groups):
                    known = [path for group in groups for path in _makers(group)]
                    raise unknown_name(f"channel group in {option}", pattern, dict.fromkeys(known))


def _makers(group: ChannelGroup) -> list[str]:
    """Names under which a group is known: its own, and those of all modules that make its channels."""
    return [uncompiled_name(path) for path in (group.name, *group.makers)]


def _matches(group: ChannelGroup, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for path in _makers(group) for pattern in patterns)


def _explained(problem: BudgetError, network: Network) -> BudgetError:
    """The same error with the largest of what is refused, and whether approximate norms would let more go."""
    refused = network.graph.refused
    sizes = {name: tensor.numel() for name, tensor in network.tensors.items()}
    largest = sorted(refused, key=lambda refusal: -sizes.get(refusal.path.partition(" ")[0], 0))[:_TOLD]
    streams = [path for path, reason in refused if reason.startswith(NORMALISED_OVER)]
    remedy = (
        f" Or let norms follow: with norms='approximate' channels that they take their statistics over may go too "
        f"(here {listed(streams, 90)})."
        if streams
        else ""
    )
    reasons = "; ".join(f"{path}: {reason}" for path, reason in largest)
    return BudgetError(f"{problem}{remedy} Among what stays whole: {reasons}." if reasons else f"{problem}{remedy}")

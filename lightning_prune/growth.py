"""Wider networks that compute the same: units are copied, and what reads them is shared out among the copies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_prune.errors import ConfigurationError, ShrinkError
from lightning_prune.graph.analysis import Analysis
from lightning_prune.graph.channels import ChannelGraph, ChannelGroup
from lightning_prune.graph.program import forget_caches
from lightning_prune.surgery.attributes import Remembered, integer_settings, write_settings
from lightning_prune.surgery.constructors import Descriptions
from lightning_prune.surgery.resize import Cut, Saved, resize, resize_optimizers, restore
from lightning_prune.surgery.symbols import Setting
from lightning_prune.surgery.verify import Observed, largest_difference, outputs

Place = tuple[str, int]
"""A tensor's name and one of its dimensions."""
Copies = Mapping[str, Tensor]
"""For each group that grows how often each of its units is there afterwards, int64 of shape ``[units]``, at least 1."""


@dataclass(frozen=True)
class Widening:
    """Which tensors change, and how; the same for a network and for averages of its weights.

    Attributes:
        cuts: The new axes, as positions of the old ones; they repeat.
        readers: Where the copies of a unit are read, and have to share what was read of it before.
    """

    cuts: Mapping[str, Sequence[Cut]]
    readers: Sequence[Place]

    def apply(self, tensors: Mapping[str, Tensor], noise: float, generator: torch.Generator) -> list[Saved]:
        """Widen tensors in place; returns what was there."""
        known = {name: axes for name, axes in self.cuts.items() if name in tensors}
        saved = resize(tensors, known)
        for name, dim in self.readers:
            for cut in known.get(name, ()):
                if cut.dim == dim:
                    share_out(tensors[name], cut, noise, generator)
        return saved


@dataclass(frozen=True)
class Widened:
    """What a growth did.

    Attributes:
        widening: How tensors changed.
        settings: Integer attributes that were rewritten, with their new values.
        error: Largest difference of the outputs, relative to their largest value.
    """

    widening: Widening
    settings: Mapping[Setting, int]
    error: float


def copies_for(width: int, expand: float, generator: torch.Generator) -> Tensor:
    """How often each unit of a group is to be there so that it becomes wider by a factor; a random choice gets more.

    Args:
        width: Number of units.
        expand: The factor, at least 1.
        generator: Source of the choice.

    Example:
        >>> sorted(copies_for(4, 1.5, torch.Generator().manual_seed(0)).tolist())
        [1, 1, 2, 2]
    """
    wanted = math.floor(width * expand + 0.5)
    copies = torch.full((width,), wanted // width)
    copies[torch.randperm(width, generator=generator)[: wanted % width]] += 1
    return copies


def widened_axis(owners: Tensor, copies: Tensor) -> Tensor:
    """The positions of an axis that make the wider one; copies of neighbouring positions of one unit stay together.

    Args:
        owners: For each position the number of its unit, or -1, int64 of shape ``[positions]``.
        copies: How often each unit is to be there.

    Example:
        >>> widened_axis(torch.tensor([0, 0, 1, 1, -1]), torch.tensor([2, 1])).tolist()
        [0, 1, 0, 1, 2, 3, 4]
    """
    runs, lengths = torch.unique_consecutive(owners, return_counts=True)
    times = torch.where(runs < 0, torch.ones_like(runs), copies[runs.clamp(min=0)])
    parts = torch.arange(len(owners)).split(lengths.tolist())
    return torch.cat([part.repeat(n) for part, n in zip(parts, times.tolist(), strict=True)])


def share_out(tensor: Tensor, cut: Cut, noise: float, generator: torch.Generator) -> None:
    """Divide what reads a unit among its copies, in place, so that they add up to what it was.

    Args:
        tensor: The widened tensor.
        cut: How it was widened.
        noise: Size of what is moved at random from some copies to others, relative to the entries of the tensor.
            Without it copies would stay alike for ever; with it the sum is the same.
        generator: Source of the noise.

    Example:
        >>> weight = torch.tensor([[4.0, 4.0, 1.0]])
        >>> share_out(weight, Cut(1, torch.tensor([0, 0, 1])), 0.0, torch.Generator())
        >>> weight
        tensor([[2., 2., 1.]])
    """
    counts = torch.bincount(cut.positions)
    along = [len(cut.positions) if dim == cut.dim else 1 for dim in range(tensor.dim())]
    value = tensor.detach()
    positions = cut.positions.to(value.device)
    number = counts.to(value)
    value /= number[positions].view(along)
    if noise > 0:
        drawn = torch.randn(value.shape, generator=generator).to(value)
        along[cut.dim] = len(counts)
        shape = [len(counts) if dim == cut.dim else size for dim, size in enumerate(value.shape)]
        means = value.new_zeros(shape).index_add_(cut.dim, positions, drawn) / number.view(along)
        value += noise * value.square().mean().sqrt() * (drawn - means.index_select(cut.dim, positions))


def is_shareable(group: ChannelGroup) -> bool:
    """Whether all that uses the units are weights, which can be shared out among copies.

    It is not so where a unit is switched off in the weights that make it, as that of a query and a key is.

    Args:
        group: A channel group.
    """
    return bool(group.off) and not group.approximate and all(slot.role == "consumer" for slot in group.off)


def growable(graph: ChannelGraph, copies: Copies) -> list[str]:
    """The groups of which it is found by trial, undone each time, that the network computes the same with copies.

    Args:
        graph: A traced graph.
        copies: For each group in question how often each unit would be there.
    """
    analysis = _evidence(graph)
    names = [name for name in copies if is_shareable(graph.groups[name])]
    if names and not _works(analysis, {name: copies[name] for name in names}):
        return [name for name in names if _works(analysis, {name: copies[name]})]
    return names


def widen(
    graph: ChannelGraph,
    copies: Copies,
    optimizers: Iterable[Optimizer] = (),
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Widened:
    """Widen a network in place without a change to what it computes (Net2WiderNet, Chen et al., 2016).

    Parameters stay the same objects. Units are copied with all that makes them, whatever shape that has; the weights
    that read a unit are divided among its copies. The result is compared with what was on real inputs.

    Args:
        graph: Channel graph of the network; stale afterwards, trace again.
        copies: For each group that grows how often each unit is there afterwards.
        optimizers: Optimizers whose state is widened along.
        noise: As for :func:`share_out`; the network computes the same whatever it is. The source adds noise to what
            makes the copies, and so changes the network a little.
        generator: Source of the noise.

    Raises:
        ConfigurationError: If the copies do not fit the groups, or the graph was not traced.
        ShrinkError: If the wider network computes something else. It is as it was then, and so are the optimizers.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
        >>> _ = widen(trace(net, torch.randn(5, 4)), {"0": torch.tensor([1, 2])})
        >>> net
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
          (2): Linear(in_features=3, out_features=3, bias=True)
        )
    """
    analysis = _evidence(graph)
    _check(analysis, copies)
    trial = _Trial(analysis, copies, noise, generator or torch.Generator())
    try:
        error = trial.prove()
        resize_optimizers(optimizers, trial.tensors, trial.widening.cuts, trial.saved)
    except BaseException as problem:
        trial.undo()
        if not isinstance(problem, Exception) or isinstance(problem, ShrinkError):
            raise
        raise ShrinkError(f"{', '.join(copies)} cannot be widened: {problem}. Nothing was changed") from problem
    forget_caches(analysis.model)
    return Widened(trial.widening, trial.settings, error)


class _Trial:
    """A growth that was applied and can be undone."""

    def __init__(self, analysis: Analysis, copies: Copies, noise: float, generator: torch.Generator) -> None:
        self._analysis, self._model = analysis, analysis.model
        loose = {name: tensor for name, (tensor, _) in analysis.loose.items()}
        self.tensors: dict[str, Tensor] = {**analysis.tensors, **loose}
        self._widths = {name: int(copies[name].sum()) if name in copies else len(u) for name, u in _units(analysis)}
        self._original = integer_settings(self._model)
        self._remembered = Remembered(self._model, self._original)
        self._descriptions = Descriptions(self._model)
        self._expected = outputs(analysis)
        self.settings: dict[Setting, int] = {}
        self.widening = _planned(analysis, copies)
        self.saved = self.widening.apply(self.tensors, noise, generator)

    def prove(self) -> float:
        """Follow in the integers that modules remember, then compare; the largest difference."""
        laws = self._analysis.laws
        values = {s: laws[s].size(self._widths) for s, value in self._original.items() if s in laws and value > 0}
        known = {s: Fraction(value, self._original[s]) for s, value in values.items()}
        described = {**self._descriptions.settings({}), **self._descriptions.settings(known)}
        values = {**{s: value for s, value in described.items() if s in self._original}, **values}
        self.settings = {s: value for s, value in values.items() if value != self._original[s]}
        write_settings(self._model, self.settings)
        for run in self._analysis.runs:
            if run.program.training:
                run.program.run()
        found = outputs(self._analysis, self._expected)
        if _shapes(found) != _shapes(self._expected):
            raise ShrinkError("an output of the network would have another shape")
        return largest_difference(self._expected, found)

    def undo(self) -> None:
        restore(self.saved)
        self._remembered.restore()


def _works(analysis: Analysis, copies: Copies) -> bool:
    trial = _Trial(analysis, copies, 0.0, torch.Generator())
    try:
        trial.prove()
    except Exception:  # whatever the user's code may say to a width that it does not expect
        return False
    finally:
        trial.undo()
    return True


def _planned(analysis: Analysis, copies: Copies) -> Widening:
    """How each tensor with positions of units that are copied has to change."""
    number = torch.full((analysis.space.count,), -1)
    count = 0
    for name, roots in _units(analysis):
        if name in copies:
            number[roots] = torch.arange(count, count + len(roots))
            count += len(roots)
    times = torch.cat([copies[name].cpu() for name, _ in _units(analysis) if name in copies])
    axes = [(leaf.tensor, leaf.dim, leaf.ids) for leaf in analysis.leaves]
    axes += [
        (name, plane.dims[0], plane.ids.flatten()) for name, (_, labels) in analysis.loose.items()
        for plane in labels.planes
    ]  # fmt: skip
    cuts: dict[str, list[Cut]] = {}
    for name, dim, ids in axes:
        owners = number[analysis.root(ids)]
        positions = widened_axis(owners, times)
        if len(positions) != len(owners):
            cuts.setdefault(name, []).append(Cut(dim, positions))
    slots = (slot for name in copies for slot in analysis.groups[name].with_role("consumer"))
    return Widening(cuts, list(dict.fromkeys((slot.tensor, slot.dim) for slot in slots)))


def _units(analysis: Analysis) -> list[tuple[str, Tensor]]:
    return list(analysis.units.items())


def _shapes(observed: Observed) -> list[tuple[int, ...]]:
    return [tuple(output.value.shape) for output in observed.outputs]


def _evidence(graph: ChannelGraph) -> Analysis:
    if graph.evidence is None:
        raise ConfigurationError("this channel graph was not made by trace(); only a traced network can be widened")
    return graph.evidence


def _check(analysis: Analysis, copies: Copies) -> None:
    for name, times in copies.items():
        if name not in analysis.groups:
            known = ", ".join(analysis.groups)
            raise ConfigurationError(f"no channel group is called '{name}' that could be widened; there are: {known}")
        width = analysis.groups[name].width
        if times.shape != (width,) or times.is_floating_point() or bool((times < 1).any()):
            raise ConfigurationError(f"group '{name}' has {width} units, and each must be there once or more often")

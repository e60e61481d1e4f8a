"""Seeing the channels of groups while the network runs, right where an operator reads them with a parameter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.errors import PruneError, TraceError
from lightning_prune.graph.analysis import Analysis, Run
from lightning_prune.graph.calls import SAME_AS_VIEW, hands_on, operator_name, tensors_among
from lightning_prune.graph.channels import ChannelGraph, Slot
from lightning_prune.graph.labels import Witness, compact, varying
from lightning_prune.graph.observation import is_observed, unobserved
from lightning_prune.graph.one_way import decomposed
from lightning_prune.graph.program import Program, map_nested
from lightning_prune.graph.tracer import Event

_HALVES = (torch.float16, torch.bfloat16)
_REMEDY = "Choose a criterion that looks at weights or gradients, such as 'l2' or 'taylor'"


@dataclass(frozen=True, eq=False)
class Place:
    """Where the channels of a group lie in a tensor.

    Args:
        group: Name of the group.
        dim: The dimension that they vary along.
        size: Size of that dimension.
        index: Positions along it of each unit, ``[units, entries]``.
    """

    group: str
    dim: int
    size: int
    index: Tensor


@dataclass(frozen=True, eq=False)
class Reading:
    """One executed operator that reads the channels of a group with a parameter.

    It holds on to the tensors of a running network; keep what you have worked out from it, not itself.

    Args:
        place: Where the channels lie in what is read.
        slot: The consumer slot of the group that they are read with.
        response: What the operator returned.
        made: For dimensions of the slot's tensor, the dimension of ``response`` that holds what is made along it.
        data: The tensor that is read, in single precision or better.
        call: Executes the operator again on another tensor in the place of ``data``, with parameters as they are by
            then, in single precision or better: what was cast for half precision is taken as it was.
        source: Where the channels lay, and in what, before their maps were pooled to single values or flattened; None
            where ``data`` has maps itself, or was not made from any.
    """

    place: Place
    slot: Slot
    response: Tensor
    made: dict[int, int]
    data: Tensor = field(repr=False)
    call: Callable[[Tensor], Tensor] = field(repr=False)
    source: tuple[Place, Tensor] | None = field(default=None, repr=False)

    @property
    def group(self) -> str:
        """Name of the group that is read."""
        return self.place.group

    @cached_property
    def maps(self) -> Tensor:
        """The channels, ``[samples, units, entries, ...]``.

        A unit has one entry or several (the channels of a head, or a map that was flattened); what follows are
        dimensions that are no channels, such as height and width.
        """
        return _arranged(self.data, self.place)

    @property
    def feature_maps(self) -> Tensor | None:
        """The channels as maps of height and width, ``[samples, units, entries, ..., height, width]``.

        Those that are read, or else those from which single values or vectors were made that are read. None where
        there are no maps of at least 2 x 2.
        """
        place, tensor = self.source or (self.place, self.data)
        maps = _arranged(_precise(tensor), place)
        return maps if maps.dim() >= 5 and min(maps.shape[-2:]) >= 2 else None

    @property
    def channels(self) -> Tensor:
        """The channels, ``[samples, units, positions]``; positions are everything that belongs to one unit."""
        return self.maps.flatten(2)

    def contributions(self, weights: Tensor) -> Tensor:
        """What each unit adds to a weighted sum of the response.

        Args:
            weights: Of the shape of ``response``.

        Returns:
            Shape ``[samples, units]``. The sum over both is the weighted sum itself, but for the operator's bias.
        """

        def slope() -> Tensor:
            with torch.enable_grad():
                data = self.data.detach().requires_grad_()
                response = self.call(data)
                return torch.autograd.grad(response, data, weights.to(response))[0]

        # Inside the execution of an operator autograd is switched off in this thread.
        with ThreadPoolExecutor(1) as thread:
            return _arranged(self.data * thread.submit(slope).result(), self.place).flatten(2).sum(2)


def _arranged(tensor: Tensor, place: Place) -> Tensor:
    """The channels in a tensor as ``[samples, units, entries, ...]``."""
    units, entries = place.index.shape
    chosen = tensor.detach().index_select(place.dim, place.index.flatten().to(tensor.device)).movedim(place.dim, 0)
    return chosen.reshape(units, entries, *(chosen.shape[1:] or (1,))).movedim(2, 0)


def _has_maps(tensor: Tensor) -> bool:
    """Whether there are channels, height and width, wherever they lie behind the samples."""
    return sum(size >= 2 for size in tensor.shape[1:]) >= 3


Observer = Callable[[Reading], None]
Recipes = MutableMapping[Tensor, tuple[OpOverload, Any, Any, int]]
"""Which result of which operator, and on what, tensors are that are made of parameters alone."""


class _Watcher(TorchDispatchMode):
    """Follows the record of a program and hands out what is read with parameters."""

    def __init__(self, graph: ChannelGraph, analysis: Analysis, run: Run, observer: Observer) -> None:
        """See :func:`watch`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph, self._analysis, self._run, self._observer = graph, analysis, run, observer
        self._position = 0
        self._parameters = dict(analysis.model.named_parameters()).keys()
        self._consumers: dict[str, list[Slot]] = {
            name: list(group.with_role("consumer")) for name, group in graph.groups.items()
        }
        self._readers = {slot.tensor for slots in self._consumers.values() for slot in slots}
        self._origins: MutableMapping[Tensor, frozenset[str]] = WeakTensorKeyDictionary()
        self._recipes: Recipes = WeakTensorKeyDictionary()
        for name, tensor in analysis.tensors.items():
            self._origins[tensor] = frozenset({name})
        for tensor, _ in analysis.loose.values():
            self._origins[tensor] = frozenset()
        self._sources: MutableMapping[Tensor, tuple[Tensor, Witness]] = WeakTensorKeyDictionary()

    def is_made_up(self, tensor: Tensor) -> bool:
        """Nothing is: here the numbers count."""
        return False

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute the operator, then hand out what it read."""
        kwargs = kwargs or {}
        if not is_observed():
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # which is for the user's calls
            name = operator_name(func)
            event = None if hands_on(name, args) else self._due("view" if name in SAME_AS_VIEW else name)
            result = func(*args, **kwargs)
            tensors = tensors_among((*args, *kwargs.values()))
            origins = [self._origins.get(tensor) for tensor in tensors]
            self._derive(func, args, kwargs, result, origins)
            if event is None:
                self._keep_maps(result, tensors, [None] * len(tensors), origins)
            elif not self._hand_out(func, args, kwargs, event, tensors, origins, result):
                self._keep_maps(result, tensors, event.inputs, origins)
            return result

    def _due(self, name: str) -> Event:
        """The recorded operator that must be executed now."""
        events, position = self._run.events, self._position
        if position >= len(events) or events[position].name != name:
            recorded = f"{events[position].name} ({events[position].line})" if position < len(events) else "nothing"
            raise self._off_course(f"executes {name} where it executed {recorded}")
        self._position += 1
        return events[position]

    def check_end(self) -> None:
        """Raise if the program ended before its record."""
        if self._position < len(self._run.events):
            raise self._off_course(f"ends before {self._run.events[self._position].name}")

    def _off_course(self, what: str) -> TraceError:
        return TraceError(
            f"{self._run.program.name} takes another course on this batch than when it was traced: it {what}. What it "
            f"computes there cannot be told apart into channels. {_REMEDY}."
        )

    def _derive(
        self, func: OpOverload, args: Any, kwargs: Any, result: Any, origins: Sequence[frozenset[str] | None]
    ) -> None:
        """Note how the results of an operator are made of parameters and buffers, if of nothing else, and of which."""
        known = [names for names in origins if names is not None]
        for number, tensor in enumerate(tensors_among((result,))):
            if len(known) == len(origins):
                self._origins[tensor] = frozenset().union(*known)
            else:
                self._origins.pop(tensor, None)
            if known and len(known) == len(origins) and not func._schema.is_mutable:
                self._recipes[tensor] = func, args, kwargs, number
            else:
                self._recipes.pop(tensor, None)

    def _keep_maps(
        self,
        result: Any,
        tensors: Sequence[Tensor],
        witnesses: Sequence[Witness | None],
        origins: Sequence[frozenset[str] | None],
    ) -> None:
        """Note which maps the results of an operator were made from, where they are none and came from nothing else."""
        data = [number for number, names in enumerate(origins) if names is None]
        if len(data) != 1:
            return
        tensor, witness = tensors[data[0]], witnesses[data[0]]
        source = (tensor, witness) if _has_maps(tensor) and witness is not None else self._sources.get(tensor)
        for made in tensors_among((result,)):
            if source is not None and not _has_maps(made):
                self._sources[made] = source

    def _hand_out(
        self,
        func: OpOverload,
        args: Any,
        kwargs: Any,
        event: Event,
        tensors: Sequence[Tensor],
        origins: Sequence[frozenset[str] | None],
        result: Any,
    ) -> bool:
        """Show what an operator reads with a parameter, if anything."""
        parameters = frozenset().union(*(names for names in origins if names is not None))
        if not parameters & self._readers:
            return False
        shown = False
        for tensor, names, witness in zip(tensors, origins, event.inputs, strict=True):
            for place in self._places(witness) if names is None else ():
                slots = [slot for slot in self._consumers[place.group] if slot.tensor in parameters]
                if not slots:
                    continue
                if tensor.shape[place.dim] != place.size:
                    raise self._off_course(f"gives {event.name} a tensor of shape {tuple(tensor.shape)}")
                slot = min(slots, key=lambda slot: slot.tensor not in self._parameters)  # rather than a mask of it
                call = _again(func, args, kwargs, tensor, self._recipes)
                response = tensors_among((result,))[-1]
                source = self._source(tensor, place)
                self._show(Reading(place, slot, response, self._made(slot, event), _precise(tensor), call, source))
                shown = True
        return shown

    def _source(self, tensor: Tensor, place: Place) -> tuple[Place, Tensor] | None:
        """The maps of a group that a tensor was made from, if it is none itself."""
        if tensor not in self._sources:
            return None
        maps, witness = self._sources[tensor]
        return next(((other, maps) for other in self._places(witness) if other.group == place.group), None)

    def _places(self, witness: Witness) -> Iterator[Place]:
        """Where which groups lie in a tensor."""
        analysis = self._analysis
        for plane in witness.planes:
            roots = analysis.root(plane.ids)
            roots = compact(roots) if len(varying(roots)) > 1 else roots
            if len(varying(roots)) != 1:
                continue
            dim, roots = varying(roots)[0], roots.flatten()
            numbers = analysis.group_of[roots]
            for number in torch.unique(numbers[numbers >= 0]).tolist():
                name = analysis.group_names[number]
                positions = (numbers == number).nonzero().flatten()
                sorted_units, order = analysis.units[name].sort()
                unit = order[torch.searchsorted(sorted_units, roots[positions])]
                counts = torch.bincount(unit, minlength=len(order))
                if name in self._graph.groups and bool((counts == counts[0]).all()):
                    index = positions[torch.argsort(unit, stable=True)].reshape(len(order), -1)
                    yield Place(name, dim, len(roots), index)

    def _made(self, slot: Slot, event: Event) -> dict[int, int]:
        """Dimensions of the response that hold what is made along the other dimensions of a slot's tensor."""
        united, made = self._analysis.united, {}
        for leaf in self._analysis.leaves:
            if leaf.tensor != slot.tensor or leaf.dim == slot.dim:
                continue
            for plane in event.witnesses[-1].planes:
                if len(plane.dims) == 1 and torch.equal(united[plane.ids.flatten()], united[leaf.ids]):
                    made[leaf.dim] = plane.dims[0]
        return made

    def _show(self, reading: Reading) -> None:
        try:
            with unobserved(), torch.no_grad():
                self._observer(reading)
        except PruneError:
            raise
        except Exception as error:
            raise PruneError(
                f"looking at channel group {reading.group!r}, where it is read with {reading.slot.tensor!r}, failed "
                f"with {type(error).__name__}: {error}"
            ) from error


def _again(func: OpOverload, args: Any, kwargs: Any, data: Tensor, recipes: Recipes) -> Callable[[Tensor], Tensor]:
    """Executes an operator on another tensor in the place of ``data``, without writing into what it was given."""

    def call(other: Tensor) -> Tensor:
        def given(tensor: Tensor) -> Tensor:
            if tensor is data:
                return _precise(other)
            tensor = _made_anew(recipes, tensor)
            return tensor.clone() if func._schema.is_mutable else tensor

        return _executed(func, args, kwargs, given, -1)

    return call


def _made_anew(recipes: Recipes, tensor: Tensor) -> Tensor:
    """A tensor made of parameters, as they are now; any other as it is."""
    if tensor not in recipes:
        return _precise(tensor)
    func, args, kwargs, number = recipes[tensor]
    return _executed(func, args, kwargs, partial(_made_anew, recipes), number)


def _executed(func: OpOverload, args: Any, kwargs: Any, given: Callable[[Tensor], Tensor], number: int) -> Tensor:
    """One of the tensors that an operator returns, given other tensors, without a cast to half precision."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return given(value)
        return torch.float32 if value in _HALVES else value

    result = func(*map_nested(changed, tuple(args)), **map_nested(changed, dict(kwargs)))
    return tensors_among((result,))[number]


def _precise(tensor: Tensor) -> Tensor:
    """In single precision or better."""
    return tensor.float() if tensor.dtype in _HALVES else tensor


def watch(graph: ChannelGraph, program: Program, observer: Observer) -> None:
    """Run a program and hand out each group's channels wherever an operator reads them with a parameter.

    No module is named or hooked: the operators are followed along the record of the trace, which knows the channels in
    each of their inputs. A group that several operators read is handed out as often, in the order of execution; one
    that none reads with a parameter (the query, which meets the key) is not handed out.

    Args:
        graph: The channel graph of the network as it is.
        program: A way of running it that the graph was traced with, by its name; it may run on another batch.
        observer: Called with each reading while the network runs. What it keeps stays in memory.

    Raises:
        TraceError: If the program could not be run when the graph was traced, or takes another course now.
        PruneError: If the observer fails.

    Example:
        >>> from torch import nn
        >>> from lightning_prune import trace
        >>> from lightning_prune.graph.program import module_programs
        >>> net, inputs = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
        >>> def show(reading):
        ...     print(reading.group, "is read with", reading.slot.tensor, list(reading.channels.shape))
        >>> watch(trace(net, inputs), module_programs(net, inputs)[0], show)
        0 is read with 2.weight [3, 8, 1]
    """
    analysis = graph.evidence
    runs: dict[str, list[Run]] = defaultdict(list)
    for run in analysis.runs if analysis is not None else ():
        runs[run.program.name].append(run)
    if analysis is None or not runs[program.name]:
        raise TraceError(
            f"{program.name} could not be run when the network was traced, so its channels cannot be looked at while "
            f"it runs. {_REMEDY}."
        )
    watcher = _Watcher(graph, analysis, runs[program.name][0], observer)
    with decomposed(watcher), watcher:
        program.run()
    watcher.check_end()

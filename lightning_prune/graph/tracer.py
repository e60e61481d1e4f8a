"""The tracer: runs a network for real and carries labels through every operator it executes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.graph.blocks import share_blocks_only
from lightning_prune.graph.calls import (
    SAME_AS_VIEW,
    Call,
    Labelled,
    Numbers,
    Planes,
    Rule,
    hands_on,
    operator_name,
    tensors_among,
)
from lightning_prune.graph.dry_run import NumbersNeededError, leave_out, reads_numbers
from lightning_prune.graph.labels import Labels, LabelSpace, Plane, Witness, user_line
from lightning_prune.graph.observation import is_observed
from lightning_prune.graph.one_way import decomposed
from lightning_prune.graph.program import Program, map_nested, tensors_in
from lightning_prune.graph.selections import Selections, is_selection


class Event(NamedTuple):
    """One executed operator.

    Args:
        name: Its name.
        constants: The arguments that must not change.
        sizes: The arguments that may, because they are sizes.
        inputs: The tensors it was given.
        witnesses: What it saw while it worked and, at the end, what it returned.
        line: The line of the user's code that called it.
    """

    name: str
    constants: tuple[object, ...]
    sizes: tuple[object, ...]
    inputs: tuple[Witness, ...]
    witnesses: tuple[Witness, ...]
    line: str


class Result(NamedTuple):
    """What a rule said of a call; the inputs are kept alive so that no other labels take their place in memory."""

    outputs: tuple[Planes, ...]
    witnesses: tuple[Witness, ...]
    values: tuple[object, ...]
    inputs: tuple[Witness, ...]


Memory = dict[object, Result]


class Counted(NamedTuple):
    """One executed operator that multiplies and accumulates."""

    function: object
    arguments: tuple[object, ...]
    result: Labelled


class Tracer(TorchDispatchMode):
    """Carries labels through every ATen operator executed inside it.

    Args:
        space: Where labels come from and what is learnt about them is kept.
        leaves: Labels of every parameter and buffer.
        find_rule: Gives the rule of an operator.
        compared: Whether the numbers that come out will be compared with those of the shrunk network.
        dry: Whether to leave out the costly arithmetic on data.
        memory: What rules said about calls before; to be shared by tracers with one label space.
        selections: Where to record what is selected by its numbers, or what to play back.
    """

    def __init__(
        self,
        space: LabelSpace,
        leaves: Sequence[tuple[Tensor, Labels]],
        find_rule: Callable[[OpOverload], Rule],
        compared: bool,
        dry: bool,
        memory: Memory | None = None,
        selections: Selections | None = None,
    ) -> None:
        """See the class."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.space = space
        self.events: list[Event] = []
        self.counted: list[Counted] = []
        self.touched: set[int] = set()
        self.dtypes: set[torch.dtype] = set()
        self.selects = False
        self.compared = compared
        self.dry = dry
        self._find_rule = find_rule
        self.selections = selections or Selections()
        self._memory = {} if memory is None else memory
        self._labels: MutableMapping[Tensor, Labels] = WeakTensorKeyDictionary()
        self._leaves = {id(tensor) for tensor, _ in leaves}
        for tensor, labels in leaves:
            self._labels[tensor] = labels

    def labels_of(self, tensor: Tensor) -> Labels:
        """The labels of a tensor; none for what came from outside."""
        return self._labels.get(tensor) or Labels()

    def new_labels(self, shape: Sequence[int], dims: Sequence[int]) -> Planes:
        """Labels for a tensor made from nothing, along some dimensions."""
        return self.space.fresh([size if dim in dims else 1 for dim, size in enumerate(shape)])

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute the operator, then carry the labels over."""
        with torch._C.DisableTorchFunction():  # which is for the user's calls, and slow
            return self._dispatched(func, args, kwargs or {})

    def _dispatched(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        if not is_observed():
            return func(*args, **kwargs)
        labels = [self.labels_of(tensor) for tensor in (*tensors_among(args), *tensors_among(kwargs.values()))]
        static = all(known.static for known in labels)
        unreal = any(known.made_up for known in labels)
        if unreal and reads_numbers(func, args):
            raise NumbersNeededError
        handed_on = hands_on(operator_name(func), args)
        left_out = leave_out(func, args, kwargs, unreal) if self.dry and not static else None
        selects = not static and is_selection(func, args)
        self.selects = self.selects or selects
        if left_out is not None:
            result = left_out.result
        elif selects:
            result = self.selections.run(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        self._carry(Call(self, func, args, kwargs, result, handed_on), unreal or left_out is not None)
        return result

    def is_made_up(self, tensor: Tensor) -> bool:
        """Whether the numbers of a tensor come from a dry run."""
        return self.labels_of(tensor).made_up

    def _carry(self, call: Call, unreal: bool) -> None:
        self.touched.update(id(tensor) for tensor in call.tensors if id(tensor) in self._leaves)
        constants, sizes = call.numbers()
        outputs = self.follow(call, constants, sizes)
        static = call.static and not _is_drawn(call)
        for tensor, planes in zip(call.outputs, outputs, strict=True):
            self._forget_zero(call, tensor, planes)
            self._labels[tensor] = Labels(planes, static, unreal)
            self.dtypes.add(tensor.dtype)
        self.count(call, outputs)

    def follow(self, call: Call, constants: Numbers, sizes: Numbers) -> Sequence[Planes]:
        """Labels of the outputs of a call; notes what was executed."""
        result = self.remembered(call, constants, sizes)
        if not call.hands_on:
            name = "view" if call.name in SAME_AS_VIEW else call.name
            seen = zip(call.outputs, result.outputs, strict=True)
            witnesses = (*result.witnesses, *(Witness(tuple(tensor.shape), planes) for tensor, planes in seen))
            self.emit(Event(name, (*result.values, *constants), sizes, call.inputs(), witnesses, user_line()))
        return result.outputs

    def remembered(self, call: Call, constants: Numbers, sizes: Numbers) -> Result:
        """What the rule says of a call, asked once for equal calls on tensors with the same labels."""
        inputs = call.inputs()
        shapes = tuple(tuple(output.shape) for output in call.outputs)
        labels = tuple((w.shape, tuple((id(plane.ids), plane.zero) for plane in w.planes)) for w in inputs)
        static = tuple(call.is_static(tensor) for tensor in call.tensors)
        key = (call.function, constants, sizes, labels, static, shapes, self.compared)
        if key in self._memory:
            return self._memory[key]
        outputs = tuple(self._settled(planes) for planes in self.apply_rule(call))
        result = Result(outputs, tuple(call.witnesses), tuple(call.values), inputs)
        if not call.made_labels and not call.values:
            self._memory[key] = result
        return result

    def apply_rule(self, call: Call) -> Sequence[Planes]:
        """Labels of the outputs of a call."""
        try:
            planes = self._find_rule(call.function)(call)
        except Exception as error:  # a rule that cannot follow a call must not stop the user's run
            problem = f"operator {call.name} was called in a way that its rule cannot follow ({error})"
            return call.opaque(problem)
        if self.compared and torch.Tag.nondeterministic_seeded in call.function.tags:
            for plane in itertools.chain(*planes):
                self.space.freeze(plane.ids, "is mixed with random numbers, which would not be the same ones")
        return planes

    def emit(self, event: Event) -> None:
        """Keep what was executed."""
        self.events.append(event)

    def _settled(self, planes: Planes) -> Planes:
        """At most one plane for each dimension."""
        kept: list[Plane] = []
        for plane in planes:
            if not plane.dims:
                self.space.freeze(plane.ids, "single channels are picked by their number")
                continue
            for other in [other for other in kept if set(plane.dims) & set(other.dims)]:
                if not plane.dims:
                    break  # the plane is dropped: it is solid now
                apart = share_blocks_only(self.space, plane.ids, other.ids)
                if apart is not None:
                    plane, rest = Plane(apart[0], plane.zero), Plane(apart[1], other.zero)
                    kept[kept.index(other)] = rest
                    continue
                kept.remove(other)
                plane = self._blocks_of(other, plane) if plane.dims == other.dims else self._joined(plane, other)
            else:
                kept.append(plane)
        return tuple(plane for plane in kept if plane.dims)

    def _joined(self, first: Plane, second: Plane) -> Plane:
        """Two planes that vary along a common dimension and elsewhere: what goes goes along the common one only."""
        common = set(first.dims) & set(second.dims)
        a, b = (self.space.tie(p.ids, [d for d in p.dims if d not in common]) for p in (first, second))
        if _cross(a, b):
            return self._blocks_of(Plane(a, first.zero), Plane(b, second.zero))
        self.space.unite(a, b)
        return Plane(a, first.zero and second.zero)

    def _blocks_of(self, first: Plane, second: Plane) -> Plane:
        """Of two planes along the same dimensions the one of larger blocks (heads, say); the other one is solid now."""
        larger, smaller = (second, first) if _steps(second.ids) < _steps(first.ids) else (first, second)
        self.space.freeze(smaller.ids, "shares a dimension with other channels")
        return larger

    def _forget_zero(self, call: Call, tensor: Tensor, planes: Planes) -> None:
        """After an in-place operator that does not keep zeros, no alias of that memory may still claim them."""
        claimed = any(plane.zero for plane in self.labels_of(tensor).planes)
        if not claimed or not call.function._schema.is_mutable or all(plane.zero for plane in planes):
            return
        memory = tensor.untyped_storage()._cdata
        for alias, labels in list(self._labels.items()):
            if alias.untyped_storage()._cdata == memory and any(plane.zero for plane in labels.planes):
                aliased = tuple(Plane(plane.ids, False) for plane in labels.planes)
                self._labels[alias] = labels._replace(planes=aliased)

    def count(self, call: Call, outputs: Sequence[Planes]) -> None:
        """Keep what multiplies and accumulates."""
        if call.function._overloadpacket not in flop_registry:
            return

        def stand_in(value: Any) -> Any:
            return Labelled(tuple(value.shape), call.planes(value)) if isinstance(value, Tensor) else value

        arguments = map_nested(stand_in, tuple(call.args))
        made = Labelled(tuple(call.outputs[0].shape), outputs[0])
        self.counted.append(Counted(call.function._overloadpacket, arguments, made))


def named_leaves(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, each tensor once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _is_drawn(call: Call) -> bool:
    """Whether what comes out is random and nothing else, so that a decision on it is one on data."""
    drawn = torch.Tag.nondeterministic_seeded in call.function.tags
    return drawn and not any(call.planes(tensor) for tensor in call.tensors)


def run_traced(program: Program, tracer: Tracer) -> list[Tensor]:
    """Run a program inside a tracer and return the tensors it hands out."""
    with decomposed(tracer), tracer:
        result = program.run()
    return list(tensors_in(program.handed_out(result)))


def _steps(ids: Tensor) -> int:
    """How often labels change from one position to the next."""
    flat = ids.flatten()
    return int((flat[1:] != flat[:-1]).sum())


def _cross(first: Tensor, second: Tensor) -> bool:
    """Whether labels on either side have some of each on the other, so that united they would be a single one."""
    a, b = (torch.unique(ids, return_inverse=True)[1] for ids in torch.broadcast_tensors(first, second))
    pairs = torch.unique(torch.stack([a.flatten(), b.flatten()]), dim=1)
    counts = int(a.max()) + 1, int(b.max()) + 1
    return min(counts) > 1 and pairs.shape[1] == counts[0] * counts[1]

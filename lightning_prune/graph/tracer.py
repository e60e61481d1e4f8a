"""The tracer: runs a network for real and carries labels through every operator it executes."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.graph.labels import Labels, LabelSpace, Plane, Witness
from lightning_prune.graph.program import Program, is_observed, map_nested, tensors_in

LAYOUT_ONLY = frozenset({"clone", "contiguous", "detach", "alias"})
"""Operators that come and go with the memory layout and say nothing of what is computed."""
SAME_AS_VIEW = frozenset({"_unsafe_view", "_reshape_alias", "reshape"})

Planes = tuple[Plane, ...]
Rule = Callable[["Call"], Sequence[Planes]]


class Labelled(NamedTuple):
    """Stands for a tensor argument once the tensor itself is gone."""

    shape: tuple[int, ...]
    planes: Planes


class Event(NamedTuple):
    """One executed operator: its name, the arguments that must not change, and what it saw and made."""

    name: str
    constants: tuple[object, ...]
    witnesses: tuple[Witness, ...]


class Counted(NamedTuple):
    """One executed operator that multiplies and accumulates."""

    function: object
    arguments: tuple[object, ...]
    result: Labelled


@cache
def _size_arguments(function: OpOverload) -> frozenset[str]:
    return frozenset(re.findall(r"SymInt[^ ]* (\w+)", str(function._schema)))


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """All tensors among the arguments or results of an operator, which nest lists at most."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(_tensors(value))
    return found


class Call:
    """One operator call as its rule sees it.

    Attributes:
        function: The executed ATen overload.
        arguments: All arguments by their schema names, defaults included.
        outputs: Every tensor the call returned, in order.
        space: Where a rule reports what belongs together.
        static: Whether every tensor argument depends on parameters and constants only.
    """

    def __init__(
        self, tracer: Tracer, function: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        """Bind the arguments to the operator's schema."""
        self._tracer = tracer
        self.function = function
        self.space = tracer.space
        self.arguments: dict[str, Any] = {
            argument.name: args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            for i, argument in enumerate(function._schema.arguments)
        }
        self.args, self.kwargs = args, kwargs
        self.tensors = [*_tensors(args), *_tensors(kwargs.values())]
        self.outputs = _tensors((out,))
        self._labels = {id(tensor): tracer.labels_of(tensor) for tensor in self.tensors}
        self.static = all(labels.static for labels in self._labels.values())
        self.witnesses: list[Witness] = []
        self.sizes: set[str] = set(_size_arguments(function))
        self.values: list[object] = []

    @property
    def name(self) -> str:
        """Name of the operator without namespace and overload, an in-place one like its functional twin."""
        name = self.function._schema.name.split("::")[-1]
        return name if name.startswith("__") or not name.endswith("_") else name[:-1]

    def planes(self, tensor: Tensor | None) -> Planes:
        """The planes of a tensor argument."""
        return () if tensor is None else self._labels[id(tensor)].planes

    def is_static(self, tensor: Tensor) -> bool:
        """Whether a tensor argument depends on parameters and constants only."""
        return self._labels[id(tensor)].static

    def witness(self, shape: Sequence[int], planes: Planes) -> None:
        """Show a shape the operator works in; its labels will be made separable and checked after a cut."""
        self.witnesses.append(Witness(tuple(shape), planes))

    def new_labels(self, shape: Sequence[int], dims: Sequence[int] | None = None) -> Planes:
        """Labels for a tensor that is made from nothing and may take any size along some (or all) dimensions."""
        return self._tracer.new_labels(shape, range(len(shape)) if dims is None else dims)

    def opaque(self, reason: str) -> list[Planes]:
        """Keep all channels that enter the operator whole; nothing is known of its outputs."""
        for tensor in self.tensors:
            for plane in self.planes(tensor):
                self.space.freeze(plane.ids, reason)
        return [() for _ in self.outputs]

    def constant(self, value: object) -> None:
        """Note something else that may not change with the widths."""
        self.values.append(value)

    def constants(self) -> tuple[object, ...]:
        """What may not change with the widths: numbers, flags and dimensions, but no sizes."""
        plain = (bool, int, float, complex, str)
        values = list(self.values)
        for name, value in self.arguments.items():
            items = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            if name not in self.sizes and all(isinstance(item, plain) for item in items):
                values.append((name, items))
        return tuple(values)


class Tracer(TorchDispatchMode):
    """Carries labels through every ATen operator executed inside it.

    Args:
        space: Where labels come from and what is learnt about them is kept.
        leaves: Labels of every parameter and buffer.
        find_rule: Gives the rule of an operator.
        compared: Whether the numbers that come out will be compared with those of the shrunk network.
    """

    def __init__(
        self,
        space: LabelSpace,
        leaves: Sequence[tuple[Tensor, Labels]],
        find_rule: Callable[[OpOverload], Rule],
        compared: bool,
    ) -> None:
        """See the class."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.space = space
        self.events: list[Event] = []
        self.counted: list[Counted] = []
        self.touched: set[int] = set()
        self.dtypes: set[torch.dtype] = set()
        self.compared = compared
        self._find_rule = find_rule
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
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if is_observed():
            self._carry(func, args, kwargs, result)
        return result

    def _carry(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        call = Call(self, func, args, kwargs, result)
        self.touched.update(id(tensor) for tensor in call.tensors if id(tensor) in self._leaves)
        outputs = [self._settled(planes) for planes in self.apply_rule(call)]
        for tensor, planes in zip(call.outputs, outputs, strict=True):
            self._forget_zero(call, tensor, planes)
            self._labels[tensor] = Labels(planes, call.static)
            self.dtypes.add(tensor.dtype)
            call.witness(tensor.shape, planes)
        if func._overloadpacket in flop_registry:
            self._count(call, outputs[0])
        if call.name not in LAYOUT_ONLY:
            name = "view" if call.name in SAME_AS_VIEW else call.name
            self.emit(Event(name, call.constants(), tuple(call.witnesses)))

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
        """At most one plane for each dimension: the second one on the same dimension stays whole."""
        kept: list[Plane] = []
        for plane in planes:
            if not plane.dims:
                self.space.freeze(plane.ids, "single channels are picked by their number")
                continue
            if any(set(plane.dims) & set(other.dims) for other in kept):
                self.space.freeze(plane.ids, "shares a dimension with other channels")
            else:
                kept.append(plane)
        return tuple(kept)

    def _forget_zero(self, call: Call, tensor: Tensor, planes: Planes) -> None:
        """After an in-place operator that does not keep zeros, no alias of that memory may still claim them."""
        claimed = any(plane.zero for plane in self.labels_of(tensor).planes)
        if not claimed or not call.function._schema.is_mutable or all(plane.zero for plane in planes):
            return
        memory = tensor.untyped_storage()._cdata
        for alias, labels in list(self._labels.items()):
            if alias.untyped_storage()._cdata == memory and any(plane.zero for plane in labels.planes):
                aliased = tuple(Plane(plane.ids, False) for plane in labels.planes)
                self._labels[alias] = Labels(aliased, labels.static)

    def _count(self, call: Call, result: Planes) -> None:
        def stand_in(value: Any) -> Any:
            return Labelled(tuple(value.shape), call.planes(value)) if isinstance(value, Tensor) else value

        arguments = map_nested(stand_in, tuple(call.args))
        made = Labelled(tuple(call.outputs[0].shape), result)
        self.counted.append(Counted(call.function._overloadpacket, arguments, made))


_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


class _OneWay(TorchFunctionMode):
    """Functions that choose among kernels by strides or hardware always go the same way, in operators that are seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace ``linear``; run recurrent layers without their fused kernel."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and is_observed():
            return _linear(*args, **kwargs)
        if getattr(func, "__name__", None) in _RECURRENT:
            with torch.backends.mkldnn.flags(enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dim() != 2 or input.dim() < 2:
        return torch.nn.functional.linear(input, weight, bias)
    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    product = rows.mm(weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return product if input.dim() == 2 else product.reshape(*input.shape[:-1], weight.shape[0])


@contextmanager
def decomposed() -> Iterator[None]:
    """Switch off the fused kernels that hide from a dispatch mode which operators they stand for."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
            with _OneWay():
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def named_leaves(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, each tensor once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def run_traced(program: Program, tracer: Tracer) -> list[Tensor]:
    """Run a program inside a tracer and return the tensors it hands out."""
    with decomposed(), tracer:
        result = program.run()
    return list(tensors_in(program.handed_out(result)))

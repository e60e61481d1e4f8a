"""Calls of operators as rules see them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch._ops import OpOverload

from lightning_prune.graph.labels import Plane, Witness

if TYPE_CHECKING:
    from lightning_prune.graph.tracer import Tracer

LAYOUT_ONLY = frozenset({"clone", "contiguous", "detach", "alias"})
"""Operators that come and go with the memory layout and say nothing of what is computed."""
SAME_AS_VIEW = frozenset({"_unsafe_view", "_reshape_alias", "reshape"})

Planes = tuple[Plane, ...]
Rule = Callable[["Call"], Sequence[Planes]]
Numbers = tuple[tuple[str, object], ...]


class Labelled(NamedTuple):
    """Stands for a tensor argument once the tensor itself is gone."""

    shape: tuple[int, ...]
    planes: Planes


_SIZES = {
    "aten::native_group_norm": frozenset({"N", "C", "HxW", "group"}),
    "aten::convolution": frozenset({"groups"}),
    "aten::_convolution": frozenset({"groups"}),
}
"""Where the schema's word (an argument is a ``SymInt``) says too little or too much."""
_PLAIN = frozenset({bool, int, float, complex, str})


class _Signature(NamedTuple):
    """Name, arguments with their defaults, and the arguments that are sizes."""

    name: str
    defaults: dict[str, Any]
    sizes: frozenset[str]


@cache
def _signature(function: OpOverload) -> _Signature:
    schema = function._schema
    name = schema.name.split("::")[-1]
    return _Signature(
        name if name.startswith("__") or not name.endswith("_") else name[:-1],
        {argument.name: argument.default_value for argument in schema.arguments},
        _SIZES.get(schema.name) or frozenset(re.findall(r"SymInt[^ ]* (\w+)", str(schema))),
    )


def tensors_among(values: Iterable[Any]) -> list[Tensor]:
    """All tensors among the arguments or results of an operator, which nest lists at most."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(tensors_among(value))
    return found


def hands_on(name: str, args: Sequence[Any]) -> bool:
    """Whether an operator will give what it is given; torch executes such ones or not, by version and memory format.

    Args:
        name: Its name, as from :func:`operator_name`.
        args: Its positional arguments, before it works on them.
    """
    return (
        name in LAYOUT_ONLY
        or (name == "slice" and _is_everything(*args))
        or (name == "as_strided" and _is_as_it_lies(*args))
    )


def _is_everything(x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> bool:
    return not start and step == 1 and (end is None or end >= x.shape[dim])


def _is_as_it_lies(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> bool:
    if tuple(size) != tuple(x.shape) or offset not in (None, x.storage_offset()):
        return False
    return all(n < 2 or step == given for n, step, given in zip(size, stride, x.stride(), strict=True))


def operator_name(function: OpOverload) -> str:
    """Name of an operator without namespace and overload, an in-place one like its functional twin."""
    return _signature(function).name


class Call:
    """One operator call as its rule sees it.

    Attributes:
        function: The executed ATen overload.
        name: Name of the operator without namespace and overload, an in-place one like its functional twin.
        arguments: All arguments by their schema names, defaults included.
        tensors: Every tensor argument, in order.
        outputs: Every tensor the call returned, in order.
        hands_on: Whether it gives what it was given, see :func:`hands_on`.
        space: Where a rule reports what belongs together.
        static: Whether every tensor argument depends on parameters and constants only.
        sizes: Names of the arguments that are sizes, which change with the widths.
    """

    def __init__(
        self,
        tracer: Tracer,
        function: OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        out: Any,
        hands_on: bool,
    ) -> None:
        """Bind the arguments to the operator's schema."""
        self._tracer = tracer
        self.function = function
        self.space = tracer.space
        signature = _signature(function)
        self.name = signature.name
        self.hands_on = hands_on
        self.sizes = set(signature.sizes)
        self.arguments: dict[str, Any] = {**signature.defaults, **dict(zip(signature.defaults, args, strict=False))}
        self.arguments.update(kwargs)
        self.args, self.kwargs = args, kwargs
        self.tensors = [*tensors_among(args), *tensors_among(kwargs.values())]
        self.outputs = tensors_among((out,))
        self.labels = {id(tensor): tracer.labels_of(tensor) for tensor in self.tensors}
        self.static = all(labels.static for labels in self.labels.values())
        self.witnesses: list[Witness] = []
        self.values: list[object] = []
        self.made_labels = False

    def planes(self, tensor: Tensor | None) -> Planes:
        """The planes of a tensor argument."""
        return () if tensor is None else self.labels[id(tensor)].planes

    def is_static(self, tensor: Tensor) -> bool:
        """Whether a tensor argument depends on parameters and constants only."""
        return self.labels[id(tensor)].static

    def witness(self, shape: Sequence[int], planes: Planes) -> None:
        """Show a shape the operator works in; its labels will be made separable and checked after a cut."""
        self.witnesses.append(Witness(tuple(shape), planes))

    def new_labels(self, shape: Sequence[int], dims: Sequence[int] | None = None) -> Planes:
        """Labels for a tensor that is made from nothing and may take any size along some (or all) dimensions."""
        self.made_labels = True
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

    def numbers(self) -> tuple[tuple[tuple[str, object], ...], tuple[tuple[str, object], ...]]:
        """The arguments that are not tensors: those that may not change with the widths, and the sizes."""
        constants: list[tuple[str, object]] = []
        sizes: list[tuple[str, object]] = []
        for name, value in self.arguments.items():
            if type(value) in _PLAIN:
                (sizes if name in self.sizes else constants).append((name, value))
            elif isinstance(value, (list, tuple)) and all(type(item) in _PLAIN for item in value):
                (sizes if name in self.sizes else constants).append((name, tuple(value)))
        return tuple(constants), tuple(sizes)

    def inputs(self) -> tuple[Witness, ...]:
        """Shape and labels of each tensor argument."""
        return tuple(Witness(tuple(tensor.shape), self.labels[id(tensor)].planes) for tensor in self.tensors)

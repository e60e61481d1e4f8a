"""Labels: integer tensors that name, for every element of a tensor, the prunable unit it belongs to."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

SOLID = 0
"""The label of elements that are never removed."""


@dataclass(frozen=True, eq=False)
class Plane:
    """Labels of one tensor along the dimensions they vary on.

    Args:
        ids: int64, as many dimensions as the tensor, of size 1 wherever the label does not vary.
        zero: Whether a removed element is exactly zero once every slot of its unit is zeroed.
    """

    ids: Tensor
    zero: bool

    @property
    def dims(self) -> tuple[int, ...]:
        """Dimensions along which the labels vary."""
        return varying(self.ids)


class Labels(NamedTuple):
    """What is known of one tensor.

    Args:
        planes: Its labels.
        static: Whether it depends on parameters and constants only.
        made_up: Whether its numbers come from a dry run.
    """

    planes: tuple[Plane, ...] = ()
    static: bool = False
    made_up: bool = False


class Witness(NamedTuple):
    """A shape with its labels, as an operator saw it; the shrunk network must show the same, less what was removed."""

    shape: tuple[int, ...]
    planes: tuple[Plane, ...]


def varying(ids: Tensor) -> tuple[int, ...]:
    """Dimensions of size above one."""
    return tuple(dim for dim, size in enumerate(ids.shape) if size > 1)


def compact(ids: Tensor) -> Tensor:
    """Reduce every dimension along which the labels are constant to size 1."""
    for dim in varying(ids):
        first = ids.narrow(dim, 0, 1)
        if bool((ids == first).all()):
            ids = first
    return ids


def align(plane: Plane, ndim: int) -> Plane:
    """Prepend dimensions of size 1, as broadcasting does."""
    return Plane(plane.ids.reshape((1,) * (ndim - plane.ids.dim()) + tuple(plane.ids.shape)), plane.zero)


@cache
def _library_roots() -> tuple[str, ...]:
    package = Path(__file__).parent.parent
    roots = [str(package / part) + os.sep for part in ("graph", "surgery", "probe", "callbacks")]
    for name in ("torch", "lightning", "pytorch_lightning"):
        spec = find_spec(name)
        if spec is not None and spec.origin is not None:
            roots.append(str(Path(spec.origin).parent) + os.sep)
    return tuple(roots)


_foreign: dict[CodeType, str | None] = {}


def _foreign_file(code: CodeType) -> str | None:
    """Name of the file that code is in; None for code of torch, Lightning and this library."""
    if code not in _foreign:
        path = Path(code.co_filename)
        ours = code.co_filename.startswith((*_library_roots(), "<")) or path.name == "contextlib.py"
        _foreign[code] = None if ours else path.name
    return _foreign[code]


def user_line() -> str:
    """The innermost line of code under execution that belongs to neither torch, Lightning nor this library."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        filename = _foreign_file(frame.f_code)
        if filename is not None:
            return f"{filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"


class Frozen(NamedTuple):
    """Labels that must stay whole. Without a reason the fact is not worth telling (a kernel's height, say)."""

    ids: Tensor
    reason: str | None


class LabelSpace:
    """Hands out labels and collects what is learnt about them: which belong together and which stay whole."""

    def __init__(self, approximate: bool = False) -> None:
        """Start with the solid label only.

        Args:
            approximate: Whether channels may go that are normalised over, which changes what they are normalised by.
        """
        self.approximate = approximate
        self.count = 1
        self.edges: list[tuple[Tensor, Tensor]] = []
        self.static_edges: list[tuple[Tensor, Tensor]] = []
        self.frozen: list[Frozen] = [Frozen(torch.zeros(1, dtype=torch.int64), None)]
        self.left_out: list[Frozen] = []
        self.marks: dict[str, list[Tensor]] = {}
        self.blocks: list[Tensor] = []
        self.pieces: list[tuple[Tensor, int]] = []
        self._inner: Tensor | None = None

    def snapshot(self) -> Callable[[], None]:
        """A function that forgets everything learnt since now (labels stay handed out)."""
        lists: list[list[Any]] = [self.edges, self.static_edges, self.frozen, self.left_out, self.blocks, self.pieces]
        lengths = [len(items) for items in lists]
        marks = {mark: len(found) for mark, found in self.marks.items()}
        inner = None if self._inner is None else self._inner.clone()

        def forget() -> None:
            self._inner = inner
            for items, length in zip(lists, lengths, strict=True):
                del items[length:]
            for mark, found in self.marks.items():
                del found[marks.get(mark, 0) :]

        return forget

    def fresh(self, shape: Sequence[int]) -> tuple[Plane, ...]:
        """One plane of new labels for each dimension of size above one."""
        planes = []
        for dim, size in enumerate(shape):
            if size > 1:
                view = [1] * len(shape)
                view[dim] = size
                planes.append(Plane(torch.arange(self.count, self.count + size).reshape(view), True))
                self.count += size
        return tuple(planes)

    def unite(self, first: Tensor, second: Tensor, static: bool = False) -> None:
        """Labels at the same place (after broadcasting) belong to the same unit."""
        a, b = torch.broadcast_tensors(first, second)
        edge = (a.flatten(), b.flatten())
        self.edges.append(edge)
        if static:
            self.static_edges.append(edge)
        if self.any_inner:
            self._spread(*edge)

    def tie(self, ids: Tensor, dims: Iterable[int]) -> Tensor:
        """Unite the labels along some dimensions; returns them with these dimensions reduced to size 1."""
        for dim in dims:
            first = ids.narrow(dim, 0, 1)
            if ids.shape[dim] > 1:
                self.unite(ids, first)
            ids = first
        return ids

    def choose_inner(self, ids: Tensor) -> None:
        """Where these labels meet blocks (heads, say), equal positions of every block may go, not whole blocks."""
        self._choices()[ids.flatten()] = True

    @property
    def any_inner(self) -> bool:
        """Whether equal positions were chosen anywhere."""
        return self._inner is not None

    def _choices(self) -> Tensor:
        """For each label whether equal positions were chosen for it."""
        known = torch.zeros(0, dtype=torch.bool) if self._inner is None else self._inner
        self._inner = torch.cat([known, torch.zeros(self.count - len(known), dtype=torch.bool)])
        return self._inner

    def _spread(self, first: Tensor, second: Tensor) -> None:
        """What is united with a label that was chosen is chosen too."""
        chosen = self._choices()
        either = chosen[first] | chosen[second]
        chosen[first[either]] = True
        chosen[second[either]] = True

    def prefers_inner(self, *labels: Tensor) -> bool:
        """Whether equal positions of every block may go, where either these or whole blocks can."""
        if not self.any_inner:
            return False
        chosen = self._choices()
        found = [ids for ids in labels if bool(chosen[ids].any())]
        for ids in found:
            self.mark(INNER, ids)
        return bool(found)

    def freeze(self, ids: Tensor, reason: str | None) -> None:
        """These labels stay whole."""
        self.frozen.append(Frozen(ids.flatten(), None if reason is None else f"{reason} ({user_line()})"))

    def leave_out(self, ids: Tensor) -> None:
        """These labels stay whole unless their units are read elsewhere, as another run may use more of them."""
        self.left_out.append(Frozen(ids.flatten(), f"lies beyond what the runs use of it ({user_line()})"))

    def keep_dense(self, ids: Tensor) -> None:
        """What remains of a tensor with these labels must be a dense block: equal pieces stay equal."""
        if len(varying(ids)) > 1:
            self.blocks.append(ids)

    def keep_number(self, ids: Tensor, dim: int) -> None:
        """So many pieces as there are along a dimension remain: what goes, goes from each of them."""
        if ids.shape[dim] > 1:
            self.pieces.append((ids, dim))

    def mark(self, mark: str, ids: Tensor) -> None:
        """Remember something about labels: a slot's role, or that zeroing must reach them."""
        self.marks.setdefault(mark, []).append(ids.flatten())


def components(count: int, edges: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Smallest label of each label's connected component, shape ``[count]``."""
    parent = torch.arange(count)
    if not edges:
        return parent
    first = torch.cat([edge[0] for edge in edges])
    second = torch.cat([edge[1] for edge in edges])
    while True:
        a, b = parent[first], parent[second]
        differ = a != b
        if not bool(differ.any()):
            return parent
        first, second, a, b = first[differ], second[differ], a[differ], b[differ]
        parent.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        while not torch.equal(jumped := parent[parent], parent):
            parent = jumped


def reshape_ids(ids: Tensor, shape_in: Sequence[int], shape_out: Sequence[int]) -> Tensor:
    """Labels of a row-major reshape, expanded only within those runs of dimensions that really mix.

    Args:
        ids: Compact labels of a tensor of shape ``shape_in``.
        shape_in: Shape before.
        shape_out: Shape after, of as many elements.
    """
    if tuple(shape_in) == tuple(shape_out):
        return ids
    if 0 in shape_in:  # without a single number, what lies beside the empty dimension is made of the same as before
        if 0 in ids.shape or _around_zero(shape_in) != _around_zero(shape_out):
            return torch.zeros((1,) * len(shape_out), dtype=torch.int64)
        shape_in, shape_out = ([size or 1 for size in shape] for shape in (shape_in, shape_out))
    pieces: list[int] = []
    expanded = list(ids.shape)
    i = j = 0
    while i < len(shape_in) or j < len(shape_out):
        start_in, start_out = i, j
        n_in = n_out = 1
        if i < len(shape_in):
            n_in, i = shape_in[i], i + 1
        if j < len(shape_out):
            n_out, j = shape_out[j], j + 1
        while n_in != n_out:
            if n_in < n_out:
                n_in, i = n_in * shape_in[i], i + 1
            else:
                n_out, j = n_out * shape_out[j], j + 1
        while i < len(shape_in) and n_in == 1 and shape_in[i] == 1:
            i += 1
        varies = any(ids.shape[d] > 1 for d in range(start_in, i))
        for d in range(start_in, i):
            expanded[d] = shape_in[d] if varies else 1
        pieces.extend(shape_out[start_out:j] if varies else [1] * (j - start_out))
    return compact(ids.expand(expanded).reshape(pieces))


def _around_zero(shape: Sequence[int]) -> tuple[int, int]:
    """How many positions there are before and after the first dimension of length 0; the others count as 1."""
    at = list(shape).index(0)
    return math.prod(shape[:at]), math.prod(size or 1 for size in shape[at + 1 :])


ZEROED = "zeroed"
"""Mark of labels of parameters whose units must be zeroed themselves: others are divided by a norm over them."""
NEVER_ZERO = "never zero"
"""Mark of labels of parameters whose units must not be zeroed: they are divided by their norm."""
STATISTICS = "statistics"
"""Mark of labels that are normalised over: without them the others are normalised by something else."""
READ = "read"
"""Mark of labels that are summed over: of whose units something is made in the end."""
NORMALISED_OVER = "is normalised over"
"""How the reasons begin for which channels stay that a norm takes its statistics over."""
INNER = "inner"
"""Mark of labels for which it mattered that equal positions of every block were chosen."""


def settle(space: LabelSpace, planes: Iterable[Plane], dims: Iterable[int], reason: str | None) -> tuple[Plane, ...]:
    """Make planes constant along some dimensions: tie them there; freeze and drop those that vary nowhere else."""
    settled, dims = [], tuple(dims)
    for plane in planes:
        inside = [d for d in dims if plane.ids.shape[d] > 1]
        if inside and len(inside) == len(plane.dims):
            space.freeze(plane.ids, reason)
        else:
            settled.append(Plane(space.tie(plane.ids, inside), plane.zero))
    return tuple(settled)


def outside(planes: Iterable[Plane], dims: Iterable[int]) -> tuple[Plane, ...]:
    """The planes that do not vary along some dimensions."""
    dims = tuple(dims)
    return tuple(plane for plane in planes if not any(plane.ids.shape[d] > 1 for d in dims))

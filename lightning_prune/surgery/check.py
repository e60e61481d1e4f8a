"""Program equality: the shrunk network must execute the recorded program, less what was removed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.graph.analysis import Analysis, Run
from lightning_prune.graph.labels import SOLID, Labels, LabelSpace, Plane, Witness, compact
from lightning_prune.graph.rules import find_rule
from lightning_prune.graph.tracer import Event, Planes, Tracer


class MismatchError(Exception):
    """The shrunk network did something else than the recorded program."""


class _FinalSpace(LabelSpace):
    """Labels after everything is known: nothing new may turn out to belong together or to stay whole."""

    def unite(self, first: Tensor, second: Tensor, static: bool = False) -> None:
        """See the base; here the labels must be the same already."""
        if not bool((first == second).all()):
            raise MismatchError("channels meet that were apart in the full network")

    def freeze(self, ids: Tensor, reason: str | None) -> None:
        """See the base; here the labels must be solid already (a single unit that is left is told by its size)."""
        if compact(ids).numel() > 1 and bool((ids != SOLID).any()):
            raise MismatchError(f"a channel that was removed elsewhere {reason}")

    def keep_dense(self, ids: Tensor) -> None:
        """Shapes are compared anyway."""

    def mark(self, mark: str, ids: Tensor) -> None:
        """Roles are known."""


class Expectation:
    """What each label becomes once some units are gone.

    Args:
        analysis: The solved analysis of the full network.
        kept: For each label of the analysis whether it stays, bool of shape ``[labels]``.
    """

    def __init__(self, analysis: Analysis, kept: Tensor) -> None:
        """See the class."""
        self.analysis = analysis
        self.kept = kept

    def plane(self, plane: Plane) -> tuple[Plane | None, dict[int, int]]:
        """The plane without what was removed (None if nothing of it can be), and the new sizes it implies."""
        roots = compact(self.analysis.root(plane.ids))
        sizes = {}
        for dim, size in enumerate(roots.shape):
            if size > 1:
                other = tuple(0 if d != dim else slice(None) for d in range(roots.dim()))
                stays = self.kept[roots[other]]
                roots = roots.index_select(dim, stays.nonzero().flatten())
                sizes[dim] = int(stays.sum())
        roots = compact(roots)
        if roots.numel() < 2:
            return None, sizes
        return Plane(roots, plane.zero), sizes

    def witness(self, witness: Witness) -> Witness:
        """The shape and labels that the shrunk network must show."""
        shape, planes = list(witness.shape), []
        for plane in witness.planes:
            restricted, sizes = self.plane(plane)
            for dim, size in sizes.items():
                shape[dim] = size
            if restricted is not None:
                planes.append(restricted)
        return Witness(tuple(shape), tuple(planes))


class Checker(Tracer):
    """Runs the shrunk network and compares it, operator by operator, with what was recorded.

    Args:
        expectation: What was removed.
        run: The recorded program.
    """

    def __init__(self, expectation: Expectation, run: Run) -> None:
        """See the class."""
        analysis = expectation.analysis
        leaves = []
        for name, labels in analysis.labels.items():
            planes = [expectation.plane(plane)[0] for plane in labels.planes]
            leaves.append((analysis.tensors[name], Labels(tuple(p for p in planes if p is not None), labels.static)))
        super().__init__(_FinalSpace(), leaves, find_rule)
        self.expectation = expectation
        self.recorded = run.events
        self.position = 0

    def expected(self, position: int) -> Event | None:
        """The recorded event at a position, less what was removed."""
        if position >= len(self.recorded):
            return None
        event = self.recorded[position]
        return event._replace(witnesses=tuple(self.expectation.witness(w) for w in event.witnesses))

    def changes(self, position: int) -> set[tuple[int, int]]:
        """Sizes before and after that differ in the recorded event at a position."""
        event = self.expected(position)
        if event is None:
            return set()
        pairs = zip(self.recorded[position].witnesses, event.witnesses, strict=True)
        return {(o, n) for old, new in pairs for o, n in zip(old.shape, new.shape, strict=True) if o != n}

    def new_labels(self, shape: Sequence[int], dims: Sequence[int]) -> Planes:
        """A tensor made from nothing must have the size and the labels that it had, less what was removed."""
        event = self.expected(self.position)
        for witness in event.witnesses if event is not None else ():
            if witness.shape == tuple(shape):
                return tuple(plane for plane in witness.planes if set(plane.dims) & set(dims))
        raise MismatchError(f"a new tensor of shape {tuple(shape)} where another size is due")

    def emit(self, event: Event) -> None:
        """Compare with the record."""
        expected = self.expected(self.position)
        if expected is None or event.name != expected.name:
            raise MismatchError(f"executed {event.name} where the full network executes {expected and expected.name}")
        if event.constants != expected.constants:
            raise MismatchError(f"{event.name} computes with a number that the full network does not have there")
        if len(event.witnesses) != len(expected.witnesses):
            raise MismatchError(f"{event.name} worked differently")
        for seen, due in zip(event.witnesses, expected.witnesses, strict=True):
            if seen.shape != due.shape:
                raise MismatchError(f"{event.name} gave shape {seen.shape} where {due.shape} is due")
            if not _same(seen.planes, due.planes):
                raise MismatchError(f"{event.name} of shape {seen.shape} holds other channels than those due")
        self.position += 1


def _same(seen: Planes, due: Planes) -> bool:
    a, b = _informative(seen), _informative(due)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _informative(planes: Planes) -> list[Tensor]:
    ids = [compact(plane.ids) for plane in planes]
    return sorted((i for i in ids if i.numel() > 1 and bool((i != SOLID).any())), key=lambda i: tuple(i.shape))

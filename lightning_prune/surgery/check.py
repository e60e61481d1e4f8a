"""Program equality: the shrunk network must execute the recorded program, less what was removed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_prune.graph.analysis import Analysis, Run
from lightning_prune.graph.calls import Call, Numbers, Planes
from lightning_prune.graph.labels import SOLID, Labels, LabelSpace, Plane, Witness, compact, varying
from lightning_prune.graph.rules import find_rule
from lightning_prune.graph.selections import Selections
from lightning_prune.graph.tracer import Event, Memory, Tracer
from lightning_prune.surgery.scales import Scales


class MismatchError(Exception):
    """The shrunk network did something else than the recorded program."""


class _FinalSpace(LabelSpace):
    """Labels after everything is known: nothing new may turn out to belong together or to stay whole.

    Args:
        lost: For each label whether it was lost somewhere (see :class:`Expectation`).
        approximate: As for the space of the full network.
    """

    def __init__(self, lost: Tensor, approximate: bool) -> None:
        """See the class."""
        super().__init__(approximate)
        self.lost = lost

    def unite(self, first: Tensor, second: Tensor, static: bool = False) -> None:
        """See the base; here the labels must be the same already."""
        if not agree(first, second, self.lost):
            raise MismatchError("channels meet that were apart in the full network")

    def freeze(self, ids: Tensor, reason: str | None) -> None:
        """See the base; here the labels must be solid already."""
        ids = compact(ids)
        if ids.numel() == 1:
            self.lost[ids] = True
        elif not agree(ids, torch.zeros_like(ids), self.lost):
            raise MismatchError(f"a channel that was removed elsewhere {reason}")

    def keep_dense(self, ids: Tensor) -> None:
        """Shapes are compared anyway."""

    def keep_number(self, ids: Tensor, dim: int) -> None:
        """Shapes are compared anyway."""

    def mark(self, mark: str, ids: Tensor) -> None:
        """Roles are known."""


def agree(first: Tensor, second: Tensor, lost: Tensor) -> bool:
    """Whether labels are the same, but for those that were lost on one side."""
    if first.shape == second.shape and torch.equal(first, second):
        return True
    same = (first == second) | ((first == SOLID) & lost[second]) | ((second == SOLID) & lost[first])
    return bool(same.all())


class Expectation:
    """What each label becomes once some units are gone.

    Args:
        analysis: The solved analysis of the full network.
        kept: For each label of the analysis whether it stays, bool of shape ``[labels]``.

    Attributes:
        lost: For each label whether some tensor holds no other. A plane in which nothing varies says nothing, so in
            what is made of that tensor the label is missing.
    """

    def __init__(self, analysis: Analysis, kept: Tensor) -> None:
        """See the class."""
        self.analysis = analysis
        self.kept = kept
        self.lost = torch.zeros_like(kept)
        self._restricted: dict[int, tuple[Tensor | None, dict[int, int]]] = {}
        self._vectors: dict[bytes, tuple[Tensor, int]] = {}
        self._planes: dict[tuple[int, bool], Plane] = {}
        self._witnesses: dict[int, tuple[Witness, Witness]] = {}

    def plane(self, plane: Plane) -> tuple[Plane | None, dict[int, int]]:
        """The plane without what was removed (None if nothing varies in it), and the new sizes it implies."""
        key = id(plane.ids)  # many planes of one network share their labels, and the analysis keeps these alive
        if key not in self._restricted:
            self._restricted[key] = self._restrict(plane.ids)
        ids, sizes = self._restricted[key]
        if ids is None:
            return None, sizes
        return self._planes.setdefault((id(ids), plane.zero), Plane(ids, plane.zero)), sizes

    def _restrict(self, ids: Tensor) -> tuple[Tensor | None, dict[int, int]]:
        dims = varying(ids)
        if len(dims) == 1:
            vector, size = self._restrict_vector(self.analysis.root(ids.flatten()))
            sizes = {} if size == ids.numel() else {dims[0]: size}
            if len(vector) == 1:
                return None, sizes
            return vector.reshape([len(vector) if d == dims[0] else 1 for d in range(ids.dim())]), sizes
        roots = compact(self.analysis.root(ids))
        stays = self.kept[roots]
        sizes = {}
        if not bool(stays.all()):
            for dim in varying(roots):
                first = [slice(None) if d == dim else 0 for d in range(roots.dim())]
                positions = stays[tuple(first)].nonzero().flatten()
                roots = roots.index_select(dim, positions)
                sizes[dim] = len(positions)
            roots = compact(roots)
        if roots.numel() == 1:
            self.lost[roots] = True
        return (roots if roots.numel() > 1 else None), sizes

    def _restrict_vector(self, roots: Tensor) -> tuple[Tensor, int]:
        """What stays of labels along one dimension (of length 1 if they are all alike), and how many."""
        key = roots.numpy().tobytes()
        if key not in self._vectors:
            stays = self.kept[roots]
            left = roots if bool(stays.all()) else roots[stays]
            vector = compact(left)
            if len(vector) == 1:
                self.lost[vector] = True
            self._vectors[key] = vector, len(left)
        return self._vectors[key]

    def witness(self, witness: Witness) -> Witness:
        """The shape and labels that the shrunk network must show."""
        known = self._witnesses.get(id(witness))
        if known is None:
            known = self._witnesses[id(witness)] = witness, self._restrict_witness(witness)
        return known[1]

    def _restrict_witness(self, witness: Witness) -> Witness:
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
        memory: What rules said of calls before in the same shrunk network.

    Attributes:
        scales: The numbers that follow a width; none where results must be exact.
    """

    def __init__(self, expectation: Expectation, run: Run, memory: Memory) -> None:
        """See the class."""
        analysis = expectation.analysis
        leaves = []
        registered = ((analysis.tensors[name], labels) for name, labels in analysis.labels.items())
        for tensor, labels in (*registered, *analysis.loose.values()):
            planes = [expectation.plane(plane)[0] for plane in labels.planes]
            leaves.append((tensor, Labels(tuple(p for p in planes if p is not None), labels.static)))
        space = _FinalSpace(expectation.lost, analysis.space.approximate)
        selections = Selections(run.selections)
        super().__init__(space, leaves, find_rule, not run.program.training, run.dry, memory, selections)
        self.expectation = expectation
        self.recorded = run.events
        self.position = 0
        self.scales = Scales()
        self._scales_may_follow = analysis.space.approximate

    def expected(self, position: int) -> Event | None:
        """The recorded event at a position, less what was removed."""
        if position >= len(self.recorded):
            return None
        event, witness = self.recorded[position], self.expectation.witness
        return event._replace(inputs=tuple(map(witness, event.inputs)), witnesses=tuple(map(witness, event.witnesses)))

    def follow(self, call: Call, constants: Numbers, sizes: Numbers) -> Sequence[Planes]:
        """Labels of the outputs of a call, which must be what was recorded, less what was removed."""
        event = self.expected(self.position)
        if event is not None and self._scales_may_follow:
            record = self.recorded[self.position]
            constants = self.scales.recorded(call, constants, record, event, self.position)
        if event is not None and self._goes_without_saying(call, constants, sizes, event):
            self.position += 1
            return [witness.planes for witness in event.witnesses[-len(call.outputs) :]]
        outputs = super().follow(call, constants, sizes)
        if event is None or call.hands_on:
            return outputs
        due = event.witnesses[-len(call.outputs) :]
        return [w.planes if _identical(planes, w.planes) else planes for planes, w in zip(outputs, due, strict=True)]

    def _goes_without_saying(self, call: Call, constants: Numbers, sizes: Numbers, event: Event) -> bool:
        """Whether the call is the recorded one on what is left of its inputs, and has no size that could be wrong."""
        if call.name != event.name or not call.outputs or call.made_labels or constants != event.constants:
            return False
        if sizes != event.sizes or (sizes and not _without_sizes(call)):
            return False
        if len(call.tensors) != len(event.inputs):
            return False
        for tensor, witness in zip(call.tensors, event.inputs, strict=True):
            planes = call.planes(tensor)
            if tuple(tensor.shape) != witness.shape or len(planes) != len(witness.planes):
                return False
            if any(a is not b for a, b in zip(planes, witness.planes, strict=True)):
                return False
        due = event.witnesses[-len(call.outputs) :]
        return all(tuple(o.shape) == w.shape for o, w in zip(call.outputs, due, strict=True))

    def changes(self, position: int, inputs: bool = False) -> set[tuple[int, int]]:
        """Sizes before and after that differ in the recorded event at a position, or in its inputs only."""
        event = self.expected(position)
        if event is None:
            return set()
        record = self.recorded[position]
        old, new = (record.inputs, event.inputs) if inputs else (record.witnesses, event.witnesses)
        pairs = zip(old, new, strict=True)
        return {(o, n) for a, b in pairs for o, n in zip(a.shape, b.shape, strict=True) if o != n}

    def count(self, call: Call, outputs: Sequence[Planes]) -> None:
        """What it costs is known."""

    def due_sizes(self, position: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Lists of sizes that the recorded operator may have been given, with those that are due now."""
        event = self.expected(position)
        if event is None:
            return
        old, new = self.recorded[position].witnesses, event.witnesses
        yield from ((a.shape, b.shape) for a, b in zip(old, new, strict=True))
        if len(old) > 1:
            for dim in range(min(len(witness.shape) for witness in old)):
                yield tuple(w.shape[dim] for w in old), tuple(w.shape[dim] for w in new)

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
            hint = "" if self._scales_may_follow else self._hint(event)
            raise MismatchError(f"{event.name} computes with a number that the full network does not have there{hint}")
        if len(event.witnesses) != len(expected.witnesses):
            raise MismatchError(f"{event.name} worked differently")
        for seen, due in zip(event.witnesses, expected.witnesses, strict=True):
            if seen.shape != due.shape:
                raise MismatchError(f"{event.name} gave shape {seen.shape} where {due.shape} is due")
            if not self._same(seen.planes, due.planes):
                raise MismatchError(f"{event.name} of shape {seen.shape} holds other channels than those due")
        self.position += 1

    def _hint(self, event: Event) -> str:
        """What may help where heads get narrower."""
        by_scale = self.expectation.analysis.inner and event.name in ("mul", "div")
        return "; norms='approximate' lets the scale of an attention follow the width of its heads" if by_scale else ""

    def apply_rule(self, call: Call) -> Sequence[Planes]:
        """Here a rule that cannot follow a call has found a difference."""
        return self._find_rule(call.function)(call)

    def _same(self, seen: Planes, due: Planes) -> bool:
        if len(seen) == len(due) and all(torch.equal(a.ids, b.ids) for a, b in zip(seen, due, strict=True)):
            return True
        lost = self.expectation.lost
        unmatched = _informative(compact(plane.ids) for plane in seen)
        for ids in _informative(plane.ids for plane in due):
            match = next((i for i, s in enumerate(unmatched) if s.shape == ids.shape and agree(s, ids, lost)), None)
            if match is not None:
                del unmatched[match]
            elif not agree(torch.zeros_like(ids), ids, lost):
                return False
        return not unmatched


def _identical(first: Planes, second: Planes) -> bool:
    return len(first) == len(second) and all(
        a.zero == b.zero and a.ids.shape == b.ids.shape and torch.equal(a.ids, b.ids)
        for a, b in zip(first, second, strict=True)
    )


def _without_sizes(call: Call) -> bool:
    """Whether the sizes among the arguments have nothing to do with channels."""
    return call.name == "convolution" and call.arguments["groups"] == 1


def _informative(labels: Iterable[Tensor]) -> list[Tensor]:
    return [ids for ids in labels if ids.numel() > 1 and bool((ids != SOLID).any())]

"""From labels to channel groups: solve what was learnt from running the network."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.errors import TraceError
from lightning_prune.graph.calls import Labelled
from lightning_prune.graph.channels import ChannelGraph, Extent, Operation, Refusal
from lightning_prune.graph.dry_run import NumbersNeededError
from lightning_prune.graph.grouping import Leaf, LeafTable
from lightning_prune.graph.known import Known, known_of
from lightning_prune.graph.labels import (
    INNER,
    READ,
    SOLID,
    STATISTICS,
    Frozen,
    Labels,
    LabelSpace,
    Plane,
    compact,
    components,
    varying,
)
from lightning_prune.graph.memories import continued, forgetful_programs, leftovers
from lightning_prune.graph.program import Program, tensors_in
from lightning_prune.graph.rules import find_rule
from lightning_prune.graph.rules.contractions import NEEDS_ZERO
from lightning_prune.graph.selections import Selection
from lightning_prune.graph.support import check_network, check_samples, left_whole
from lightning_prune.graph.tracer import Counted, Event, Memory, Tracer, named_leaves, run_traced
from lightning_prune.graph.unregistered import loose_tensors

Norms = Literal["exact", "approximate"]
Place = tuple[str, int]
"""A tensor's name and one of its dimensions."""


class Run(NamedTuple):
    """What one program executed.

    Attributes:
        program: The program.
        events: The operators.
        counted: What they cost.
        dtypes: Of what they returned.
        dry: Whether costly arithmetic was left out.
        selects: Whether it picks anything by its numbers.
        selections: What it picked, where the numbers were there.
        handed_out: Shapes of its outputs.
    """

    program: Program
    events: list[Event]
    counted: list[Counted]
    dtypes: set[torch.dtype]
    dry: bool
    selects: bool
    selections: list[Selection]
    handed_out: list[tuple[int, ...]]


class Analysis:
    """Runs a network and solves which slices of which tensors belong together.

    Args:
        model: The network.
        programs: The ways of running it. The cost is that of the deployed one, else of the first that runs in
            evaluation mode.
        norms: "approximate" lets channels go that are normalised over; the others are then normalised by themselves.
        inner: Dimensions of tensors of whose blocks (heads, say) equal positions may go instead of whole blocks.
        known: What earlier runs have shown.

    Raises:
        TraceError: If no program runs, or the network has a lazy or non-strided parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        programs: Sequence[Program],
        norms: Norms = "exact",
        inner: Collection[Place] = (),
        known: Known | None = None,
    ) -> None:
        """See the class."""
        self.model = model
        self.norms = norms
        self.inner = inner
        self.tensors = named_leaves(model)
        check_network(model, self.tensors)
        self.space = LabelSpace(approximate=norms == "approximate")
        self.labels = {name: self._leaf_labels(tensor) for name, tensor in self.tensors.items()}
        self.loose = {name: (tensor, self._leaf_labels(tensor)) for name, tensor in loose_tensors(model).items()}
        self._choose_inner()
        self.notes: list[Refusal] = []
        self._leave_whole()
        self.frozen_later: list[Frozen] = []
        self.united_later: list[tuple[Tensor, Tensor]] = []
        self.scaled_later: list[Tensor] = []
        self.laws: dict[Hashable, Extent] = {}
        self.runs: list[Run] = []
        self._memory: Memory = {}
        touched: set[int] = set()
        failures: dict[str, Exception] = {}
        pending = deque([*programs, *forgetful_programs(model, programs)])
        while pending:
            program = pending.popleft()
            check_samples(program.name, program.samples)
            try:
                reached, remembers = self._trace(program)
                touched |= set() if program.restricts else reached
                pending += [continued(model, program)] if remembers and not program.restricts else []
            except Exception as error:
                if not program.restricts:
                    failures[program.name] = error
                self.notes += [] if program.derived else [Refusal(program.name, f"could not be run ({error})")]
        ran = {_entry_point(run.program.name) for run in self.runs}
        for name, failure in failures.items():
            if _entry_point(name) not in ran:
                raise (
                    failure
                    if isinstance(failure, TraceError)
                    else TraceError(f"the network failed in {name}: {type(failure).__name__}: {failure}")
                ) from failure
        if not self.runs:
            raise TraceError("there is no program to run the network by")
        self.touched = {name for name, tensor in self.tensors.items() if id(tensor) in touched}
        self.leaves = [
            Leaf(name, plane.dims[0], plane.ids.flatten())
            for name, labels in self.labels.items()
            for plane in labels.planes
        ]
        for leaf in self.leaves:
            if leaf.tensor not in self.touched:
                self.space.frozen.append(Frozen(leaf.ids, "is not used by any program that was run"))
        known = known or Known()
        known.hold(self.space, self.leaves)
        self._names = known.names
        self._table = LeafTable(self.leaves, self.space)
        self._blocks = self._dense_blocks()
        self.united = torch.arange(self.space.count)
        self._edges_solved = 0
        self._keep_what_is_left_out()
        self.solve()

    def _keep_what_is_left_out(self) -> None:
        """Keep units whole of which a slice has left something out, and of which nothing is made elsewhere either."""
        self._left_out: list[Frozen] = []
        if not self.space.left_out:
            return
        self._unite()
        read = torch.zeros(self.space.count, dtype=torch.bool)
        for ids in itertools.chain(self.space.marks.get(READ, ()), self.space.marks.get("consumer", ())):
            read[self.united[ids]] = True
        for ids, reason in self.space.left_out:
            if not bool((seen := read[self.united[ids]]).all()):
                self._left_out.append(Frozen(ids[~seen], reason))

    def _leave_whole(self) -> None:
        """Keep parts whole that no run could tell how to cut."""
        for name, reason in left_whole(self.model, self.tensors).items():
            if name not in self.labels:
                self.notes.append(Refusal(name, reason))
                continue
            for plane in self.labels[name].planes:
                self.space.frozen.append(Frozen(plane.ids.flatten(), reason))

    def _choose_inner(self) -> None:
        for name, dim in self.inner:
            for plane in self.labels[name].planes:
                if plane.dims == (dim,):
                    self.space.choose_inner(plane.ids)

    def _leaf_labels(self, tensor: Tensor) -> Labels:
        labelled = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool
        return Labels(self.space.fresh(tensor.shape) if labelled else (), static=True)

    def _trace(self, program: Program) -> tuple[set[int], bool]:
        """Run a program, as a dry run if its course does not depend on numbers.

        Returns:
            What was touched, and whether modules keep something of it that may have to do with channels.
        """
        forget = self.space.snapshot()
        try:
            return self._run(program, dry=True)
        except (NumbersNeededError, Exception):  # zeros for numbers may also make the network fail
            forget()
            self._memory.clear()
        return self._run(program, dry=False)

    def _run(self, program: Program, dry: bool) -> tuple[set[int], bool]:
        leaves = [*((self.tensors[name], labels) for name, labels in self.labels.items()), *self.loose.values()]
        tracer = Tracer(self.space, leaves, find_rule, not program.training, dry, self._memory)
        with leftovers(self.model) as left:
            outputs = run_traced(program, tracer)
        remembers = any(tracer.labels_of(tensor).planes for _, value in left.values() for tensor in tensors_in(value))
        for output in outputs:
            for plane in tracer.labels_of(output).planes:
                self.space.frozen.append(Frozen(plane.ids.flatten(), "is an output of the network"))
        shapes = [tuple(output.shape) for output in outputs]
        events = next((run.events for run in self.runs if run.events == tracer.events), tracer.events)
        tape = tracer.selections.tape
        self.runs.append(Run(program, events, tracer.counted, tracer.dtypes, dry, tracer.selects, tape, shapes))
        return tracer.touched, remembers

    def freeze(self, roots: Tensor, reason: str) -> None:
        """Keep units whole after all (labels as given by :meth:`root`), then solve again."""
        self.frozen_later.append(Frozen(roots, reason))
        self.space.frozen.append(self.frozen_later[-1])
        self.solve()

    def groups_at(self, event: Event) -> list[str]:
        """Groups whose channels an executed operator is given or returns."""
        planes = (plane for witness in event.inputs + event.witnesses for plane in witness.planes)
        ids = {id(plane.ids): plane.ids.flatten() for plane in planes}
        numbers = torch.cat([self.group_of[self.root(found)] for found in ids.values()]) if ids else torch.zeros(0)
        return [self.group_names[number] for number in torch.unique(numbers).tolist() if number >= 0]

    def events_alike(self, model: Event) -> Iterator[Event]:
        """Other operators that the same line of code ran on tensors of the same shapes, as repeated blocks do."""
        for event in itertools.chain.from_iterable(run.events for run in self.runs):
            if event is not model and _alike(event, model):
                yield event

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Have labels belong together after all, place by place; to be solved again."""
        self.united_later.append((first, second))
        self.space.unite(first, second)

    def mark_approximate(self, ids: Tensor) -> None:
        """Know that a number in the program follows the width along these labels; to be solved again."""
        self.scaled_later.append(ids)
        self.space.mark(STATISTICS, ids)

    def producers(self) -> list[Leaf]:
        """The dimensions of tensors that make channels."""
        return [leaf for leaf, role in zip(self.leaves, self._table.roles, strict=True) if role == "producer"]

    def inner_mattered(self, leaf: Leaf) -> bool:
        """Whether it made a difference that equal positions of the blocks in this dimension may go."""
        return bool(self._marked(INNER)[self.root(leaf.ids)].any())

    def repeated(self) -> Analysis:
        """Run and solve everything anew, for a network whose weights or surroundings have moved on."""
        seen = known_of(self.groups.values(), self.touched, self.refusals())
        programs = [run.program for run in self.runs if not run.program.derived]
        anew = Analysis(self.model, programs, self.norms, self.inner, seen)
        known = sum(len(leaf.ids) for leaf in anew.leaves)  # parameters are labelled first, and always alike
        anew.space.frozen += [Frozen(f.ids[f.ids <= known], f.reason) for f in self.frozen_later]
        anew.frozen_later += self.frozen_later
        for first, second in self.united_later:
            anew.unite(first, second)
        for ids in self.scaled_later:
            anew.mark_approximate(ids[ids <= known])
        anew.solve()
        anew.adopt_laws(self.laws)
        return anew

    def adopt_laws(self, laws: Mapping[Hashable, Extent]) -> None:
        """Take over what integers follow, where all groups that they follow are there."""
        known = self.groups.keys()
        self.laws = {place: law for place, law in laws.items() if known >= {name for name, _ in law.per_unit}}

    def solve(self) -> None:
        """Find the connected components; tie what is left ragged until every tensor stays a dense block."""
        while True:
            self._unite()
            blocks = [compact(self.roots[ids]) for ids in self._blocks]
            ragged = [roots for roots in blocks if len(varying(roots)) > 1]
            if ragged:
                self._tie(ragged)
            elif not self._tied_pieces():
                break
        self._make_groups()

    def _dense_blocks(self) -> list[Tensor]:
        """Labels of every tensor (each once) that varies along several dimensions and must stay a dense block."""
        witnessed = [
            plane.ids
            for run in self.runs
            for event in run.events
            for witness in event.witnesses
            for plane in witness.planes
            if len(plane.dims) > 1
        ]
        return list({id(ids): ids for ids in [*witnessed, *self.space.blocks]}.values())

    def _unite(self) -> None:
        """Take in what was learnt since the last time."""
        fresh = self.space.edges[self._edges_solved :]
        self._edges_solved = len(self.space.edges)
        step = components(self.space.count, [(self.united[a], self.united[b]) for a, b in fresh])
        self.united = step[self.united]
        solid = torch.zeros(self.space.count, dtype=torch.bool)
        solid[self.united[torch.cat([frozen.ids for frozen in [*self.space.frozen, *self._left_out]])]] = True
        self.roots = torch.where(solid[self.united], torch.tensor(SOLID), self.united)

    def _tie(self, ragged: Sequence[Tensor]) -> None:
        """Make blocks constant along all dimensions but their last one.

        Blocks that share units take turns, in the order of execution: after one of them is tied the next may be dense
        already, as the transposed half of a channel shuffle is.
        """
        taken = torch.zeros(self.space.count, dtype=torch.bool)
        for roots in ragged:
            movable = roots[roots != SOLID]
            if not bool(taken[movable].any()):
                taken[movable] = True
                self.space.tie(roots, varying(roots)[:-1])

    def _tied_pieces(self) -> bool:
        """Make pieces alike that must stay as many as they are; False if they are so already."""
        pieces = [(compact(self.roots[ids]), dim) for ids, dim in self.space.pieces]
        whole = [(roots, dim) for roots, dim in pieces if roots.shape[dim] > 1]
        for roots, dim in whole:
            self.space.tie(roots, (dim,))
        return bool(whole)

    def root(self, ids: Tensor) -> Tensor:
        """The unit of each label; ``SOLID`` for what stays whole."""
        return self.roots[ids]

    def _make_groups(self) -> None:
        zeroed, approximate = self._marked(NEEDS_ZERO), self._marked(STATISTICS)
        found = self._table.groups(self.roots, zeroed, approximate, self.tensors, self._names)
        self.groups = {group.name: group for group, _ in found}
        self.units = {group.name: roots for group, roots in found}
        self.group_names = list(self.groups)
        self._counts: dict[int, tuple[tuple[int, ...], tuple[tuple[str, int], ...]]] = {}
        self.group_of = torch.full((self.space.count,), -1)
        for number, roots in enumerate(self.units.values()):
            self.group_of[roots] = number

    def _marked(self, mark: str) -> Tensor:
        """For each label whether its unit carries a mark."""
        marked = torch.zeros(self.space.count, dtype=torch.bool)
        for ids in self.space.marks.get(mark, []):
            marked[self.root(ids)] = True
        return marked

    def refusals(self) -> tuple[Refusal, ...]:
        """What stays whole, and why; one entry for everything that belongs together."""
        told = [frozen for frozen in [*self.space.frozen, *self._left_out] if frozen.reason is not None]
        first = torch.full((self.space.count,), len(told))
        if told:
            labels = torch.cat([self.united[frozen.ids] for frozen in told])
            order = torch.repeat_interleave(torch.tensor([frozen.ids.numel() for frozen in told]))
            first.scatter_reduce_(0, labels, order, "amin")
        covered = self._table.covered(self.roots == SOLID).tolist()
        parts = [(len(leaf.ids) - count, leaf) for leaf, count in zip(self.leaves, covered, strict=True) if count]
        found: dict[str, Refusal] = {}
        reported = torch.zeros(self.space.count, dtype=torch.bool)
        for left, leaf in sorted(parts, key=lambda part: part[0] > 0):  # dimensions that stay whole altogether first
            united = self.united[leaf.ids]
            known = united[(first[united] < len(told)) & (self.roots[leaf.ids] == SOLID)]
            if bool(reported[known if left else known[:1]].all()):
                continue
            fresh = known[~reported[known]] if left else known
            reported[known] = True
            share = f", {len(fresh)} of {len(united)}" if left else ""
            path = f"{leaf.tensor} (dim {leaf.dim}{share})"
            found[path] = Refusal(path, told[int(first[fresh].min())].reason or "")
        return (*self.notes, *found.values(), *self._single_units())

    def _single_units(self) -> Iterator[Refusal]:
        """Groups of which nothing can go, because a network keeps one unit of each."""
        for group in self.groups.values():
            if group.width == 1:
                path = f"{group.slots[0].tensor} (dim {group.slots[0].dim})"
                yield Refusal(path, "belongs together to the last channel, and one unit of each group is kept")

    def extent(self, size: int, dim: int, planes: Sequence[Plane]) -> Extent:
        """Size of one dimension as a function of the group widths."""
        for plane in planes:
            if plane.ids.shape[dim] > 1 and (per_unit := self._per_unit(plane.ids, dim)):
                removable = sum(count * self.groups[name].width for name, count in per_unit)
                return Extent(size - removable, per_unit)
        return Extent(size)

    def _per_unit(self, ids: Tensor, dim: int) -> tuple[tuple[str, int], ...]:
        """How many positions each unit of each group has along a dimension; none where all units are alike along it."""
        if id(ids) not in self._counts:
            roots = compact(self.root(ids))
            groups = self.group_of[roots.flatten()]
            numbers, counts = torch.unique(groups[groups >= 0], return_counts=True)
            names = [self.group_names[number] for number in numbers.tolist()]
            per_unit = tuple(
                (name, count // self.groups[name].width) for name, count in zip(names, counts.tolist(), strict=True)
            )
            self._counts[id(ids)] = varying(roots), per_unit
        dims, per_unit = self._counts[id(ids)]
        return per_unit if dim in dims else ()

    def extents(self) -> dict[str, tuple[Extent, ...]]:
        """Shape of every parameter and buffer as a function of the group widths."""
        return {
            name: tuple(self.extent(n, d, self.labels[name].planes) for d, n in enumerate(tensor.shape))
            for name, tensor in self.tensors.items()
        }

    def graph(self) -> ChannelGraph:
        """The channel graph as it is known now."""
        run = min(self.runs, key=lambda run: (not run.program.deployed, run.program.training))

        def extents(value: object) -> object:
            if isinstance(value, Labelled):
                return tuple(self.extent(n, d, value.planes) for d, n in enumerate(value.shape))
            return value

        operations = tuple(
            Operation(c.function, tuple(extents(a) for a in c.arguments), extents(c.result))  # type: ignore[arg-type]
            for c in run.counted
        )
        return ChannelGraph(self.groups, self.refusals(), self.extents(), operations, run.program.samples, self)


def _alike(first: Event, second: Event) -> bool:
    shapes = [tuple(witness.shape for witness in event.inputs + event.witnesses) for event in (first, second)]
    return first.name == second.name and first.line == second.line and shapes[0] == shapes[1]


def _entry_point(name: str) -> str:
    """What a program calls, whatever the mode: the first word of its name."""
    return name.partition(" ")[0]

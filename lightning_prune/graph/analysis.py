"""From labels to channel groups: solve what was learnt from running the network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.errors import TraceError
from lightning_prune.graph.channels import ChannelGraph, ChannelGroup, Extent, Operation, Refusal, Role, Slot
from lightning_prune.graph.labels import SOLID, Frozen, Labels, LabelSpace, Plane, compact, components, varying
from lightning_prune.graph.program import Program
from lightning_prune.graph.rules import find_rule
from lightning_prune.graph.rules.contractions import NEEDS_ZERO
from lightning_prune.graph.tracer import Counted, Event, Labelled, Tracer, named_leaves, run_traced

_ROLES: tuple[Role, ...] = ("consumer", "producer", "scale", "statistic", "bias")


class Run(NamedTuple):
    """What one program executed."""

    program: Program
    events: list[Event]
    counted: list[Counted]


class Leaf(NamedTuple):
    """One dimension of one parameter or buffer, with its labels."""

    tensor: str
    dim: int
    ids: Tensor


class Analysis:
    """Runs a network and solves which slices of which tensors belong together.

    Args:
        model: The network.
        programs: The ways of running it. The first one that runs in evaluation mode is the one whose cost is counted.

    Raises:
        TraceError: If no program runs, or the network has a lazy or non-strided parameter.
    """

    def __init__(self, model: nn.Module, programs: Sequence[Program]) -> None:
        """See the class."""
        self.model = model
        self.tensors = named_leaves(model)
        _check(self.tensors)
        self.space = LabelSpace()
        self.labels = {name: self._leaf_labels(tensor) for name, tensor in self.tensors.items()}
        self.notes: list[Refusal] = []
        self.runs: list[Run] = []
        touched: set[int] = set()
        failures: dict[str, Exception] = {}
        for program in programs:
            try:
                touched |= self._trace(program)
            except Exception as error:
                failures[program.name] = error
                self.notes.append(Refusal(program.name, f"could not be run ({error})"))
        ran = {_entry_point(run.program.name) for run in self.runs}
        for name, error in failures.items():
            if _entry_point(name) not in ran:
                raise error if isinstance(error, TraceError) else TraceError(
                    f"the network failed in {name}: {type(error).__name__}: {error}"
                ) from error
        self.touched = {name for name, tensor in self.tensors.items() if id(tensor) in touched}
        self.leaves = [
            Leaf(name, plane.dims[0], plane.ids.flatten())
            for name, labels in self.labels.items()
            for plane in labels.planes
        ]
        for leaf in self.leaves:
            if leaf.tensor not in self.touched:
                self.space.freeze(leaf.ids, "is not used by any program that was run")
        self.solve()

    def _leaf_labels(self, tensor: Tensor) -> Labels:
        labelled = tensor.is_floating_point() or tensor.is_complex()
        return Labels(self.space.fresh(tensor.shape) if labelled else (), static=True)

    def _trace(self, program: Program) -> set[int]:
        tracer = Tracer(self.space, [(self.tensors[name], labels) for name, labels in self.labels.items()], find_rule)
        outputs = run_traced(program, tracer)
        for output in outputs:
            for plane in tracer.labels_of(output).planes:
                self.space.frozen.append(Frozen(plane.ids.flatten(), "is an output of the network"))
        self.runs.append(Run(program, tracer.events, tracer.counted))
        return tracer.touched

    def freeze(self, roots: Tensor, reason: str) -> None:
        """Keep units whole after all (labels as given by :meth:`root`), then solve again."""
        self.space.frozen.append(Frozen(roots, reason))
        self.solve()

    def solve(self) -> None:
        """Find the connected components; tie what is left ragged until every tensor stays a dense block."""
        sites = [
            plane.ids
            for run in self.runs
            for event in run.events
            for witness in event.witnesses
            for plane in witness.planes
            if len(plane.dims) > 1
        ]
        while True:
            self.united = components(self.space.count, self.space.edges)
            solid = torch.zeros(self.space.count, dtype=torch.bool)
            for frozen in self.space.frozen:
                solid[self.united[frozen.ids]] = True
            self.roots = torch.where(solid[self.united], torch.tensor(SOLID), self.united)
            ragged = [ids for ids in sites if len(varying(compact(self.roots[ids]))) > 1]
            if not ragged:
                break
            for ids in ragged:
                self.space.tie(ids, varying(compact(self.roots[ids]))[:-1])
        self._make_groups()

    def root(self, ids: Tensor) -> Tensor:
        """The unit of each label; ``SOLID`` for what stays whole."""
        return self.roots[ids]

    def _make_groups(self) -> None:
        entries = [
            torch.stack([self.root(leaf.ids), torch.full_like(leaf.ids, number), torch.arange(len(leaf.ids))])
            for number, leaf in enumerate(self.leaves)
        ]
        table = torch.cat(entries, 1) if entries else torch.zeros(3, 0, dtype=torch.int64)
        table = table[:, table[0] != SOLID]
        table = table[:, torch.argsort(table[0], stable=True)]
        roots, sizes = torch.unique_consecutive(table[0], return_counts=True)
        families: dict[Hashable, list[tuple[int, Tensor]]] = defaultdict(list)
        for root, members in zip(roots.tolist(), table[1:].split(sizes.tolist(), 1), strict=True):
            leaf_numbers, counts = torch.unique_consecutive(members[0], return_counts=True)
            signature = tuple(zip(leaf_numbers.tolist(), counts.tolist(), strict=True))
            families[signature].append((root, members))
        roles = self._roles()
        zeroed = torch.zeros(self.space.count, dtype=torch.bool)
        for ids in self.space.marks.get(NEEDS_ZERO, []):
            zeroed[self.root(ids)] = True
        self.groups: dict[str, ChannelGroup] = {}
        self.units: dict[str, Tensor] = {}
        for signature, units in families.items():
            unit_roots = torch.tensor([root for root, _ in units])
            group = self._group(signature, torch.stack([m[1] for _, m in units]), roles, bool(zeroed[unit_roots].any()))
            self.groups[group.name] = group
            self.units[group.name] = unit_roots
        self.group_names = list(self.groups)
        self.group_of = torch.full((self.space.count,), -1)
        for number, unit_roots in enumerate(self.units.values()):
            self.group_of[unit_roots] = number

    def _group(self, signature: Hashable, positions: Tensor, roles: list[Role], zero_all: bool) -> ChannelGroup:
        slots, start = [], 0
        for number, count in signature:  # type: ignore[attr-defined]
            leaf = self.leaves[number]
            slots.append(Slot(leaf.tensor, leaf.dim, positions[:, start : start + count], roles[number]))
            start += count
        makers = [slot for slot in slots if slot.role == "producer"] or slots
        name = base = makers[0].tensor.rpartition(".")[0] or makers[0].tensor
        copies = 1
        while name in self.groups:
            copies += 1
            name = f"{base}#{copies}"
        readers = tuple(slot for slot in slots if slot.role == "consumer")
        pattern = tuple(
            sorted((s.role, s.dim, s.index.shape[1], tuple(self.tensors[s.tensor].shape[2:])) for s in slots)
        )
        return ChannelGroup(name, tuple(slots), tuple(slots) if zero_all or not readers else readers, pattern)

    def _roles(self) -> list[Role]:
        """The role of each leaf, from marks that reached it through parameters and constants alone."""
        static = components(self.space.count, self.space.static_edges)
        marked = {}
        for role in _ROLES:
            marked[role] = torch.zeros(self.space.count, dtype=torch.bool)
            for ids in self.space.marks.get(role, []):
                marked[role][static[ids]] = True
        result: list[Role] = []
        for leaf in self.leaves:
            found = [role for role in _ROLES if bool(marked[role][static[leaf.ids]].any())]
            result.append(found[0] if found else "producer")
        return result

    def refusals(self) -> tuple[Refusal, ...]:
        """What stays whole, and why; one entry for everything that belongs together."""
        reasons: dict[int, str] = {}
        for frozen in self.space.frozen:
            if frozen.reason is not None:
                for root in torch.unique(self.united[frozen.ids]).tolist():
                    reasons.setdefault(root, frozen.reason)
        found: dict[int, Refusal] = {}
        for leaf in self.leaves:
            roots = self.united[leaf.ids]
            if bool((self.root(leaf.ids) != SOLID).any()):
                continue
            known = [root for root in torch.unique(roots).tolist() if root in reasons]
            if known and known[0] not in found:
                found[known[0]] = Refusal(f"{leaf.tensor} (dim {leaf.dim})", reasons[known[0]])
        return (*self.notes, *found.values())

    def extent(self, size: int, dim: int, planes: Sequence[Plane]) -> Extent:
        """Size of one dimension as a function of the group widths."""
        for plane in planes:
            if plane.ids.shape[dim] == 1:
                continue
            groups = self.group_of[self.root(compact(self.root(plane.ids))).flatten()]
            numbers, counts = torch.unique(groups[groups >= 0], return_counts=True)
            if len(numbers):
                names = [self.group_names[number] for number in numbers.tolist()]
                per_unit = tuple(
                    (name, int(count) // self.groups[name].width) for name, count in zip(names, counts, strict=True)
                )
                return Extent(size - int(counts.sum()), per_unit)
        return Extent(size)

    def graph(self) -> ChannelGraph:
        """The channel graph as it is known now."""
        tensors = {
            name: tuple(self.extent(n, d, self.labels[name].planes) for d, n in enumerate(tensor.shape))
            for name, tensor in self.tensors.items()
        }
        run = next((run for run in self.runs if not run.program.training), self.runs[0])

        def extents(value: object) -> object:
            if isinstance(value, Labelled):
                return tuple(self.extent(n, d, value.planes) for d, n in enumerate(value.shape))
            return value

        operations = tuple(
            Operation(c.function, tuple(extents(a) for a in c.arguments), extents(c.result))  # type: ignore[arg-type]
            for c in run.counted
        )
        return ChannelGraph(self.groups, self.refusals(), tensors, operations, run.program.samples, self)


def _entry_point(name: str) -> str:
    """What a program calls, whatever the mode: the first word of its name."""
    return name.partition(" ")[0]


def _check(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            raise TraceError(
                f"{name} is a lazy parameter that has no shape yet: run one forward pass through the network before "
                f"it is pruned, or give the LightningModule an example_input_array"
            )

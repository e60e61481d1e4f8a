"""A cut that can be proven and undone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction

import torch
from torch import Tensor

from lightning_prune.graph.analysis import Analysis, Run
from lightning_prune.graph.dry_run import NumbersNeededError
from lightning_prune.graph.labels import SOLID
from lightning_prune.graph.tracer import Memory, run_traced
from lightning_prune.surgery.attributes import (
    Remembered,
    Solver,
    UnsolvedError,
    integer_settings,
    symbolic,
    write_settings,
)
from lightning_prune.surgery.check import Checker, Expectation
from lightning_prune.surgery.constructors import Descriptions
from lightning_prune.surgery.resize import Cut, Saved, plan_cuts, resize, restore
from lightning_prune.surgery.symbols import Setting, comparisons, missed


def kept_labels(analysis: Analysis, keep: Mapping[str, Tensor]) -> Tensor:
    """For each label whether it stays, bool of shape ``[labels]``."""
    kept = torch.ones(analysis.space.count, dtype=torch.bool)
    for name, units in keep.items():
        kept[analysis.units[name]] = False
        kept[analysis.units[name][units]] = True
    kept[SOLID] = True
    return kept


class Transaction:
    """A cut that was applied and can be undone.

    Args:
        analysis: What is known of the network.
        keep: Kept units (int64 indices) of each group that is cut.

    Attributes:
        cuts: What was cut.
        saved: The tensors that were cut, as they were.
        settings: Integer attributes that were rewritten, once the cut is proven.
        scales: Numbers that follow the widths where results may be approximate, once the cut is proven.
        scaled: Labels along the dimensions whose widths they follow.
    """

    def __init__(self, analysis: Analysis, keep: Mapping[str, Tensor]) -> None:
        """Apply the cut."""
        self.model, self.analysis = analysis.model, analysis
        loose = {name: tensor for name, (tensor, _) in analysis.loose.items()}
        self.tensors: dict[str, Tensor] = {**analysis.tensors, **loose}
        self.kept = kept_labels(self.analysis, keep)
        self.cuts: dict[str, list[Cut]] = plan_cuts(analysis.groups, self.tensors, keep)
        self.cuts.update(self._loose_cuts())
        self.original = integer_settings(self.model)
        self.remembered = Remembered(self.model, self.original)
        self.descriptions = Descriptions(self.model)
        self.saved: list[Saved] = resize(self.tensors, self.cuts)
        self.settings: dict[Setting, int] = {}
        self.scales: dict[int, dict[int, float]] = {}
        self.scaled: list[Tensor] = []
        self._widths = {name: len(keep.get(name, units)) for name, units in analysis.units.items()}
        self._memory: Memory = {}

    def prove(self) -> None:
        """Run every program on the cut network; it must do what was recorded, less what was removed.

        Raises:
            UnsolvedError: If it does not.
        """
        predicted = self._predicted()
        try:
            self._prove(predicted)
        except UnsolvedError:
            if not predicted:
                raise
            self._prove({})

    def _predicted(self) -> dict[Setting, int]:
        """What the integers must be now if they follow what they followed in the trial cut."""
        laws = self.analysis.laws
        return {s: laws[s].size(self._widths) for s, value in self.original.items() if s in laws and value > 0}

    def _prove(self, predicted: Mapping[Setting, int]) -> None:
        self.scales, self.scaled = {}, []
        values = {**self.original, **self._described({}), **predicted}
        used: set[Setting] = set()
        expectation = Expectation(self.analysis, self.kept)
        runs = list({id(run.events): run for run in self.analysis.runs}.values())  # some programs do just the same
        if any([self._follows(run, expectation, values, used) is not None for run in runs]):
            for run in runs:
                revised = self._follows(run, expectation, values, used)
                if revised is not None:
                    raise UnsolvedError(revised, "one integer attribute would need two values", run)
        known = {s: Fraction(values[s], self.original[s]) for s in used if self.original[s] != 0}
        values.update(self._described(known))
        write_settings(self.model, values)
        self.settings = {s: value for s, value in values.items() if value != self.original[s]}

    def _follows(
        self, run: Run, expectation: Expectation, values: dict[Setting, int], used: set[Setting]
    ) -> int | None:
        """Run one program, anew as long as that solves settings; where one was changed after its use, if anywhere."""
        while True:
            before = dict(values)
            try:
                return self._runs(run, expectation, values, used)
            except UnsolvedError:
                if values == before:
                    raise

    def _runs(self, run: Run, expectation: Expectation, values: dict[Setting, int], used: set[Setting]) -> int | None:
        checker = Checker(expectation, run, self._memory)
        solver = Solver(checker, values, used)
        try:
            with symbolic(self.model, values), comparisons() as compared, solver:
                outputs = run_traced(run.program, checker)
            if [tuple(output.shape) for output in outputs] != run.handed_out:
                raise UnsolvedError(checker.position, "an output of the network would have another shape")
            if checker.position != len(run.events):
                raise UnsolvedError(checker.position, "the network stopped early")
        except UnsolvedError as problem:
            problem.run = run
            raise
        except (Exception, NumbersNeededError) as error:
            # The code may have checked a size against what a module remembers of it.
            values.update({s: value for s, value in missed(compared).items() if values[s] == self.original[s]})
            found = _unsolved_in(error)  # what ran the user's code may have made an error of its own of it
            reason = f"{run.program.name} failed after the cut: {error}" if found is None else found.reason
            raise UnsolvedError(checker.position if found is None else found.position, reason, run) from error
        if checker.scales.numbers:
            self.scales[id(run.events)] = checker.scales.numbers
            self.scaled += checker.scales.labels
        return solver.revised

    def _loose_cuts(self) -> dict[str, list[Cut]]:
        """How the tensors that modules keep without registering them are cut along."""
        cuts = {}
        for name, (_, labels) in self.analysis.loose.items():
            stays = [(plane.dims[0], self.kept[self.analysis.root(plane.ids.flatten())]) for plane in labels.planes]
            axes = [Cut(dim, kept.nonzero().flatten()) for dim, kept in stays if not bool(kept.all())]
            if axes:
                cuts[name] = axes
        return cuts

    def _described(self, known: Mapping[Setting, Fraction]) -> dict[Setting, int]:
        return {s: value for s, value in self.descriptions.settings(known).items() if s in self.original}

    def undo(self) -> None:
        """Put everything back."""
        restore(self.saved)
        self.remembered.restore()


def _unsolved_in(error: BaseException | None) -> UnsolvedError | None:
    """The first problem among the causes of an error."""
    while error is not None and not isinstance(error, UnsolvedError):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def applied(analysis: Analysis, keep: Mapping[str, Tensor]) -> Iterator[Transaction]:
    """Apply a cut; whatever is raised inside undoes it."""
    transaction = Transaction(analysis, keep)
    try:
        yield transaction
    except BaseException:
        transaction.undo()
        raise

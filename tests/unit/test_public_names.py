"""What can be imported from the package itself."""

from __future__ import annotations

import doctest
import typing

import pytest
import torch
from torch import nn

import lightning_prune
from lightning_prune import Criterion, PruneReport, Schedule, WeightCriterion

NAMES = {name: getattr(lightning_prune, name) for name in lightning_prune.__all__}


@pytest.mark.parametrize("base", [Criterion, WeightCriterion, Schedule, PruneReport])
def test_the_example_of_what_users_make_themselves_runs_on_public_names(base) -> None:
    example = doctest.DocTestParser().get_doctest(base.__doc__, {**NAMES, "torch": torch, "nn": nn}, "", None, 0)
    told = []
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=told.append)
    assert outcome.attempted > 0
    assert outcome.failed == 0, "".join(told)


def test_all_parts_of_a_report_are_public() -> None:
    hints = typing.get_type_hints(PruneReport, vars(lightning_prune.report))
    parts = [part for hint in hints.values() for part in (*typing.get_args(hint), hint)]
    own = {part.__name__ for part in parts if getattr(part, "__module__", "").startswith("lightning_prune")}
    assert own == {"GroupWidth", "Totals", "Round", "Request", "Refusal"}
    assert own <= NAMES.keys()

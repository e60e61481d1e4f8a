"""Random networks, randomly cut: each runs and proves equal, or is refused with a reason and left as it was."""

from __future__ import annotations

import copy
import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, currently_in_test_context, event, given, note, settings
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_prune.errors import ShrinkError, TraceError
from lightning_prune.surgery import shrink, trace
from tests.fuzz.architectures import build, examples, inputs_of
from tests.fuzz.regressions import LATE, REFUSED_IN_SHRINK, WRONG
from tests.helpers import disagreeing_attributes, masked_copy, run

EXAMPLES = int(os.environ.get("LIGHTNING_PRUNE_FUZZ_EXAMPLES", "200"))
TOLERANCE = 1e-9
SETTINGS = (bool, int, float, str)
REFUSED_LATE = 0.02
"""Share of the examples whose shrink may be refused although the trace allowed it."""


def _event(what):
    if currently_in_test_context():
        event(what)


def _plain(values):
    return all(isinstance(value, SETTINGS) for value in values)


def state(network, inputs):
    """All that can be seen of a network: tensors, attributes and outputs."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {
        "tensors": {name: (id(t), t.detach().clone(), t.grad) for name, t in tensors.items()},
        "attributes": {
            f"{name}.{key}": copy.copy(value)
            for name, module in network.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, SETTINGS) or (isinstance(value, (tuple, list)) and _plain(value))
        },
        "outputs": run(network, inputs),
    }


def same(before, after):
    if isinstance(before, Tensor):
        return torch.equal(torch.nan_to_num(before), torch.nan_to_num(after))
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(same(value, after[key]) for key, value in before.items())
    if isinstance(before, (list, tuple)):
        return len(before) == len(after) and all(map(same, before, after))
    return before == after


def assert_unchanged(before, after):
    assert [key for key in before if not same(before[key], after[key])] == []


def deviation(expected, found):
    """Largest difference relative to the largest value of each output; infinite where only one is not finite."""
    assert [tuple(a.shape) for a in expected] == [tuple(b.shape) for b in found]
    largest = 0.0
    for a, b in zip(expected, found, strict=True):
        if not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        a, b = a[a.isfinite()], b[b.isfinite()]
        if a.numel():
            largest = max(largest, float((a - b).abs().max()) / (float(a.abs().max()) or 1.0))
    return largest


def kept_units(graph, removal):
    """Random units to keep, at least one of each group."""
    generator = torch.Generator().manual_seed(removal.seed)
    names = list(graph.groups)
    if removal.single is not None:
        names = [names[removal.single % len(names)]]
    keep = {}
    for name in names:
        width = graph.groups[name].width
        size = min(max(1, round(width * (1 - removal.share))), width - 1)
        keep[name] = torch.randperm(width, generator=generator)[: max(size, 1)].sort().values
    return keep


def train_step(network, inputs):
    torch.manual_seed(0)
    network.train()
    outputs = [leaf for leaf in tree_leaves(network(inputs)) if isinstance(leaf, Tensor)]
    sum(output.square().mean() for output in outputs).backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()


def can_train(network, inputs):
    try:
        train_step(copy.deepcopy(network), inputs)
    except (RuntimeError, ValueError):
        return False
    return True


def check_shrunk(network, inputs, graph, keep, expected, reached):
    error = deviation(expected, run(network, inputs))
    assert error <= TOLERANCE, f"silently wrong by {error:.2g}"
    stale = disagreeing_attributes(network)
    assert not stale, stale
    left = {name: len(keep.get(name, range(group.width))) for name, group in graph.groups.items()}
    try:
        again = trace(network, inputs).widths
    except TraceError:
        assert not reached  # the cut made the network take a branch that no run had taken
        return
    # Units that were apart only by a coupling that went with the cut, or that are alone now, may be grouped anew.
    alike = sorted(again.values()) == sorted(width for width in left.values() if width > 1)
    _event(f"traced again: {'the same groups less what was removed' if alike else 'other groups'}")


def verdict(example):
    """Runs the property on one example; a word for what became of it."""
    network, inputs = build(example.architecture), inputs_of(example.architecture)
    before = state(network, inputs)
    try:
        graph = trace(network, inputs)
    except TraceError:
        assert_unchanged(before, state(network, inputs))
        return "refused in trace"
    assert_unchanged(before, state(network, inputs))
    if not graph.groups:
        assert graph.refused
        return "nothing to cut"
    keep = kept_units(graph, example.removal)
    expected = run(masked_copy(network, graph, keep), inputs)
    # A branch that no run has taken may read what was cut: nothing can be promised of a run that takes it.
    reached = not any("not used by any program" in reason for _, reason in graph.refused)
    trains = reached and can_train(network, inputs)
    try:
        shrink(network, graph, keep)
    except ShrinkError:
        assert_unchanged(before, state(network, inputs))
        return "refused in shrink" if reached else "refused in shrink, with branches that no run has taken"
    check_shrunk(network, inputs, graph, keep, expected, reached)
    if trains:
        train_step(network, inputs)
    changed = deviation(before["outputs"], expected) > 1e-6
    return "equal" if changed else "equal, but the cut changes nothing"


@pytest.mark.slow
def test_random_networks_are_exact_or_refused() -> None:
    seen = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize=EXAMPLES == 200,
        deadline=None,
        print_blob=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(examples())
    def holds(example):
        note(repr(example))
        outcome = verdict(example)
        event(outcome)
        seen[outcome] += 1

    holds()
    print(dict(seen))
    assert seen["equal"] >= 0.5 * seen.total(), dict(seen)
    assert seen["refused in shrink"] <= REFUSED_LATE * seen.total(), dict(seen)


@pytest.mark.parametrize("example", [*WRONG, *LATE])
def test_what_once_went_wrong(example) -> None:
    verdict(example)


@pytest.mark.parametrize("example", REFUSED_IN_SHRINK, ids=range(len(REFUSED_IN_SHRINK)))
def test_what_was_once_refused_too_late(example) -> None:
    assert verdict(example) != "refused in shrink"

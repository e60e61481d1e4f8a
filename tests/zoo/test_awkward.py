"""Tiny networks, each with one awkward construct: cut at random, proven, trained, traced again.

``PRUNABLE`` says what to expect of each.
"""

from __future__ import annotations

import pytest
import torch

from examples.benchmarks.awkward import MODELS
from examples.benchmarks.awkward_parts.prunable import PRUNABLE
from examples.benchmarks.zoo_parts.backends import prunable_share
from lightning_prune.errors import ShrinkError
from lightning_prune.graph.program import tensors_in
from lightning_prune.surgery import shrink, trace
from tests.helpers import difference, disagreeing_attributes, masked_copy, random_keep, randomise

TOLERANCE = {"bfloat16": 3e-2, "autocast": 3e-2}
KEPT = [0.5, pytest.param(0.9, marks=pytest.mark.slow), pytest.param(0.1, marks=pytest.mark.slow)]

SINGLE = {
    ("lstm_projected", 0.1): "got an incorrect number of RNN parameters",
    ("data_dependent_rows", 0.1): "__setitem__ cannot follow a change of width",
}
"""Cuts down to a single channel with which torch takes another way: refused in the shrink, and nothing is changed."""


def traced(name):
    """A network that is not cut yet, its inputs and its graph."""
    model = randomise(MODELS[name].build())
    inputs = MODELS[name].inputs()
    return model, inputs, trace(model, inputs)


WHOLE = {}
"""Networks that one test has traced and the next may cut."""


def outputs(model, inputs):
    """Like ``run``, for outputs that are dataclasses too."""
    model.eval()
    with torch.no_grad():
        found = list(tensors_in(model(*inputs)))
    return [value for value in found if value.is_floating_point() or value.is_complex()]


def train_step(model, inputs):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss = sum(value.abs().float().square().mean() for value in tensors_in(model(*inputs)) if value.requires_grad)
    loss.backward()
    optimizer.step()


def storage(model):
    """How each parameter is stored: its type, and whether four-dimensional ones have their channels last."""
    return {
        name: (tensor.dtype, tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
        for name, tensor in model.named_parameters()
        if tensor.dim() != 4 or (tensor.shape[1] > 1 and max(tensor.shape[2:]) > 1)
    }


def test_the_table_names_every_network() -> None:
    assert PRUNABLE.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_prunable(name) -> None:
    model, _, graph = WHOLE[name] = traced(name)
    share = prunable_share(model, graph)
    expected, whole = PRUNABLE[name]
    assert abs(share - expected) <= 0.02, f"{share:.3f} prunable; {whole} should stay whole; refused: {graph.refused}"
    assert graph.groups or graph.refused


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", MODELS)
def test_a_random_cut_is_exact(name, kept) -> None:
    model, inputs, graph = WHOLE.pop(name, None) or traced(name)
    keep = random_keep(graph, kept)
    dense = outputs(model, inputs)
    masked = outputs(masked_copy(model, graph, keep), inputs)
    stored = storage(model)
    if kept == 0.5 and max(graph.widths.values(), default=1) > 1:
        assert difference(dense, masked) > 1e-3

    if (name, kept) in SINGLE:
        with pytest.raises(ShrinkError, match=SINGLE[name, kept]):
            shrink(model, graph, keep)
        assert difference(dense, outputs(model, inputs)) == 0
        return
    result = shrink(model, graph, keep)
    tolerance = TOLERANCE.get(name, 1e-4)
    assert difference(masked, outputs(model, inputs)) <= tolerance
    assert (result.error or 0.0) <= tolerance
    assert disagreeing_attributes(model) == []
    left = storage(model)
    assert left == {name: stored[name] for name in left}

    train_step(model, inputs)
    found = trace(model, inputs).widths
    expected = {name: len(units) for name, units in keep.items() if len(units) > 1}
    assert {name: found.get(name) for name in expected} == expected
    # A group of one unit cannot be cut any more, and what it tied together may come free.
    if len(expected) == len(keep):
        assert found.keys() == expected.keys()

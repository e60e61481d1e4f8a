"""Small networks of the transformers library: halved at random, exact or proven by the approximate rule, trainable."""

from __future__ import annotations

import pytest
import torch

from examples.benchmarks.zoo_parts.backends import prunable_share
from examples.benchmarks.zoo_parts.tiny_transformers import MODELS
from lightning_prune.graph.program import tensors_in
from lightning_prune.surgery import shrink, trace
from tests.helpers import disagreeing_attributes, masked_copy, random_keep, randomise

pytest.importorskip("transformers", minversion="5")


def built(name):
    torch.manual_seed(0)
    model = randomise(MODELS[name].build()).eval()
    with torch.no_grad():  # biases and embeddings that are zero would hide what is cut wrong
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, tuple(MODELS[name].inputs().values())


def outputs(model, inputs):
    torch.manual_seed(1)
    with torch.no_grad():
        return [value for value in tensors_in(model(*inputs)) if value.is_floating_point()]


@pytest.mark.parametrize("norms", ["exact", "approximate"])
@pytest.mark.parametrize("name", MODELS)
def test_halved_at_random(name, norms):
    model, inputs = built(name)
    before = outputs(model, inputs)
    graph = trace(model, inputs, norms=norms)
    for value, same in zip(outputs(model, inputs), before, strict=True):
        torch.testing.assert_close(value, same, rtol=0, atol=0)
    assert prunable_share(model, graph) > 0.3
    keep = random_keep(graph)
    masked = masked_copy(model, graph, keep)
    assert shrink(model, graph, keep).error < 1e-4
    assert disagreeing_attributes(model) == []
    if not any(graph.groups[group].approximate for group in keep):
        for expected, found in zip(outputs(masked, inputs), outputs(model, inputs), strict=True):
            if expected.shape == found.shape:
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    model.train()
    sum(value.float().square().mean() for value in tensors_in(model(*inputs)) if value.requires_grad).backward()

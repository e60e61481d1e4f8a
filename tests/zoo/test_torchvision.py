"""Sixteen torchvision classifiers, unmodified and without hints: traced, halved at random, exact, trainable."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from examples.benchmarks.zoo_parts.backends import prunable_share
from lightning_prune.surgery import shrink, trace
from tests.helpers import difference, disagreeing_attributes, masked_copy, random_keep, randomise, run

# Height and width: the smallest that the model accepts in train mode where a forward pass is dear.
MODELS = {
    "alexnet": (64, 80),
    "vgg11_bn": (32, 32),
    "resnet18": (64, 48),
    "resnet50": (64, 48),
    "resnext50_32x4d": (64, 48),
    "wide_resnet50_2": (48, 32),
    "densenet121": (64, 48),
    "googlenet": (64, 48),
    "inception_v3": (299, 299),
    "mobilenet_v2": (64, 48),
    "mobilenet_v3_small": (64, 48),
    "mnasnet0_5": (64, 48),
    "shufflenet_v2_x0_5": (64, 48),
    "squeezenet1_0": (64, 48),
    "efficientnet_b0": (64, 48),
    "regnet_y_400mf": (64, 48),
}
QUICK_START = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}


def built(name):
    return randomise(torchvision.models.get_model(name, weights=None, num_classes=10, **QUICK_START.get(name, {})))


def train_step(model, optimizer, inputs):
    model.train()
    outputs = [leaf for leaf in tree_leaves(model(inputs)) if isinstance(leaf, Tensor)]
    loss = sum(nn.functional.cross_entropy(output, torch.arange(len(output))) for output in outputs)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", MODELS)
def test_half_of_every_group_goes_and_nothing_else_changes(name) -> None:
    model = built(name)
    inputs = torch.randn(2, 3, *MODELS[name])
    graph = trace(model, inputs)
    assert prunable_share(model, graph) >= 0.95

    keep = random_keep(graph)
    dense = run(model, inputs)
    masked = run(masked_copy(model, graph, keep), inputs)
    assert difference(dense, masked) > 1e-3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    result = shrink(model, graph, keep, [optimizer])
    assert difference(masked, run(model, inputs)) <= 1e-4
    assert result.error is not None
    assert result.error <= 1e-4

    assert disagreeing_attributes(model) == []

    before = copy.deepcopy(dict(model.named_parameters()))
    train_step(model, optimizer, inputs)
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) > 0.9 * len(before)  # stochastic depth leaves some out

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import ConfigurationError, ShrinkError, trace
from lightning_prune.surgery import resized
from tests.helpers import difference, masked_copy, randomise, run


class Narrow(nn.Module):
    """Does something else once its first layer has two channels or fewer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        hidden = self.first(x)
        hidden = hidden.relu() if hidden.shape[1] > 2 else hidden.tanh()
        return self.third(self.second(hidden).relu())


def conv_net():
    return randomise(
        nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 3),
        )
    )


def images():
    return torch.randn(4, 2, 4, 4)


def one_step(model, inputs, build=torch.optim.Adam):
    """An optimizer with state; the gradients stay."""
    optimizer = build(model.parameters())
    model(inputs).square().mean().backward()
    optimizer.step()
    return optimizer


class Snapshot:
    """Everything there is to know of a model and its optimizer: which objects, and what is in them."""

    def __init__(self, model, *optimizers):
        self.objects = [dict(vars(module)) for module in model.modules()]
        self.members = [(dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in model.modules()]
        self.plain = [
            {k: copy.copy(v) for k, v in vars(m).items() if isinstance(v, (int, float, str, tuple, list, type(None)))}
            for m in model.modules()
        ]
        self.hooks = [{k: len(v) for k, v in vars(m).items() if "_hooks" in k} for m in model.modules()]
        self.tensors = [*model.parameters(), *model.buffers()]
        self.values = [tensor.detach().clone() for tensor in self.tensors]
        self.pointers = [tensor.data_ptr() for tensor in self.tensors]
        self.gradients = [p.grad for p in model.parameters()]
        self.gradient_values = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        self.optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
        self.random = (torch.get_rng_state(), random.getstate(), np.random.get_state())


def same(a, b):
    """Bit for bit, in nested containers; objects of other kinds must be the same object."""
    if isinstance(a, torch.Tensor):
        return a is b or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or a == b


def touched(before, after):
    """Names of what is not as it was."""
    changed = [name for name in vars(before) if not same(getattr(before, name), getattr(after, name))]
    same_objects = [
        all(x is y for x, y in zip(getattr(before, name), getattr(after, name), strict=True))
        for name in ("tensors", "gradients")
    ]
    return changed if all(same_objects) else [*changed, "identity"]


class TestResized:
    def test_inside_small_afterwards_as_before(self):
        model, inputs = conv_net(), images()
        graph, optimizer = trace(model, inputs), one_step(model, inputs)
        before = Snapshot(model, optimizer)
        keep = {"0": torch.tensor([0, 3]), "4": torch.tensor([1, 2, 5])}
        expected = run(masked_copy(model, graph, keep), inputs)
        with resized(model, graph, keep):
            assert (model[0].out_channels, model[1].num_features, model[4].in_channels) == (2, 2, 2)
            assert model[7].weight.shape == (3, 48)
            assert difference(expected, run(model, inputs)) < 1e-5
        assert touched(before, Snapshot(model, optimizer)) == []

    def test_an_error_inside_restores_too(self):
        model = conv_net()
        graph, before = trace(model, images()), Snapshot(model)
        with pytest.raises(KeyboardInterrupt), resized(model, graph, {"0": torch.tensor([0, 3])}):
            raise KeyboardInterrupt
        assert touched(before, Snapshot(model)) == []

    def test_widths_that_cannot_be_run(self):
        model, before_cut = Narrow(), torch.randn(3, 4)
        graph, before = trace(model, before_cut), Snapshot(model)
        with (
            pytest.raises(ShrinkError, match="cannot be run with these widths"),
            resized(model, graph, {"first": torch.tensor([0])}),
        ):
            pytest.fail("the body must not run")
        assert touched(before, Snapshot(model)) == []

    def test_a_wrong_keep_is_refused(self):
        model = conv_net()
        graph, before = trace(model, images()), Snapshot(model)
        with (
            pytest.raises(ConfigurationError, match="did you mean '4'"),
            resized(model, graph, {"4x": torch.tensor([0])}),
        ):
            pytest.fail("the body must not run")
        assert touched(before, Snapshot(model)) == []

    def test_nothing_to_cut(self):
        model = conv_net()
        graph, before = trace(model, images()), Snapshot(model)
        with resized(model, graph, {"0": torch.arange(8)}):
            assert touched(before, Snapshot(model)) == []

"""What a network makes for itself in its first run and keeps is no constant of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune import shrink, trace
from tests.helpers import masked_copy

HEADS, WIDTH, STEPS = 4, 16, 5


class Attention(nn.Module):
    """Attention with a slope per head for distances (Press et al., 2022), made when a run first needs it."""

    def __init__(self):
        super().__init__()
        self.heads = HEADS
        self.qkv = nn.ModuleList(nn.Linear(6, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, 3)

    def slopes(self, steps):
        slopes = torch.tensor([2.0 ** (-8 * (head + 1) / self.heads) for head in range(self.heads)])
        places = torch.arange(steps)
        return -slopes[:, None, None] * (places[:, None] - places).abs()

    def forward(self, x):
        samples, steps, _ = x.shape
        q, k, v = (layer(x).view(samples, steps, self.heads, 4).transpose(1, 2) for layer in self.qkv)
        mixed = (q @ k.transpose(2, 3) + self.bias(steps)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(samples, steps, self.heads * 4))


class Missing(Attention):
    def bias(self, steps):
        if not hasattr(self, "kept"):
            self.kept = self.slopes(steps)
        return self.kept


class NoneAtFirst(Attention):
    def __init__(self):
        super().__init__()
        self.kept = None

    def bias(self, steps):
        if self.kept is None or self.kept.shape[-1] < steps:
            self.kept = self.slopes(steps)
        return self.kept[:, :steps, :steps]


class EmptyAtFirst(Attention):
    def __init__(self):
        super().__init__()
        self.kept = torch.zeros(0, 0, 0)

    def bias(self, steps):
        if self.kept.shape[-1] < steps:
            self.kept = self.slopes(steps)
        return self.kept[:, :steps, :steps]


class InDict(Attention):
    def __init__(self):
        super().__init__()
        self.kept = {}

    def bias(self, steps):
        if steps not in self.kept:
            self.kept[steps] = self.slopes(steps)
        return self.kept[steps]


class Buffer(Attention):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", None, persistent=False)

    def bias(self, steps):
        if self.kept is None:
            self.kept = self.slopes(steps)
        return self.kept


class FromTheStart(Attention):
    def __init__(self):
        super().__init__()
        self.kept = self.slopes(STEPS)

    def bias(self, steps):
        return self.kept


class Stateful(nn.Module):
    """Goes on from where the last batch has left it."""

    def __init__(self):
        super().__init__()
        self.take, self.turn, self.out = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.state = None

    def forward(self, x):
        state = torch.zeros(len(x), self.turn.in_features) if self.state is None else self.state
        state = torch.tanh(self.take(x[:, 0]) + self.turn(state))
        self.state = state.detach()
        return self.out(state)


class StatefulBuffer(Stateful):
    """The same, with a buffer for it that every run replaces."""

    def __init__(self):
        super().__init__()
        del self.state
        self.register_buffer("state", torch.zeros(2, WIDTH))


class StatefulList(Stateful):
    """The same, with a list for it that every run adds to."""

    def __init__(self):
        self.states = []
        super().__init__()

    @property
    def state(self):
        return self.states[-1] if self.states else None

    @state.setter
    def state(self, value):
        self.states += [] if value is None else [value]


class CachedWeight(nn.Module):
    """Works a weight out once and keeps it until its mode is switched."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.kept = None

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)

    def forward(self, x):
        weight = self.kept
        if weight is None:
            weight = self.inner.weight / self.inner.weight.norm(dim=1, keepdim=True)
            self.kept = None if self.training else weight.detach()
        return self.out(torch.relu(x[:, 0] @ weight.T))


class Gated(nn.Module):
    """Has gates of its channels if it is given some."""

    def __init__(self, gates=None):
        super().__init__()
        self.inner, self.out, self.gates = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3), gates

    def forward(self, x):
        gates = torch.ones(WIDTH) if self.gates is None else self.gates
        return self.out(torch.relu(self.inner(x)) * gates)


LAZY = [Missing, NoneAtFirst, EmptyAtFirst, InDict, Buffer]


def inputs():
    return torch.randn(2, STEPS, 6, generator=torch.Generator().manual_seed(1))


def after_a_run(kind):
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        model(inputs())
    return model


@pytest.mark.parametrize("kind", LAZY)
def test_what_the_first_run_makes_is_seen_as_if_it_were_not_there_yet(kind):
    fresh, used = trace(kind().eval(), inputs()), trace(after_a_run(kind), inputs())
    assert used.widths == fresh.widths
    assert "qkv.0.weight (dim 0)" in {refusal.path for refusal in used.refused}


@pytest.mark.parametrize("kind", [*LAZY, FromTheStart])
def test_a_trace_leaves_it_as_it_is(kind):
    model = after_a_run(kind)
    before = {**vars(model), **model._buffers, "content": model.kept[STEPS] if kind is InDict else model.kept}
    trace(model, inputs())
    after = {**vars(model), **model._buffers, "content": model.kept[STEPS] if kind is InDict else model.kept}
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_a_constant_of_the_network_goes_with_its_heads():
    model = after_a_run(FromTheStart)
    graph = trace(model, inputs())
    (name,) = (name for name, width in graph.widths.items() if width == HEADS)
    shrink(model, graph, {name: torch.tensor([1, 3])})
    assert torch.equal(model.kept, FromTheStart().kept[[1, 3]])


@pytest.mark.parametrize("kind", [Stateful, StatefulBuffer, StatefulList])
@pytest.mark.parametrize("runs", [0, 1])
def test_a_state_that_every_run_moves_on_goes_with_its_channels(kind, runs):
    torch.manual_seed(0)
    model, batches = kind().eval(), torch.randn(4, 2, STEPS, 6).unbind()
    with torch.no_grad():
        for batch in batches[:runs]:
            model(batch)
        graph = trace(model, inputs())
        (name,) = graph.groups
        keep = {name: torch.tensor([0, 2, 3, 7, 11])}
        masked = masked_copy(model, graph, keep)
        if model.state is not None:
            masked.state = masked.state * torch.isin(torch.arange(WIDTH), keep[name])
        shrink(model, graph, keep)
        for batch in batches[runs:]:
            assert torch.allclose(model(batch), masked(batch), atol=1e-6)
    assert model.state.shape == (2, 5)


def test_a_weight_that_was_worked_out_goes_with_its_channels():
    model = after_a_run(CachedWeight)
    graph = trace(model, inputs())
    (name,) = graph.groups
    shrink(model, graph, {name: torch.arange(5)})
    with torch.no_grad():
        found = model(inputs())
        model.kept = None
        assert torch.allclose(found, model(inputs()))


def test_what_a_network_does_not_make_again_is_a_constant():
    assert not trace(Gated(), inputs()).groups
    assert list(trace(Gated(torch.rand(WIDTH)), inputs()).widths.values()) == [WIDTH]


class Once(Stateful):
    """Refuses to run again before it is told to forget."""

    def forward(self, x):
        assert self.state is None, "reset me first"
        return super().forward(x)


def test_a_network_that_cannot_run_twice_is_cut_all_the_same():
    model = Once()
    graph = trace(model, inputs())
    assert list(graph.widths.values()) == [WIDTH, WIDTH]  # no state is ever handed on
    assert not [reason for _, reason in graph.refused if "could not be run" in reason]

"""Attention in which several heads of the queries share one head of keys and values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from lightning_prune import shrink, trace
from tests.helpers import masked_copy

WIDTH = 5


class Grouped(nn.Module):
    def __init__(self, way, keys, queries):
        super().__init__()
        self.way, self.keys, self.queries, self.shared = way, keys, queries, queries // keys
        self.q = nn.Linear(7, queries * WIDTH)
        self.k, self.v = nn.Linear(7, keys * WIDTH), nn.Linear(7, keys * WIDTH)
        self.out = nn.Linear(queries * WIDTH, 3)

    def forward(self, x):
        samples, steps, _ = x.shape
        q = self.q(x).view(samples, steps, self.queries, WIDTH).transpose(1, 2)
        k, v = (layer(x).view(samples, steps, self.keys, WIDTH).transpose(1, 2) for layer in (self.k, self.v))
        mixed = getattr(self, self.way)(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(samples, steps, -1))

    def built_in(self, q, k, v):
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def repeated(self, q, k, v):
        return scaled_dot_product_attention(q, *(x.repeat_interleave(self.shared, 1) for x in (k, v)))

    def expanded(self, q, k, v):
        def expanded(x):
            samples, heads, *rest = x.shape
            return x[:, :, None].expand(samples, heads, self.shared, *rest).reshape(samples, -1, *rest)

        return scaled_dot_product_attention(q, expanded(k), expanded(v))

    def broadcast(self, q, k, v):
        samples, _, *rest = q.shape
        q = q.reshape(samples, self.keys, self.shared, *rest)
        mixed = (q @ k[:, :, None].transpose(-1, -2)).softmax(-1) @ v[:, :, None]
        return mixed.reshape(samples, -1, *rest)


@pytest.mark.parametrize("way", ["built_in", "repeated", "expanded", "broadcast"])
@pytest.mark.parametrize(("keys", "queries"), [(2, 6), (4, 8)])
def test_a_head_of_keys_goes_with_the_queries_that_share_it(way, keys, queries):
    torch.manual_seed(0)
    model, x = Grouped(way, keys, queries).eval(), torch.randn(2, 4, 7)
    graph = trace(model, x)
    (name,) = graph.groups
    assert graph.widths == {name: keys}
    keep = {name: torch.tensor([keys - 1])}
    masked = masked_copy(model, graph, keep)
    before = copy.deepcopy(model)
    shrink(model, graph, keep)
    assert (model.queries, model.keys, model.shared) == (queries // keys, 1, queries // keys)
    assert torch.equal(model.q.weight, before.q.weight[-queries // keys * WIDTH :])
    assert torch.allclose(model(x), masked(x), atol=1e-6)


class Shuffled(nn.Module):
    """Repeats every channel, and all of them, which leaves one unit."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(7, 6), nn.Linear(12, 3)

    def forward(self, x):
        x = self.first(x)
        return self.last(x.repeat_interleave(2, 1) + x.repeat(1, 2))


def test_what_forms_a_single_unit_is_said_to_stay_whole():
    graph = trace(Shuffled(), torch.randn(2, 7))
    assert list(graph.widths.values()) == [1]
    assert "one unit of each group is kept" in dict(graph.refused)["first.weight (dim 0)"]

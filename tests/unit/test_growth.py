"""Wider networks compute the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune import ConfigurationError, ShrinkError, shrink, trace
from lightning_prune.graph.channels import ChannelGroup, Slot
from lightning_prune.growth import copies_for, growable, is_shareable, share_out, widen, widened_axis
from lightning_prune.surgery.resize import Cut
from tests.helpers import Net, difference, disagreeing_attributes, randomise, run

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def numbers(seed=0):
    return torch.Generator().manual_seed(seed)


def grown(model, inputs, expand=1.5, noise=0.0, optimizers=()):
    """Widen every group that can grow; returns what came of it and the traced graph before."""
    graph = trace(model, inputs)
    copies = {name: copies_for(group.width, expand, numbers()) for name, group in graph.groups.items()}
    chosen = growable(graph, copies)
    return widen(graph, {name: copies[name] for name in chosen}, optimizers, noise, numbers(1)), graph


def residual():
    def function(net, x):
        x = F.relu(net.first_norm(net.first(x)))
        for block in net.blocks:
            x = F.relu(x + block(x))
        return net.head(x.mean((2, 3)))

    def block():
        convs = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.Conv2d(4, 6, 3, padding=1)
        return nn.Sequential(convs[0], nn.BatchNorm2d(4), nn.SiLU(), convs[1], nn.BatchNorm2d(6))

    parts = {"first": nn.Conv2d(3, 6, 3, padding=1), "first_norm": nn.BatchNorm2d(6), "head": nn.Linear(6, 5)}
    return Net(function, blocks=nn.ModuleList([block(), block()]), **parts)


def depthwise():
    layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.Hardswish()]
    return nn.Sequential(*layers, nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 3))


def grouped():
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.PReLU(12), nn.Conv2d(12, 3, 1)
    )


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.GELU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2))


def concatenated():
    def function(net, x):
        first = F.relu(net.a(x))
        second = F.relu(net.b(first))
        return net.c(torch.cat([second, x, first], 1))

    return Net(function, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 6, 3, padding=1), c=nn.Conv2d(13, 2, 1))


def gated_units():
    def function(net, x):
        value, gate = net.wide(x).chunk(2, 1)
        return net.back(value * torch.sigmoid(gate))

    return Net(function, wide=nn.Conv2d(3, 10, 1), back=nn.ConvTranspose2d(5, 2, 2, stride=2))


MODELS = [residual, depthwise, grouped, linear, concatenated, gated_units]


class TestWiden:
    @pytest.mark.parametrize("noise", [0.0, 0.5])
    @pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
    def test_a_wider_network_computes_the_same(self, make, noise):
        torch.manual_seed(0)
        model = randomise(make())
        expected, size = run(model, IMAGES), sum(p.numel() for p in model.parameters())
        result, before = grown(model, IMAGES, noise=noise)
        assert difference(expected, run(model, IMAGES)) <= 1e-5
        assert result.error <= 1e-5
        assert disagreeing_attributes(model) == []
        assert sum(p.numel() for p in model.parameters()) > 1.3 * size
        after = trace(model, IMAGES)
        assert after.widths == {name: int(width * 1.5 + 0.5) for name, width in before.widths.items()}

    def test_batch_statistics_are_followed_too(self):
        torch.manual_seed(0)
        model = residual()
        original = copy.deepcopy(model)
        grown(model, IMAGES)
        assert difference([original.train()(IMAGES)], [model.train()(IMAGES)]) <= 1e-5
        assert difference(run(original, IMAGES), run(model, IMAGES)) <= 1e-5

    def test_a_group_becomes_several_times_as_wide(self):
        model = linear()
        expected = run(model, IMAGES)
        grown(model, IMAGES, expand=3.4, noise=0.1)
        assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [24, 17, 2]
        assert difference(expected, run(model, IMAGES)) <= 1e-5

    def test_parameters_stay_the_same_objects_and_optimizers_go_on(self):
        model = linear()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        model(IMAGES).square().sum().backward()
        optimizer.step()
        before = list(model.parameters())
        moments = optimizer.state[model[1].bias]["exp_avg"].clone()
        result, _ = grown(model, IMAGES, optimizers=[optimizer])
        assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
        (cut,) = result.widening.cuts["1.bias"]
        assert torch.equal(optimizer.state[model[1].bias]["exp_avg"], moments[cut.positions])
        optimizer.zero_grad()
        model(IMAGES).square().sum().backward()
        optimizer.step()

    def test_copies_learn_apart_only_with_noise(self):
        for noise, alike in ((0.0, True), (0.1, False)):
            model = linear()
            graph = trace(model, IMAGES)
            widen(graph, {"1": torch.tensor([2, 1, 1, 1, 1, 1, 1])}, noise=noise, generator=numbers())
            model(IMAGES).square().sum().backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            assert torch.allclose(model[1].weight[0], model[1].weight[1], atol=1e-7) == alike

    def test_shrinking_back_to_one_copy_of_each_with_what_all_had_is_the_original(self):
        model = linear()
        original = copy.deepcopy(model)
        widen(trace(model, IMAGES), {"1": torch.full((7,), 2)})
        with torch.no_grad():
            model[3].weight *= 2
        shrink(model, trace(model, IMAGES), {"1": torch.arange(0, 14, 2)})
        assert difference(run(original, IMAGES), run(model, IMAGES)) <= 1e-6

    def test_what_cannot_be_widened_is_left_as_it_was(self):
        class Stiff(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4)
                self.c = nn.Linear(4, 2)

            def forward(self, x):
                hidden = F.relu(self.a(x))
                if hidden.shape[1] > 4:
                    raise ValueError("no room for so many")
                return self.c(F.relu(self.b(hidden)))

        model, inputs = Stiff(), torch.randn(5, 3)
        before, graph = copy.deepcopy(model.state_dict()), trace(model, inputs)
        copies = {name: torch.full((4,), 2) for name in graph.groups}
        assert growable(graph, copies) == ["b"]
        with pytest.raises(ShrinkError, match="no room for so many"):
            widen(graph, copies)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert (model.a.out_features, model.b.in_features) == (4, 4)
        widen(graph, {"b": copies["b"]})
        assert model.b.out_features == 8

    def test_queries_and_keys_do_not_grow(self):
        def function(net, x):
            scores = net.query(x) @ net.key(x).transpose(1, 2)
            return net.out(scores.sigmoid() @ net.value(x))

        parts = {name: nn.Linear(3, 4) for name in ("query", "key", "value")}
        model, inputs = Net(function, **parts, out=nn.Linear(4, 2)), torch.randn(2, 5, 3)
        graph = trace(model, inputs)
        assert {name: is_shareable(group) for name, group in graph.groups.items()} == {"query": False, "value": True}

    def test_copies_that_do_not_fit_are_refused(self):
        graph = trace(linear(), IMAGES)
        with pytest.raises(ConfigurationError, match="no channel group is called '2'"):
            widen(graph, {"2": torch.tensor([2])})
        for times in (torch.tensor([2]), torch.tensor([0, 1, 1, 1, 1, 1, 1]), torch.ones(7)):
            with pytest.raises(ConfigurationError, match="group '1' has 7 units"):
                widen(graph, {"1": times})


class TestPieces:
    def test_an_axis_keeps_copies_of_a_block_together(self):
        owners = torch.tensor([0, 1, -1, -1, 0, 1])
        assert widened_axis(owners, torch.tensor([2, 3])).tolist() == [0, 0, 1, 1, 1, 2, 3, 4, 4, 5, 5, 5]

    def test_what_is_shared_out_adds_up(self):
        weight = torch.arange(12.0).reshape(3, 4)
        positions = torch.tensor([0, 0, 0, 1, 2, 2, 3])
        wide = weight[:, positions].clone()
        share_out(wide, Cut(1, positions), 0.3, numbers())
        sums = torch.zeros(3, 4).index_add(1, positions, wide)
        assert torch.allclose(sums, weight, atol=1e-6)
        assert torch.equal(wide[:, 3], weight[:, 1])
        assert not torch.allclose(wide[:, 0], wide[:, 1])

    @pytest.mark.parametrize(
        ("width", "expand", "wanted"), [(4, 1.5, 6), (5, 1.5, 8), (3, 2.0, 6), (1, 1.4, 1), (4, 3.25, 13)]
    )
    def test_copies_make_the_wanted_width(self, width, expand, wanted):
        copies = copies_for(width, expand, numbers())
        assert int(copies.sum()) == wanted
        assert int(copies.max() - copies.min()) <= 1

    def test_only_what_weights_alone_read_can_be_shared(self):
        makes, reads = (Slot(role, 0, torch.arange(2)[:, None], role) for role in ("producer", "consumer"))
        assert is_shareable(ChannelGroup("a", (makes, reads), (reads,)))
        assert not is_shareable(ChannelGroup("a", (makes, reads), (makes, reads)))
        assert not is_shareable(ChannelGroup("a", (makes, reads), (reads,), approximate=True))

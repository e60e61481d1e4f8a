"""What a trial cut makes of networks that share numbers among layers, or remember things outside themselves."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import nn

from lightning_prune import shrink, trace


class Grid(nn.Module):
    """Adds positions that a function remembers for the last size that it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)

    @lru_cache(maxsize=1)  # noqa: B019
    def positions(self, height, width):
        return torch.arange(height)[:, None] * torch.arange(width) / 10

    def forward(self, images):
        maps = self.first(images).relu()
        return self.head(self.second(maps + self.positions(*maps.shape[2:])).mean((2, 3)))


class TestAMemoryOutsideTheNetwork:
    def test_the_first_run_may_fill_it(self) -> None:
        assert trace(Grid(), torch.randn(2, 3, 7, 9)).widths == {"first": 8, "second": 8}

    @pytest.mark.parametrize("verify", [True, False])
    def test_it_may_be_lost_before_the_cut(self, verify) -> None:
        network = Grid()
        graph = trace(network, torch.randn(2, 3, 7, 9))
        network.positions(3, 4)
        shrink(network, graph, {"first": torch.arange(5), "second": torch.tensor([1, 6])}, verify=verify)
        assert (network.first.out_channels, network.head.in_features) == (5, 2)

    def test_a_network_that_never_repeats_itself_stays_whole(self) -> None:
        calls = []

        class Restless(Grid):
            def positions(self, height, width):
                calls.append(0)
                grid = torch.zeros(height, width)
                for _ in calls:
                    grid = grid + 1
                return grid

        graph = trace(Restless(), torch.randn(2, 3, 7, 9))
        assert graph.widths == {}
        assert dict(graph.refused)["first.weight (dim 0)"].startswith("add cannot follow a change of width")


class Cascade(nn.Module):
    """Heads that take their widths from the same two numbers; each is fed with what the one before it made."""

    def __init__(self, width, heads, key, out):
        super().__init__()
        self.key, self.value = key, width // heads
        self.heads = nn.ModuleList(nn.Linear(self.value, 2 * key + self.value) for _ in range(heads))
        self.scales = nn.ParameterList(torch.rand(key) for _ in range(heads))
        self.last = nn.Linear(width, out)

    def forward(self, x):
        made, carried = [], 0
        for head, part, scale in zip(self.heads, x.chunk(len(self.heads), -1), self.scales, strict=True):
            query, key, value = head(part + carried).split([self.key, self.key, self.value], -1)
            carried = (query * scale * key).sum(-1, keepdim=True) * value
            made.append(carried)
        return self.last(torch.cat(made, -1))


@pytest.mark.parametrize("key", [4, 8])
def test_another_group_that_fails_earlier_does_not_take_the_blame_away(key) -> None:
    network = nn.Sequential(nn.Linear(5, 8), Cascade(8, 2, 8, 32), Cascade(32, 2, key, 3))
    graph = trace(network, torch.randn(2, 5))
    assert graph.widths == {"1.heads.0": 8, "2.heads.0": key}
    keep = {"1.heads.0": torch.tensor([0, 5, 7]), "2.heads.0": torch.tensor([1, 3])}
    shrink(network, graph, keep)
    assert [(stage.key, stage.value) for stage in network[1:]] == [(3, 4), (2, 16)]


def test_heads_that_fail_one_by_one_are_found_by_the_number_they_share() -> None:
    network = nn.Sequential(nn.Linear(5, 64), Cascade(64, 4, 16, 32), Cascade(32, 2, 8, 3))
    assert trace(network, torch.randn(2, 5)).widths == {"2.heads.0": 8}


class Ratio(nn.Module):
    """The width of the values is a multiple of another one, and happens to be that of the layer before."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.ratio = 8, 2
        self.first, self.qkv, self.last = nn.Linear(5, 16), nn.Linear(16, 32), nn.Linear(16, 3)

    def forward(self, x):
        query, key, value = self.qkv(self.first(x)).split([self.key, self.key, self.ratio * self.key], -1)
        return self.last((query * key).sum(-1, keepdim=True) * value)


def test_a_group_that_can_lose_half_by_itself_needs_no_partner() -> None:
    graph = trace(Ratio(), torch.randn(2, 5))
    assert graph.widths == {"first": 16}
    assert dict(graph.refused)["qkv.weight (dim 0)"].startswith("split cannot follow a change of width")


class Halves(nn.Module):
    """Each half of the channels goes a way of its own, to as many channels as there were."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 16
        self.first, self.hidden, self.last = nn.Linear(5, 16), nn.Linear(16, 10), nn.Linear(10, 3)
        self.ways = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))

    def forward(self, x):
        halves = self.first(x).split(self.width // 2, 1)
        return self.last(self.hidden(sum(way(half) for way, half in zip(self.ways, halves, strict=True))))


def test_a_number_that_would_fit_rounded_too_follows_what_its_call_is_given() -> None:
    network = Halves()
    graph = trace(network, torch.randn(2, 5))
    assert graph.widths == {"first": 8, "ways.0": 16, "hidden": 10}
    shrink(network, graph, {"first": torch.arange(3), "ways.0": torch.arange(7)})  # 7 // 2 is right too
    assert network.width == 6

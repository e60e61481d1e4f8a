"""What belongs together in tiny networks, worked out by hand; each is then cut and compared with its masked self."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune.graph.rules import _USER_RULES, register_rule
from lightning_prune.graph.rules.pointwise import pointwise
from lightning_prune.surgery import shrink, trace
from tests.helpers import Net, difference, disagreeing_attributes, masked_copy, random_keep, randomise, run

IMAGE = (2, 3, 6, 4)
ROWS = (5, 4)
conv, linear = nn.Conv2d, nn.Linear
P, B, S, T, C = "producer", "bias", "scale", "statistic", "consumer"


def each(units, entries=1, start=0):
    """Units that own consecutive entries."""
    return [[start + unit * entries + entry for entry in range(entries)] for unit in range(units)]


def every(units, copies, start=0):
    """Units that own one entry of each of several equal blocks."""
    return [[start + unit + units * block for block in range(copies)] for unit in range(units)]


def layer(name, units, role=P):
    """Slots of the rows and the bias of a layer."""
    return {(f"{name}.weight", 0): (role, each(units)), (f"{name}.bias", 0): (B, each(units))}


def norm(name, index):
    """Slots of a batch-norm."""
    slots = {(f"{name}.weight", 0): (S, index), (f"{name}.bias", 0): (B, index)}
    return {**slots, (f"{name}.running_mean", 0): (T, index), (f"{name}.running_var", 0): (T, index)}


def reads(tensor, index, dim=1):
    """The slot of a tensor that reads channels."""
    return {(tensor, dim): (C, index)}


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


class Case:
    """A network, and its groups: name -> (slots, which of them switch a unit off; None for the consumers)."""

    def __init__(self, build, groups, inputs=(ROWS,)):
        self.build, self.groups, self.inputs = build, groups, inputs

    def network(self):
        torch.manual_seed(0)
        inputs = [x() if callable(x) else torch.randn(x) for x in self.inputs]
        return randomise(self.build()), inputs


def found(graph):
    """Groups of a graph in the form of the table below."""
    return {
        name: {(s.tensor, s.dim): (s.role, s.index.tolist()) for s in group.slots}
        for name, group in graph.groups.items()
    }


def gated(net, x):
    gate = torch.sigmoid(net.up(F.relu(net.down(x.mean((2, 3), keepdim=True)))))
    return x * gate


def shuffled(x, groups):
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def in_place(net, x):
    y = net.a(x)
    y += net.b(x)
    return net.c(F.relu_(y).mul_(2))


def data_dependent(net, x):
    h = F.relu(net.a(x))
    for _ in range(int(x.abs().sum()) % 2 + 2):
        h = F.relu(net.b(h))
    return net.c(h) if float(x.sum()) > -1e6 else h.mean(1)


def written_by_slices(net, x):
    a, b = net.a(x), net.b(x)
    joined = torch.zeros(len(x), a.shape[1] + b.shape[1])
    joined[:, : a.shape[1]] = a
    joined[:, a.shape[1] :] = b
    return net.c(joined)


def attention(net, x):
    q, k, v = net.qkv(x).chunk(3, -1)
    return net.o((q @ k.transpose(1, 2)).softmax(-1) @ v)


def recurrent(net, x):
    h = torch.zeros(len(x), net.width)
    for step in x.unbind(1):
        h = torch.tanh(net.a(step) + net.r(h))
    return net.c(h)


def two_names():
    net = Net(lambda n, x: n.c(F.relu(n.a(x))) + n.c(F.relu(n.b(x))), a=linear(4, 8), b=linear(4, 8), c=linear(8, 3))
    net.b.weight = net.a.weight
    return net


CASES = {
    "residual": Case(
        lambda: Net(
            lambda n, x: n.c(F.relu(n.a(x) + n.b(F.relu(n.a(x))))), a=conv(3, 5, 1), b=conv(5, 5, 1), c=conv(5, 2, 1)
        ),
        {"a": {**layer("a", 5), **layer("b", 5), **reads("b.weight", each(5)), **reads("c.weight", each(5))}},
        [IMAGE],
    ),
    "concat of uneven parts": Case(
        lambda: Net(
            lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], 1)), a=conv(3, 5, 1), b=conv(3, 7, 1), c=conv(12, 2, 1)
        ),
        {
            "a": {**layer("a", 5), **reads("c.weight", each(5))},
            "b": {**layer("b", 7), **reads("c.weight", each(7, start=5))},
        },
        [IMAGE],
    ),
    "equal chunks": Case(
        lambda: Net(lambda n, x: n.b(torch.mul(*n.a(x).chunk(2, 1))), a=conv(3, 8, 1), b=conv(4, 2, 1)),
        {"a": {("a.weight", 0): (P, every(4, 2)), ("a.bias", 0): (B, every(4, 2)), **reads("b.weight", each(4))}},
        [IMAGE],
    ),
    "split by an attribute": Case(
        lambda: Net(
            lambda n, x: torch.add(*(m(p) for m, p in zip(n.parts, n.a(x).split(n.sizes, 1), strict=True))),
            a=conv(3, 8, 1),
            parts=nn.ModuleList([conv(3, 2, 1), conv(5, 2, 1)]),
            sizes=[3, 5],
        ),
        {
            "a": {("a.weight", 0): (P, each(3)), ("a.bias", 0): (B, each(3)), **reads("parts.0.weight", each(3))},
            "a#2": {
                ("a.weight", 0): (P, each(5, start=3)),
                ("a.bias", 0): (B, each(5, start=3)),
                **reads("parts.1.weight", each(5)),
            },
        },
        [IMAGE],
    ),
    "gated linear unit": Case(
        lambda: nn.Sequential(linear(4, 12), nn.GLU(), linear(6, 3)),
        {"0": {("0.weight", 0): (P, every(6, 2)), ("0.bias", 0): (B, every(6, 2)), **reads("2.weight", each(6))}},
    ),
    "channel shuffle": Case(
        lambda: Net(lambda n, x: n.b(shuffled(n.a(x), 2)), a=conv(3, 8, 1), b=conv(8, 2, 1)),
        {"a": {("a.weight", 0): (P, every(4, 2)), ("a.bias", 0): (B, every(4, 2)), **reads("b.weight", each(4, 2))}},
        [IMAGE],
    ),
    "channel shuffle operator": Case(
        lambda: nn.Sequential(conv(3, 8, 1), nn.ChannelShuffle(2), conv(8, 2, 1)),
        {"0": {("0.weight", 0): (P, every(4, 2)), ("0.bias", 0): (B, every(4, 2)), **reads("2.weight", each(4, 2))}},
        [IMAGE],
    ),
    "shuffles across each other": Case(  # between them the channels of a unit lie in a row: whole pieces of the second
        lambda: nn.Sequential(conv(3, 8, 1), nn.ChannelShuffle(4), nn.ChannelShuffle(2), conv(8, 2, 1)),
        {"0": {("0.weight", 0): (P, each(1, 8)), ("0.bias", 0): (B, each(1, 8)), **reads("3.weight", each(1, 8))}},
        [IMAGE],
    ),
    "flatten to linear": Case(
        lambda: nn.Sequential(conv(3, 5, 3), nn.ReLU(), nn.Flatten(), linear(5 * 4 * 2, 3)),
        {"0": {**layer("0", 5), **reads("3.weight", each(5, 8))}},
        [IMAGE],
    ),
    "depthwise": Case(
        lambda: nn.Sequential(conv(3, 6, 1), conv(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.ReLU6(), conv(6, 2, 1)),
        {"0": {**layer("0", 6), **layer("1", 6), **norm("2", each(6)), **reads("4.weight", each(6))}},
        [IMAGE],
    ),
    "depthwise with a multiplier": Case(
        lambda: nn.Sequential(conv(3, 4, 1), conv(4, 12, 3, groups=4), nn.BatchNorm2d(12), conv(12, 2, 1)),
        {
            "0": {
                **layer("0", 4),
                ("1.weight", 0): (P, each(4, 3)),
                ("1.bias", 0): (B, each(4, 3)),
                **norm("2", each(4, 3)),
                **reads("3.weight", each(4, 3)),
            }
        },
        [IMAGE],
    ),
    "grouped": Case(
        lambda: nn.Sequential(conv(3, 8, 1), conv(8, 12, 3, groups=4), nn.ReLU(), conv(12, 2, 1)),
        {
            "0": {
                ("0.weight", 0): (P, each(4, 2)),
                ("0.bias", 0): (B, each(4, 2)),
                ("1.weight", 0): (P, each(4, 3)),
                ("1.bias", 0): (B, each(4, 3)),
                **reads("3.weight", each(4, 3)),
            }
        },
        [IMAGE],
    ),
    "grouped on the input": Case(
        lambda: nn.Sequential(conv(3, 6, 3, groups=3), nn.ReLU(), conv(6, 2, 1)),
        {
            "0": {
                ("0.weight", 0): (P, [[0, 2, 4], [1, 3, 5]]),
                ("0.bias", 0): (B, [[0, 2, 4], [1, 3, 5]]),
                **reads("2.weight", [[0, 2, 4], [1, 3, 5]]),
            }
        },
        [IMAGE],
    ),
    "transposed": Case(
        lambda: nn.Sequential(conv(3, 8, 1), nn.ConvTranspose2d(8, 6, 3, stride=2), nn.ReLU(), conv(6, 2, 1)),
        {
            "0": {**layer("0", 8), **reads("1.weight", each(8), 0)},
            "1": {("1.weight", 1): (P, each(6)), ("1.bias", 0): (B, each(6)), **reads("3.weight", each(6))},
        },
        [IMAGE],
    ),
    "transposed and grouped": Case(
        lambda: nn.Sequential(conv(3, 8, 1), nn.ConvTranspose2d(8, 12, 3, groups=4), nn.ReLU(), conv(12, 2, 1)),
        {
            "0": {
                ("0.weight", 0): (P, each(4, 2)),
                ("0.bias", 0): (B, each(4, 2)),
                ("1.weight", 0): (P, each(4, 2)),
                ("1.bias", 0): (B, each(4, 3)),
                **reads("3.weight", each(4, 3)),
            }
        },
        [IMAGE],
    ),
    "one and three dimensions": Case(
        lambda: Net(
            lambda n, x, y: (n.b(F.relu(n.a(x))).mean(-1), n.d(F.relu(n.c(y))).mean((2, 3, 4))),
            a=nn.Conv1d(3, 6, 3),
            b=nn.Conv1d(6, 2, 1),
            c=nn.Conv3d(2, 5, 2),
            d=nn.Conv3d(5, 2, 1),
        ),
        {"a": {**layer("a", 6), **reads("b.weight", each(6))}, "c": {**layer("c", 5), **reads("d.weight", each(5))}},
        [(2, 3, 9), (2, 2, 4, 5, 3)],
    ),
    "squeeze and excitation": Case(
        lambda: Net(
            lambda n, x: n.b(gated(n, n.a(x))), a=conv(3, 8, 1), down=conv(8, 4, 1), up=conv(4, 8, 1), b=conv(8, 2, 1)
        ),
        {
            "a": {**layer("a", 8), **reads("down.weight", each(8)), **layer("up", 8), **reads("b.weight", each(8))},
            "down": {**layer("down", 4), **reads("up.weight", each(4))},
        },
        [IMAGE],
    ),
    "global pooling": Case(
        lambda: nn.Sequential(conv(3, 6, 3), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(6, 3)),
        {"0": {**layer("0", 6), **reads("4.weight", each(6))}},
        [IMAGE],
    ),
    "mean and maximum joined": Case(
        lambda: Net(
            lambda n, x: n.b(torch.cat([n.a(x).mean((2, 3)), n.a(x).amax((2, 3))], 1)), a=conv(3, 5, 1), b=linear(10, 2)
        ),
        {"a": {**layer("a", 5), **reads("b.weight", every(5, 2))}},
        [IMAGE],
    ),
    "pixel shuffle": Case(
        lambda: nn.Sequential(conv(3, 16, 1), nn.PixelShuffle(2), nn.ReLU(), conv(4, 2, 1)),
        {"0": {("0.weight", 0): (P, each(4, 4)), ("0.bias", 0): (B, each(4, 4)), **reads("3.weight", each(4))}},
        [IMAGE],
    ),
    "pixel unshuffle": Case(
        lambda: nn.Sequential(conv(3, 4, 1), nn.PixelUnshuffle(2), nn.ReLU(), conv(16, 2, 1)),
        {"0": {**layer("0", 4), **reads("3.weight", each(4, 4))}},
        [IMAGE],
    ),
    "raw parameters": Case(
        lambda: Net(
            lambda n, x: F.linear(F.relu(F.linear(x, n.w, n.b)), n.v),
            w=parameter(6, 4),
            b=parameter(6),
            v=parameter(3, 6),
        ),
        {"w": {("w", 0): (P, each(6)), ("b", 0): (B, each(6)), **reads("v", each(6))}},
    ),
    "matrix products": Case(
        lambda: Net(lambda n, x: F.relu(x @ n.w + n.b) @ n.v, w=parameter(4, 6), b=parameter(6), v=parameter(6, 3)),
        {"w": {("w", 1): (P, each(6)), ("b", 0): (B, each(6)), **reads("v", each(6), 0)}},
    ),
    "a module used twice": Case(
        lambda: Net(
            lambda n, x: n.c(F.relu(n.b(F.relu(n.b(F.relu(n.a(x))))))), a=linear(4, 8), b=linear(8, 8), c=linear(8, 3)
        ),
        {"a": {**layer("a", 8), **layer("b", 8), **reads("b.weight", each(8)), **reads("c.weight", each(8))}},
    ),
    "one tensor under two names": Case(
        two_names, {"a": {**layer("a", 8), ("b.bias", 0): (B, each(8)), **reads("c.weight", each(8))}}
    ),
    "a tied decoder": Case(
        lambda: Net(lambda n, x: F.linear(n.b(F.relu(n.a(x))), n.a.weight.t()), a=linear(4, 8), b=linear(8, 8)),
        {
            "b": {
                ("a.weight", 0): (C, each(8)),
                ("a.bias", 0): (B, each(8)),
                **layer("b", 8),
                **reads("b.weight", each(8)),
            }
        },
    ),
    "a tied embedding": Case(
        lambda: Net(
            lambda n, i: F.linear(F.relu(n.b(F.relu(n.a(n.e(i))))), n.e.weight),
            e=nn.Embedding(11, 8),
            a=linear(8, 6),
            b=linear(6, 8),
        ),
        {
            "b": {**reads("e.weight", each(8)), **reads("a.weight", each(8)), **layer("b", 8)},
            "a": {**layer("a", 6), **reads("b.weight", each(6))},
        },
        [lambda: torch.randint(0, 11, (3, 5))],
    ),
    "whole groups under group norm": Case(
        lambda: nn.Sequential(conv(3, 12, 1), nn.GroupNorm(4, 12), nn.ReLU(), conv(12, 2, 1)),
        {
            "0": {
                ("0.weight", 0): (P, each(4, 3)),
                ("0.bias", 0): (B, each(4, 3)),
                ("1.weight", 0): (S, each(4, 3)),
                ("1.bias", 0): (B, each(4, 3)),
                **reads("3.weight", each(4, 3)),
            }
        },
        [IMAGE],
    ),
    "layer norm stays whole": Case(
        lambda: nn.Sequential(linear(4, 8), nn.LayerNorm(8), nn.ReLU(), linear(8, 6), nn.ReLU(), linear(6, 2)),
        {"3": {**layer("3", 6), **reads("5.weight", each(6))}},
    ),
    "instance norm": Case(
        lambda: nn.Sequential(conv(3, 8, 1), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), conv(8, 2, 1)),
        {
            "0": {
                **layer("0", 8),
                ("1.weight", 0): (S, each(8)),
                ("1.bias", 0): (B, each(8)),
                **reads("3.weight", each(8)),
            }
        },
        [IMAGE],
    ),
    "batch norm of live statistics": Case(
        lambda: nn.Sequential(linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.GELU(), linear(8, 2)),
        {
            "0": {
                **layer("0", 8),
                ("1.weight", 0): (S, each(8)),
                ("1.bias", 0): (B, each(8)),
                **reads("3.weight", each(8)),
            }
        },
    ),
    "batch norm after flatten": Case(
        lambda: nn.Sequential(conv(3, 4, 1), nn.Flatten(), nn.BatchNorm1d(96), linear(96, 3)),
        {"0": {**layer("0", 4), **norm("2", each(4, 24)), **reads("3.weight", each(4, 24))}},
        [IMAGE],
    ),
    "in-place": Case(
        lambda: Net(in_place, a=linear(4, 8), b=linear(4, 8), c=linear(8, 3)),
        {"a": {**layer("a", 8), **layer("b", 8), **reads("c.weight", each(8))}},
    ),
    "outputs in a dictionary": Case(
        lambda: Net(
            lambda n, x: {"y": n.b(F.relu(n.a(x))), "more": [n.c(F.relu(n.a(x)))]},
            a=linear(4, 8),
            b=linear(8, 3),
            c=linear(8, 2),
        ),
        {"a": {**layer("a", 8), **reads("b.weight", each(8)), **reads("c.weight", each(8))}},
    ),
    "two inputs": Case(
        lambda: Net(lambda n, x, y: n.c(F.relu(n.a(x) + n.b(y))), a=linear(4, 8), b=linear(5, 8), c=linear(8, 3)),
        {"a": {**layer("a", 8), **layer("b", 8), **reads("c.weight", each(8))}},
        [ROWS, (5, 5)],
    ),
    "branches and loops on data": Case(
        lambda: Net(data_dependent, a=linear(4, 8), b=linear(8, 8), c=linear(8, 3)),
        {"a": {**layer("a", 8), **layer("b", 8), **reads("b.weight", each(8)), **reads("c.weight", each(8))}},
    ),
    "pieces written by slices": Case(
        lambda: Net(written_by_slices, a=linear(4, 8), b=linear(4, 6), c=linear(14, 3)),
        {
            "a": {**layer("a", 8), **reads("c.weight", each(8))},
            "b": {**layer("b", 6), **reads("c.weight", each(6, start=8))},
        },
    ),
    "padded shortcut": Case(
        lambda: Net(
            lambda n, x: n.c(n.b(F.relu(n.a(x))) + F.pad(n.a(x), (0, 0, 0, 0, 2, 2))),
            a=conv(3, 4, 1),
            b=conv(4, 8, 1),
            c=conv(8, 2, 1),
        ),
        {
            "a": {
                **layer("a", 4),
                ("b.weight", 0): (P, each(4, start=2)),
                ("b.bias", 0): (B, each(4, start=2)),
                **reads("b.weight", each(4)),
                **reads("c.weight", each(4, start=2)),
            },
        },
        [IMAGE],
    ),
    "a gain per channel": Case(
        lambda: Net(
            lambda n, x: n.c(n.a(x) + n.g * F.silu(n.b(n.a(x)))),
            a=linear(4, 8),
            b=linear(8, 8),
            c=linear(8, 3),
            g=parameter(8),
        ),
        {
            "a": {
                ("g", 0): (S, each(8)),
                **layer("a", 8),
                **layer("b", 8),
                **reads("b.weight", each(8)),
                **reads("c.weight", each(8)),
            }
        },
    ),
    "a buffer along the channels": Case(
        lambda: Net(lambda n, x: n.c(n.a(x) * n.m), a=linear(4, 8), c=linear(8, 3), m=torch.rand(8)),
        {"a": {**layer("a", 8), **reads("c.weight", each(8)), ("m", 0): (S, each(8))}},
    ),
    "low rank": Case(
        lambda: Net(
            lambda n, x: F.linear(F.relu(F.linear(x, n.u @ n.v)), n.w),
            u=parameter(6, 2),
            v=parameter(2, 4),
            w=parameter(3, 6),
        ),
        {
            "u": {("u", 0): (P, each(6)), **reads("w", each(6))},
            "u#2": {**reads("u", each(2)), **reads("v", each(2), 0)},
        },
    ),
    "normalised channels": Case(
        lambda: Net(lambda n, x: n.b(F.normalize(n.a(x), dim=1)), a=linear(4, 8), b=linear(8, 3)),
        {"a": {**layer("a", 8), **reads("b.weight", each(8))}},
    ),
    "product summed over channels": Case(
        lambda: Net(lambda n, x: (n.a(x) * n.b(x)).sum(1), a=linear(4, 8), b=linear(4, 8)),
        {"a": {**layer("a", 8), **layer("b", 8)}},
    ),
    "attention by hand": Case(
        lambda: Net(attention, qkv=linear(4, 18), o=linear(6, 3)),
        {"qkv": {("qkv.weight", 0): (P, every(6, 3)), ("qkv.bias", 0): (B, every(6, 3)), **reads("o.weight", each(6))}},
        [(2, 5, 4)],
    ),
    "recurrence by hand": Case(
        lambda: Net(recurrent, a=linear(4, 8), r=linear(8, 8), c=linear(8, 3), width=8),
        {"a": {**layer("a", 8), **layer("r", 8), **reads("r.weight", each(8)), **reads("c.weight", each(8))}},
        [(5, 3, 4)],
    ),
    "linear layers between permutations": Case(
        lambda: Net(
            lambda n, x: n.b(F.gelu(n.mix(n.a(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)),
            a=conv(3, 5, 1),
            mix=linear(5, 7),
            b=conv(7, 2, 1),
        ),
        {
            "a": {**layer("a", 5), **reads("mix.weight", each(5))},
            "mix": {**layer("mix", 7), **reads("b.weight", each(7))},
        },
        [IMAGE],
    ),
    "dropout": Case(
        lambda: nn.Sequential(linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.AlphaDropout(), linear(8, 3)),
        {"0": {**layer("0", 8), **reads("4.weight", each(8))}},
    ),
    "a batch of one": Case(
        lambda: nn.Sequential(conv(3, 8, 1), nn.ReLU(), nn.Flatten(), linear(8 * 24, 3)),
        {"0": {**layer("0", 8), **reads("3.weight", each(8, 24))}},
        [(1, 3, 6, 4)],
    ),
}
# Where something without parameters reads the channels, all that makes them is zeroed instead of what reads them.
ALL_OFF = {"normalised channels", "product summed over channels", "attention by hand"}


@pytest.mark.parametrize("name", CASES)
def test_groups_are_those_worked_out_by_hand(name) -> None:
    network, inputs = CASES[name].network()
    graph = trace(network, inputs)
    assert found(graph) == CASES[name].groups
    for group in graph.groups.values():
        assert group.width == len(group.slots[0].index)
        readers = [slot for slot in group.slots if slot.role == C]
        assert list(group.off) == (list(group.slots) if name in ALL_OFF else readers)


@pytest.mark.parametrize("share", [0.6, 0.01])
@pytest.mark.parametrize("name", CASES)
def test_the_shrunk_network_is_the_masked_one(name, share) -> None:
    network, inputs = CASES[name].network()
    graph = trace(network, inputs)
    keep = random_keep(graph, share)
    masked = run(masked_copy(network, graph, keep), *inputs)
    if any(len(units) < graph.groups[group].width for group, units in keep.items()):
        assert difference(run(network, *inputs), masked) > 1e-3
    shrink(network, graph, keep)
    assert difference(masked, run(network, *inputs)) <= 1e-5
    assert disagreeing_attributes(network) == []
    if share == 0.6:
        # What is down to a single unit can lose no more, and is no group any longer.
        expected = {group: len(units) for group, units in keep.items() if len(units) > 1}
        assert {g: width for g, width in trace(network, inputs).widths.items() if width > 1} == expected


def counted_in_a_tensor(net, x):
    h = net.a(x)
    return net.b(h) / torch.sqrt(torch.tensor(float(h.shape[1])))


def untouched_branch(net, x):
    h = F.relu(net.a(x))
    return net.b(h) if float(x.sum()) > -1e6 else net.c(h)


def with_noise(net, x):
    mean = net.a(x)
    return net.b(mean + torch.randn_like(mean))


def written_over_under_an_alias(net, x):
    h = F.relu(net.a(x))
    alias = h.view_as(h)
    h.add_(1)
    return alias.square().sum(1)


REFUSED = {
    "literal view": (
        lambda n, x: n.b(n.a(x).view(-1, 192)),
        {"a": conv(3, 8, 1), "b": linear(192, 3)},
        "a.weight (dim 0)",
        "view cannot follow a change of width: ",
    ),
    "literal slice": (
        lambda n, x: n.b(F.relu(n.a(x))[:, :5]).mean((1, 2, 3)),
        {"a": conv(3, 8, 1), "b": conv(5, 3, 1)},
        "a.weight (dim 0)",
        "cannot follow a change of width",
    ),
    "softmax over channels": (
        lambda n, x: n.b(n.a(x).softmax(1)),
        {"a": conv(3, 8, 1), "b": conv(8, 3, 1)},
        "a.weight (dim 0)",
        "is mixed along by _softmax",
    ),
    "mean over channels": (
        lambda n, x: n.b(n.a(x) - n.a(x).mean(1, keepdim=True)),
        {"a": conv(3, 8, 1), "b": conv(8, 3, 1)},
        "a.weight (dim 0)",
        "is reduced over by mean",
    ),
    "sum of what is not zero": (
        lambda n, x: n.b(torch.sigmoid(n.a(x))) + torch.sigmoid(n.a(x)).sum(1, keepdim=True),
        {"a": conv(3, 8, 1), "b": conv(8, 3, 1)},
        "a.weight (dim 0)",
        "is reduced over by sum",
    ),
    "zeros that were written over": (
        lambda n, x: F.relu(n.a(x)).add_(1).square().sum(1),
        {"a": conv(3, 8, 1)},
        "a.weight (dim 0)",
        "is reduced over by sum",
    ),
    "zeros that were written over elsewhere": (
        written_over_under_an_alias,
        {"a": conv(3, 8, 1)},
        "a.weight (dim 0)",
        "is reduced over by sum",
    ),
    "rolled channels": (
        lambda n, x: n.b(n.a(x).roll(1, 1)),
        {"a": conv(3, 8, 1), "b": conv(8, 3, 1)},
        "a.weight (dim 0)",
        "is rolled by a number of places",
    ),
    "layer norm": (
        lambda n, x: n.b(n.norm(n.a(x).mean((2, 3)))),
        {"a": conv(3, 8, 1), "norm": nn.LayerNorm(8), "b": linear(8, 3)},
        "a.weight (dim 0)",
        "is normalised over (its mean and variance)",
    ),
    "one group of a group norm": (
        lambda n, x: n.b(n.norm(n.a(x))),
        {"a": conv(3, 8, 1), "norm": nn.GroupNorm(1, 8), "b": conv(8, 3, 1)},
        "a.weight (dim 0)",
        "is normalised over (its mean and variance)",
    ),
    "network output": (
        lambda n, x: (n.b(F.relu(n.a(x))), n.a(x)),
        {"a": conv(3, 8, 1), "b": conv(8, 3, 1)},
        "a.weight (dim 0)",
        "is an output of the network",
    ),
    "output in an object": (
        lambda n, x: torch.distributions.Normal(n.a(x), 1.0, validate_args=False),
        {"a": conv(3, 8, 1)},
        "a.weight (dim 0)",
        "is an output of the network",
    ),
    "unused parameter": (
        lambda n, x: n.b(F.relu(n.a(x))),
        {"a": conv(3, 8, 1), "b": conv(8, 3, 1), "spare": linear(5, 5)},
        "spare.weight (dim 0)",
        "is not used by any program that was run",
    ),
    "a branch that was not taken": (
        untouched_branch,
        {"a": conv(3, 8, 1), "b": conv(8, 3, 1), "c": conv(8, 3, 1)},
        "c.weight (dim 1)",
        "is not used by any program that was run",
    ),
    "permutation by index": (
        lambda n, x: n.b(n.a(x)[:, n.order]),
        {"a": conv(3, 8, 1), "b": conv(8, 3, 1), "order": torch.randperm(8)},
        "a.weight (dim 0)",
        "channels are picked by an index tensor",
    ),
    "constant along the channels": (
        lambda n, x: n.b(n.a(x) * torch.arange(8).view(8, 1, 1)),
        {"a": conv(3, 8, 1), "b": conv(8, 3, 1)},
        "a.weight (dim 0)",
        "meets a tensor of fixed size",
    ),
    "convolution across channels": (
        lambda n, x: n.b(n.a(x) * n.k(n.a(x).mean((2, 3))[:, None]).transpose(1, 2)[..., None]),
        {"a": conv(3, 8, 1), "k": nn.Conv1d(1, 1, 3, padding=1), "b": conv(8, 3, 1)},
        "a.weight (dim 0)",
        "varies over the image",
    ),
    "width in a scalar": (
        lambda n, x: n.b(n.a(x)) / n.a(x).shape[1] ** 0.5,
        {"a": conv(3, 8, 1), "b": conv(8, 3, 1)},
        "a.weight (dim 0)",
        "div computes with a number that the full network does not have there",
    ),
    "width in a tensor": (
        counted_in_a_tensor,
        {"a": conv(3, 8, 1), "b": conv(8, 3, 1)},
        "a.weight (dim 0)",
        "lift_fresh computes with a number that the full network does not have there",
    ),
    "noise in evaluation": (
        with_noise,
        {"a": conv(3, 8, 1), "b": conv(8, 3, 1)},
        "a.weight (dim 0)",
        "is mixed with random numbers",
    ),
    "an operator without a rule": (
        lambda n, x: n.b(torch.linalg.qr(n.a(x)).R),
        {"a": conv(3, 8, 1), "b": conv(8, 3, 1)},
        "a.weight (dim 0)",
        "operator aten::linalg_qr has no rule",
    ),
    "a dimension moved in place": (
        lambda n, x: n.b(n.a(x).mean((2, 3), keepdim=True).squeeze_(3).squeeze_(2)),
        {"a": conv(3, 8, 1), "b": linear(8, 3)},
        "a.weight (dim 0)",
        "loses dimensions in place",
    ),
    "a loss of features": (
        lambda n, x: F.mse_loss(n.a(x), n.b(x)),
        {"a": conv(3, 8, 1), "b": conv(3, 8, 1)},
        "a.weight (dim 0)",
        "is averaged over by mse_loss",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_told_with_its_line(name) -> None:
    function, parts, path, reason = REFUSED[name]
    graph = trace(Net(function, **copy.deepcopy(parts)), torch.randn(IMAGE))
    assert path not in {f"{slot.tensor} (dim {slot.dim})" for group in graph.groups.values() for slot in group.slots}
    told = dict(graph.refused)[path]
    assert reason in told
    if "is an output" not in told and "not used" not in told:
        first = function.__code__.co_firstlineno
        lines = [int(part.partition(")")[0]) for part in told.split("test_rules.py:")[1:]]
        assert lines
        assert all(first <= line <= first + 4 for line in lines)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_can_be_cut_exactly(name) -> None:
    function, parts, _, _ = REFUSED[name]
    network, inputs = Net(function, **copy.deepcopy(parts)), torch.randn(IMAGE)
    graph = trace(network, inputs)
    keep = random_keep(graph)
    masked = masked_copy(network, graph, keep)
    shrink(network, graph, keep)
    if name == "output in an object":
        assert torch.equal(masked(inputs).loc, network(inputs).loc)
    else:
        assert difference(run(masked, inputs), run(network, inputs)) <= 1e-5


def test_channels_that_are_picked_one_by_one_stay() -> None:
    def forward(net, x):
        h = F.relu(net.a(x))
        return net.b(h[:, 3:]) * h[:, 0:1] + h[:, 1:2] * h[:, 2:3]

    network, inputs = Net(forward, a=linear(4, 11), b=linear(8, 3)), torch.randn(ROWS)
    graph = trace(network, inputs)
    assert graph.groups["a"].slots[0].index.tolist() == each(8, start=3)
    keep = random_keep(graph)
    masked = run(masked_copy(network, graph, keep), inputs)
    shrink(network, graph, keep)
    assert difference(masked, run(network, inputs)) <= 1e-5


def test_what_nobody_reads_stays() -> None:
    """Another run may read more of it, as those of random widths and longer sequences do."""
    network, inputs = Net(lambda n, x: n.b(n.a(x).narrow(1, 0, 5)), a=linear(4, 9), b=linear(5, 3)), torch.randn(ROWS)
    refused = dict(trace(network, inputs).refused)
    assert refused["a.weight (dim 0)"].startswith("narrow cannot follow")
    wider = Net(lambda n, x: n.b(n.a(x)[:, : n.b.in_features]), a=linear(4, 8), b=linear(5, 3))
    graph = trace(wider, inputs)
    assert graph.groups["a"].slots[0].index.tolist() == each(5)
    assert dict(graph.refused)["a.weight (dim 0, 3 of 8)"].startswith("lies beyond what the runs use of it")


@pytest.fixture
def swish():
    """An operator of the user's own."""

    @torch.library.custom_op("lightning_prune_tests::swish", mutates_args=())
    def swish(x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)

    yield swish
    _USER_RULES.pop("lightning_prune_tests::swish", None)


def test_an_operator_of_the_users_own_is_opaque_until_it_has_a_rule(swish) -> None:
    network, inputs = Net(lambda n, x: n.b(swish(n.a(x))), a=linear(4, 8), b=linear(8, 3)), torch.randn(ROWS)
    graph = trace(network, inputs)
    assert graph.groups == {}
    assert "operator lightning_prune_tests::swish has no rule" in dict(graph.refused)["a.weight (dim 0)"]

    register_rule("lightning_prune_tests::swish", pointwise)
    graph = trace(network, inputs)
    assert found(graph) == {"a": {**layer("a", 8), **reads("b.weight", each(8))}}
    keep = random_keep(graph)
    masked = run(masked_copy(network, graph, keep), inputs)
    shrink(network, graph, keep)
    assert difference(masked, run(network, inputs)) <= 1e-5


def test_a_wrong_rule_of_the_users_own_does_no_harm(swish) -> None:
    def forgets(call):
        raise IndexError("a mistake")

    register_rule("lightning_prune_tests::swish", forgets)
    network = Net(lambda n, x: n.b(swish(n.a(x))), a=linear(4, 8), b=linear(8, 3))
    graph = trace(network, torch.randn(ROWS))
    assert graph.groups == {}
    assert (
        "swish was called in a way that its rule cannot follow (a mistake)" in dict(graph.refused)["a.weight (dim 0)"]
    )

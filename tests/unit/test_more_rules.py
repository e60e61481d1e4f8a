"""Groups under rarer operators, worked out by hand; each network is then cut and compared with its masked self."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torchvision.ops import deform_conv2d, nms, ps_roi_align, roi_align, roi_pool

from lightning_prune.graph.program import Program
from lightning_prune.surgery import shrink, trace, trace_programs
from tests.helpers import Net, difference, masked_copy, random_keep, randomise, run
from tests.unit.test_rules import IMAGE, ROWS, conv, each, linear, parameter

BOXES = torch.tensor([[0.0, 0, 0, 3, 4], [1, 1, 1, 3, 5]])
TOKENS = (2, 5, 4)


def layer(name, units):
    return {(f"{name}.weight", 0): units, (f"{name}.bias", 0): units}


def summed(n, x):
    neighbours = torch.sparse_coo_tensor([[0, 1, 4, 2], [1, 3, 4, 0]], torch.ones(4), (5, 5), check_invariants=True)
    return torch.sparse.mm(neighbours, x)


def between(operator, first=None, last=None, **parts):
    """A layer, something, a layer."""
    ends = {"a": first or conv(3, 8, 1), "b": last or conv(8, 2, 1)}
    return lambda: Net(lambda n, x: n.b(operator(n, n.a(x))), **ends, **parts)


PLAIN = {"a": {**layer("a", each(8)), ("b.weight", 1): each(8)}}


def only(**slots):
    """Further slots of the only group."""
    return {"a": {**PLAIN["a"], **slots.pop("more", {})}}


def filtered(n, x):
    spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(n.f)
    return torch.fft.irfft2(spectrum.conj() * 1, s=x.shape[2:], norm="ortho")


def weight_normed():
    net = nn.Sequential(conv(3, 8, 1), nn.ReLU(), conv(8, 6, 1), nn.ReLU(), conv(6, 2, 1))
    for number in (0, 2, 4):
        parametrizations.weight_norm(net[number])
    return net


def normed(name, units):
    weight = f"{name}.parametrizations.weight.original"
    return {(f"{weight}0", 0): units, (f"{weight}1", 0): units, (f"{name}.bias", 0): units}


def written(n, x):
    out = torch.zeros(4, x.shape[1])
    out.index_add_(0, torch.tensor([0, 2, 2, 3, 1]), x)
    out[torch.tensor([1, 3])] += 1
    return out.index_copy(0, torch.tensor([0]), x[:1])


def routed(n, x):
    rows = torch.tensor([True, False, True, True, False])
    out = torch.empty_like(x)
    out[rows] = x[rows] * 2
    out[~rows] = -x[~rows]
    out[rows.logical_not()] += 0
    return out


def by_places(n, x):
    order = torch.tensor([4, 0, 0, 2, 1])[None, :, None].expand(len(x), -1, x.shape[2])
    back = torch.zeros_like(x).scatter_add(1, order, x)
    return x.gather(1, order) + back


def masked_tokens(n, x):
    mask = torch.tensor([[True, True, False, True, False]]).expand(2, -1)
    kept = x[mask]
    x[mask] = 0.25
    return x + kept.sum(0)


def deformed(n, x):
    places, seen = n.offset(x), torch.sigmoid(n.mask(x))
    return deform_conv2d(F.relu(n.inner(x)), places, n.w, n.shift, padding=1, mask=seen)


def deformable(groups, offset_groups):
    k = 9 * offset_groups
    return between(
        deformed,
        last=conv(6, 2, 1),
        first=conv(3, 8, 1),
        inner=conv(8, 8, 1),
        offset=conv(8, 2 * k, 3, padding=1),
        mask=conv(8, k, 3, padding=1),
        w=parameter(6, 8 // groups, 3, 3),
        shift=parameter(6),
    )


A_AND_STEERING = {
    **PLAIN["a"],
    ("inner.weight", 1): each(8),
    ("offset.weight", 1): each(8),
    ("mask.weight", 1): each(8),
}
del A_AND_STEERING["b.weight", 1]

CASES = {
    "a filter of pairs under a Fourier transform": (
        between(filtered, f=parameter(8, 6, 3, 2)),
        only(more={("f", 0): each(8)}),
        IMAGE,
    ),
    "complex and polar": (
        between(lambda n, x: (torch.complex(x, x) * torch.polar(x.abs(), x)).real),
        PLAIN,
        IMAGE,
    ),
    "weight norm": (
        weight_normed,
        {
            "0.parametrizations.weight": {**normed("0", each(8)), ("2.parametrizations.weight.original1", 1): each(8)},
            "2.parametrizations.weight": {**normed("2", each(6)), ("4.parametrizations.weight.original1", 1): each(6)},
        },
        IMAGE,
    ),
    "bilinear": (
        lambda: Net(
            lambda n, x: n.b(n.w(torch.tanh(n.a(x)), torch.tanh(n.c(x)))),
            a=linear(4, 8),
            c=linear(4, 6),
            w=nn.Bilinear(8, 6, 5),
            b=linear(5, 3),
        ),
        {
            "a": {**layer("a", each(8)), ("w.weight", 1): each(8)},
            "c": {**layer("c", each(6)), ("w.weight", 2): each(6)},
            "w": {**layer("w", each(5)), ("b.weight", 1): each(5)},
        },
        ROWS,
    ),
    "distances": (
        lambda: Net(lambda n, x: torch.cdist(n.a(x), n.p), a=linear(4, 8), p=parameter(3, 8)),
        {"a": {**layer("a", each(8)), ("p", 1): each(8)}},
        ROWS,
    ),
    "distances of many": (
        lambda: Net(lambda n, x: torch.cdist(n.a(x), n.p), a=linear(4, 8), p=parameter(27, 8)),
        {"a": {**layer("a", each(8)), ("p", 1): each(8)}},
        (30, 4),
    ),
    "addmv, addr, vdot and trace": (
        between(
            lambda n, x: torch.addr(x * torch.addmv(n.t, n.m, n.v), x.new_ones(5), n.u) + n.q.vdot(n.q) * n.r.trace(),
            first=linear(4, 8),
            last=linear(8, 3),
            t=parameter(8),
            m=parameter(8, 5),
            v=parameter(5),
            u=parameter(8),
            q=parameter(7),
            r=parameter(6, 6),
        ),
        {
            **only(more={("t", 0): each(8), ("m", 0): each(8), ("u", 0): each(8)}),
            "m": {("m", 1): each(5), ("v", 0): each(5)},
            "q": {("q", 0): each(7)},
            "r": {("r", 0): each(6), ("r", 1): each(6)},
        },
        ROWS,
    ),
    "a symmetric weight": (
        between(
            lambda n, x: x @ (n.s.triu() + n.s.triu(1).transpose(0, 1)),
            first=linear(4, 8),
            last=linear(8, 3),
            s=parameter(8, 8),
        ),
        only(more={("s", 0): each(8), ("s", 1): each(8)}),
        ROWS,
    ),
    "a lower triangle": (
        between(lambda n, x: x @ n.s.tril(), first=linear(4, 8), last=linear(8, 3), s=parameter(8, 8)),
        only(more={("s", 0): each(8), ("s", 1): each(8)}),
        ROWS,
    ),
    "a diagonal and its matrix": (
        between(
            lambda n, x: x @ torch.diag_embed(n.d) * n.m.diagonal(),
            first=linear(4, 8),
            last=linear(8, 3),
            d=parameter(8),
            m=parameter(8, 8),
        ),
        only(more={("d", 0): each(8), ("m", 0): each(8), ("m", 1): each(8)}),
        ROWS,
    ),
    "a bag of embeddings": (
        lambda: Net(
            lambda n, x: n.b(n.e(torch.arange(6).view(2, 3)) + n.m(torch.arange(6).view(2, 3))).sum(0) + x.sum(),
            e=nn.EmbeddingBag(7, 8),
            m=nn.EmbeddingBag(7, 8, mode="max"),
            b=linear(8, 3),
        ),
        {"e": {("e.weight", 1): each(8), ("m.weight", 1): each(8), ("b.weight", 1): each(8)}},
        ROWS,
    ),
    "packed sequences": (
        between(
            lambda n, x: pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True).data,
            first=linear(4, 8),
            last=linear(8, 3),
        ),
        PLAIN,
        TOKENS,
    ),
    "neighbours summed by a sparse matrix": (
        between(summed, first=linear(4, 8), last=linear(8, 3)),
        PLAIN,
        ROWS,
    ),
    "rows written by index": (between(written, first=linear(4, 8), last=linear(8, 3)), PLAIN, ROWS),
    "rows routed by masks": (between(routed, first=linear(4, 8), last=linear(8, 3)), PLAIN, ROWS),
    "tokens gathered and scattered": (between(by_places, first=linear(4, 8), last=linear(8, 3)), PLAIN, TOKENS),
    "tokens picked and filled by a mask": (
        between(masked_tokens, first=linear(4, 8), last=linear(8, 3)),
        PLAIN,
        TOKENS,
    ),
    "unfold and fold": (between(lambda n, x: F.fold(F.unfold(x, 2, stride=2), (6, 4), 2, stride=2)), PLAIN, IMAGE),
    "a convolution by unfold": (
        between(lambda n, x: (n.w @ F.unfold(x, 3, padding=1)).mean(2), last=linear(5, 3), w=parameter(5, 72)),
        {
            "a": {**layer("a", each(8)), ("w", 1): each(8, 9)},
            "w": {("w", 0): each(5), ("b.weight", 1): each(5)},
        },
        IMAGE,
    ),
    "unpooling": (
        between(lambda n, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)),
        PLAIN,
        IMAGE,
    ),
    "regions": (between(lambda n, x: roi_align(x, BOXES, 2) + roi_pool(x, BOXES, 2)), PLAIN, IMAGE),
    "regions whose cells have channels of their own": (
        between(lambda n, x: ps_roi_align(x, BOXES, 2), last=conv(2, 3, 1)),
        {"a": {**layer("a", each(2, 4)), ("b.weight", 1): each(2)}},
        IMAGE,
    ),
    "deformable convolution": (
        deformable(1, 1),
        {
            "a": A_AND_STEERING,
            "inner": {**layer("inner", each(8)), ("w", 1): each(8)},
            "w": {("w", 0): each(6), ("shift", 0): each(6), ("b.weight", 1): each(6)},
        },
        IMAGE,
    ),
    "deformable convolution of two groups, both for weights and offsets": (
        deformable(2, 2),
        {
            "a": A_AND_STEERING,
            "inner": {**layer("inner", [[c, c + 4] for c in range(4)]), ("w", 1): each(4)},
            "w": {
                ("w", 0): [[c, c + 3] for c in range(3)],
                ("shift", 0): [[c, c + 3] for c in range(3)],
                ("b.weight", 1): [[c, c + 3] for c in range(3)],
            },
        },
        IMAGE,
    ),
    "a short-time Fourier transform of each channel": (
        between(
            lambda n, x: (
                torch.stft(x.flatten(0, 1), 8, return_complex=True, window=torch.ones(8)).abs().unflatten(0, (2, -1))
            ),
            first=nn.Conv1d(3, 8, 1),
        ),
        PLAIN,
        (2, 3, 32),
    ),
    "turned images": (between(lambda n, x: torch.rot90(x, 1, (2, 3)).flip(3)), PLAIN, IMAGE),
    "noise in the shape of features": (
        between(lambda n, x: x + torch.ones_like(x), first=linear(4, 8), last=linear(8, 3)),
        PLAIN,
        ROWS,
    ),
}


def network(name):
    torch.manual_seed(0)
    build, _, shape = CASES[name]
    return randomise(build()), torch.randn(shape)


@pytest.mark.parametrize("name", CASES)
def test_groups_are_those_worked_out_by_hand(name) -> None:
    graph = trace(*network(name))
    groups = [{(slot.tensor, slot.dim): slot.index.tolist() for slot in group.slots} for group in graph.groups.values()]
    expected = list(CASES[name][1].values())
    assert all(group in expected for group in groups), (groups, graph.refused)
    assert len(groups) == len(expected), graph.refused


@pytest.mark.parametrize("share", [0.6, 0.01])
@pytest.mark.parametrize("name", CASES)
def test_the_shrunk_network_is_the_masked_one(name, share) -> None:
    net, inputs = network(name)
    graph = trace(net, inputs)
    keep = random_keep(graph, share)
    masked = run(masked_copy(net, graph, keep), inputs)
    if graph.groups:
        assert difference(run(net, inputs), masked) > 1e-3
    shrink(net, graph, keep)
    assert difference(masked, run(net, inputs)) <= 1e-5


REFUSED = {
    "a Fourier transform over the channels": (lambda n, x: torch.fft.fft(x, dim=1).real, "mixed along by a Fourier"),
    "far from the diagonal": (lambda n, x: x @ n.s.triu(2), "lies under a triangular pattern"),
    "beside the diagonal": (lambda n, x: F.pad(x * n.s.diagonal(1).sum(), (0, 0)) @ n.s, "lies under a diagonal"),
    "channels written by index": (
        lambda n, x: x.index_fill(1, torch.tensor([1, 4]), 0.5),
        "channels are written by an index tensor",
    ),
    "channels put by index": (
        lambda n, x: x.index_put((torch.arange(5), torch.arange(5)), torch.tensor(1.0)),
        "channels are written by an index tensor",
    ),
    "channels gathered": (
        lambda n, x: x.gather(1, torch.arange(8).flip(0).expand(5, -1)),
        "channels are picked by an index tensor",
    ),
    "channels scattered": (
        lambda n, x: torch.zeros_like(x).scatter(1, torch.arange(8).flip(0).expand(5, -1), x),
        "channels are written by an index tensor",
    ),
    "elements picked by a mask": (
        lambda n, x: x.masked_select(torch.ones(5, 8, dtype=torch.bool)).view(5, 8),
        "single elements are picked by an index tensor",
    ),
    "elements written by a mask": (
        lambda n, x: x.masked_scatter(torch.ones(5, 8, dtype=torch.bool), x * 2),
        "single elements are written by an index tensor",
    ),
    "boxes chosen by channels": (
        lambda n, x: x + nms(x.reshape(10, 4).abs(), x.reshape(10, 4)[:, 0], 0.5).sum(),
        "decides which boxes remain",
    ),
    "rolled channels": (lambda n, x: x.roll(2, 1), "is rolled by a number of places"),
    "the largest so far": (lambda n, x: x.cummax(1).values, "is mixed along by cummax"),
    "a window over the channels": (lambda n, x: x.as_strided((5, 8), (4, 1)), "is read by strides"),
    "other strides in place": (lambda n, x: x.clone().as_strided_((5, 8), (1, 5)), "is read by strides"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_whole_is_told_with_its_reason(name) -> None:
    function, reason = REFUSED[name]
    parts = {"a": linear(4, 8), "b": linear(8, 3), "s": parameter(8, 8)}
    net = Net(lambda n, x: n.b(function(n, n.a(x))), **copy.deepcopy(parts))
    graph = trace(net, torch.randn(ROWS))
    cut = {
        (slot.tensor, slot.dim, i)
        for g in graph.groups.values()
        for slot in g.slots
        for i in slot.index.flatten().tolist()
    }
    assert not {("a.weight", 0, 0), ("a.weight", 0, 4)} & cut
    assert any(reason in refusal.reason for refusal in graph.refused), graph.refused


def test_strides_set_anew_as_they_were_are_followed() -> None:
    # Older torch does so in place behind a mean over images with channels last.
    parts = {"a": linear(4, 8), "b": linear(8, 3)}

    def forward(net, x):
        hidden = net.a(x).relu()
        return net.b(hidden.as_strided_(hidden.shape, hidden.stride()))

    net = Net(forward, **parts)
    graph = trace(net, torch.randn(ROWS))
    assert graph.widths == {"a": 8}
    shrink(net, graph, {"a": torch.arange(8) % 2 == 0})
    assert net.b.in_features == 4


def test_queries_made_of_parameters_by_a_layer_with_a_bias_are_off_where_both_are_zero() -> None:
    parts = {"latent": parameter(5, 6), "q": linear(6, 8), "k": linear(4, 8)}
    net = Net(lambda n, x: n.k(x) @ n.q(n.latent).T, **parts)
    graph, x = trace(net, torch.randn(ROWS)), torch.randn(ROWS)
    assert graph.widths == {"latent": 6, "k": 8}
    assert [(slot.tensor, slot.dim) for slot in graph.groups["k"].off] == [("q.weight", 0), ("q.bias", 0)]
    keep = random_keep(graph)
    expected = run(masked_copy(net, graph, keep), x)
    shrink(net, graph, keep)
    assert net.q.out_features == 4
    assert difference(expected, run(net, x)) < 1e-5


def test_layers_that_happen_to_get_no_data_are_cut_like_others() -> None:
    """As the heads of a detector that finds nothing."""
    parts = {"a": conv(3, 4, 3), "b": conv(4, 6, 3), "t": nn.ConvTranspose2d(6, 4, 2), "g": conv(4, 4, 1, groups=2)}
    ends, found = {"n": nn.BatchNorm2d(6), "end": nn.Linear(4 * 6 * 8, 2)}, [2]
    net = Net(lambda n, x: n.end(n.g(n.t(n.n(n.b(n.a(x[: found[0]]))))).flatten(1)), **parts, **ends)
    # In train mode batch-norm needs data.
    example = Program("forward", lambda: net.eval()(torch.randn(2, 3, 9, 11)), samples=2)
    expected = trace_programs(net, [example]).groups
    found[0] = 0
    graph = trace_programs(net, [example])
    assert graph.groups.keys() == expected.keys() == {"a", "b", "t"}
    for name, group in expected.items():
        places = [(slot.tensor, slot.dim, slot.index.tolist()) for slot in group.slots]
        assert [(slot.tensor, slot.dim, slot.index.tolist()) for slot in graph.groups[name].slots] == places

"""Criteria that look at the running network, against numbers worked out by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from lightning_prune import CHIP, NISP, ActivationCriterion, APoZ, ConfigurationError, HRank, PruneError, ThiNet, trace
from lightning_prune.criteria import criterion_from
from lightning_prune.criteria.activations import RunningNetwork
from lightning_prune.graph.activations import watch
from lightning_prune.graph.program import module_programs
from lightning_prune.graph.tracer import named_leaves
from tests.fits import SmallNet, fit, loader, pruning, small_net, trainer, widths
from tests.helpers import Net


def scores(criterion, model, *batches, wanted=None):
    """Scores of the groups of a model by batches of inputs."""
    graph = trace(model, batches[0])
    runs = [partial(watch, graph, module_programs(model, batch)[0]) for batch in batches]
    network = RunningNetwork(graph.groups, named_leaves(model), runs)
    return criterion.scores(network, wanted or list(graph.groups), torch.Generator().manual_seed(0))


def weighted(layer, weight):
    """The layer with these weights and no bias."""
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight).reshape(layer.weight.shape))
    return layer


def two_channels():
    """The positive and the negative part of an image of one channel."""
    split = weighted(nn.Conv2d(1, 2, 1, bias=False), [1.0, -1.0])
    return nn.Sequential(split, nn.ReLU(), nn.Conv2d(2, 1, 1))


IMAGE = torch.tensor([[[[1.0, 2.0], [-3.0, 4.0]]]])  # parts [[1, 2], [0, 4]] and [[0, 0], [3, 0]]


def test_apoz_is_the_share_of_positive_activations():
    assert scores(APoZ(), two_channels(), IMAGE)["0"].tolist() == [0.75, 0.25]


def test_scores_are_averaged_over_batches():
    assert scores(APoZ(), two_channels(), IMAGE, torch.ones(1, 1, 2, 2))["0"].tolist() == [0.875, 0.125]


def test_scores_are_averaged_over_readers():
    def forward(net, x):
        hidden = net.into(x)
        return net.first(hidden) + net.second(hidden.relu() - 2)

    parts = {"into": weighted(nn.Linear(1, 2, bias=False), [1.0, 3.0]), "first": nn.Linear(2, 1)}
    model = Net(forward, **parts, second=nn.Linear(2, 1))
    # Positive before: both. Above 2: the second only.
    assert scores(APoZ(), model, torch.ones(3, 1))["into"].tolist() == [0.5, 1.0]


def test_hrank_is_the_mean_rank():
    assert scores(HRank(), two_channels(), IMAGE)["0"].tolist() == [2.0, 1.0]
    assert scores(HRank(), two_channels(), torch.cat([IMAGE, -torch.ones_like(IMAGE)]))["0"].tolist() == [1.0, 1.0]


def test_hrank_takes_maps_whose_channels_come_last():
    model = Net(
        lambda net, x: net.last(net.split(x).permute(0, 2, 3, 1)), split=two_channels()[:2], last=nn.Linear(2, 1)
    )
    assert scores(HRank(), model, IMAGE)["split.0"].tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    "between",
    [
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)],
        [nn.Flatten(), nn.ReLU(), nn.Linear(8, 2)],
        [nn.AdaptiveMaxPool2d(1), nn.Conv2d(2, 1, 1)],
        [nn.Flatten(2), nn.Conv1d(2, 1, 4)],
    ],
    ids=["pooled", "flattened", "pooled, for a convolution", "flattened, for a convolution"],
)
def test_hrank_takes_the_maps_from_before_they_were_pooled_or_flattened(between):
    model = nn.Sequential(*two_channels()[:2], *between)
    assert scores(HRank(), model, IMAGE)["0"].tolist() == [2.0, 1.0]


def test_hrank_takes_no_maps_that_are_not_all_of_it():
    def forward(net, x):
        maps = net.split(x)
        return net.last(maps.mean((2, 3)) + net.other(x.flatten(1)))

    model = Net(forward, split=nn.Conv2d(1, 2, 1), other=nn.Linear(4, 2), last=nn.Linear(2, 2))
    with pytest.raises(PruneError, match="HRank cannot score channel group 'split'"):
        scores(HRank(), model, IMAGE)


def test_hrank_needs_maps():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    with pytest.raises(PruneError, match="HRank cannot score channel group '2': nothing that reads it is given maps"):
        scores(HRank(), model, IMAGE)
    assert scores(HRank(), model, IMAGE, wanted=["0"]).keys() == {"0"}


def test_chip_is_the_drop_of_the_nuclear_norm():
    # Per channel, rows (1, 2, 0, 4) and (0, 0, 3, 0) are orthogonal: each adds its length.
    found = scores(CHIP(), two_channels(), IMAGE)["0"]
    torch.testing.assert_close(found, torch.tensor([21.0**0.5, 3.0]))


@pytest.mark.parametrize("size", [1, 2, 5])  # fewer and more positions than channels
def test_chip_against_singular_values(size):
    model, images = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 1, 1)), torch.randn(4, 2, size, size)
    rows = model[:2](images).detach().flatten(2).double()

    def norm(matrix):
        return torch.linalg.svdvals(matrix).sum()

    def drop(unit, sample):
        others = torch.cat([rows[sample, :unit], rows[sample, unit + 1 :]])
        return norm(rows[sample]) - norm(others)

    expected = torch.stack([torch.stack([drop(unit, sample) for sample in range(3)]).mean() for unit in range(6)])
    torch.testing.assert_close(scores(CHIP(samples=3), model, images)["0"], expected.float(), rtol=1e-4, atol=1e-5)


SQUARE = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
UNIT = [[1.0, 0.0], [0.0, 1.0]]


def close_to_mean(found, expected):
    """Scores are relative to their mean."""
    torch.testing.assert_close(found, expected / expected.mean())


def test_nisp_of_two_layers():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    weighted(model[0], UNIT)
    weighted(model[2], [[1.0, -2.0], [3.0, 0.0]])
    # Responses 0, 2, -4, -2 (variance 5) and 0, 6, 0, 6 (variance 9).
    close_to_mean(scores(NISP(), model, SQUARE)["0"], torch.tensor([5.0 + 3 * 9, 2 * 5.0]))


def test_nisp_takes_the_variance_over_all_batches():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    weighted(model[0], UNIT)
    weighted(model[2], [[1.0, -2.0], [3.0, 0.0]])
    close_to_mean(scores(NISP(), model, *SQUARE.split(1))["0"], torch.tensor([32.0, 10.0]))


def test_nisp_stays_finite_in_deep_networks():
    blocks = [(nn.Linear(20, 20), nn.BatchNorm1d(20), nn.Tanh()) for _ in range(30)]
    with torch.no_grad():
        for linear, norm, _ in blocks:
            linear.weight *= 20
            norm.running_var *= 400
    found = scores(NISP(), nn.Sequential(*(layer for block in blocks for layer in block)), torch.randn(8, 20))
    assert len(found) == 29
    assert all(bool(score.isfinite().all()) and score.mean().item() == pytest.approx(1) for score in found.values())


def test_nisp_hands_back_through_all_layers():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    weighted(model[0], UNIT)
    weighted(model[1], [[1.0, 1.0], [0.0, -1.0]])
    weighted(model[2], UNIT)
    # Responses a + b (variance 2) and -b (variance 1).
    found = scores(NISP(), model, SQUARE)
    close_to_mean(found["1"], torch.tensor([2.0, 1.0]))
    close_to_mean(found["0"], torch.tensor([2.0, 2.0 + 1.0]))


def test_nisp_sums_over_kernels_and_convolutions_that_are_depthwise_change_nothing():
    depthwise = nn.Conv2d(2, 2, 3, groups=2, padding=1)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), depthwise, nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    images = torch.randn(4, 1, 6, 6)
    variance = model.eval()(images).detach().transpose(0, 1).flatten(1).var(1, correction=0)
    middle = model[4].weight.detach().abs()[:, :, 0, 0].T @ variance
    first = model[2].weight.detach().abs().sum((2, 3)).T @ middle
    found = scores(NISP(), model, images)
    close_to_mean(found["2"], middle)
    close_to_mean(found["0"], first)


def test_nisp_on_a_residual_stream_counts_what_is_read_later_only():
    def forward(net, x):
        stream = net.into(x)
        stream = stream + net.out1(net.in1(stream).relu())
        stream = stream + net.out2(net.in2(stream).relu())
        return net.head(stream)

    layers = {"in1": nn.Linear(4, 5), "out1": nn.Linear(5, 4), "in2": nn.Linear(4, 6), "out2": nn.Linear(6, 4)}
    model, inputs = Net(forward, into=nn.Linear(3, 4), **layers, head=nn.Linear(4, 2)), torch.randn(8, 3)
    weights = {name: layer.weight.detach().abs().T for name, layer in model.named_children()}
    stream = weights["head"] @ model(inputs).detach().var(0, correction=0)
    inner2 = weights["out2"] @ stream
    stream = stream + weights["in2"] @ inner2
    inner1 = weights["out1"] @ stream
    stream = stream + weights["in1"] @ inner1
    found = scores(NISP(), model, inputs)
    for name, expected in {"into": stream, "in1": inner1, "in2": inner2}.items():
        close_to_mean(found[name], expected)


def removed_one_by_one(parts):
    """Places in the greedy order of removal, by trying every unit at every step; ``parts`` is ``[rows, units]``."""
    removed = []
    while len(removed) < parts.shape[1]:
        rest = [unit for unit in range(parts.shape[1]) if unit not in removed]
        removed.append(min(rest, key=lambda unit: float(parts[:, [*removed, unit]].sum(1).square().sum())))
    return [(removed.index(unit) + 1) / len(removed) for unit in range(len(removed))]


@pytest.mark.parametrize("seed", range(5))
def test_thinet_is_the_greedy_order(seed):
    torch.manual_seed(seed)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(9, 3)
    parts = (model[:2](inputs) * model[2].weight).detach()
    assert scores(ThiNet(draws=1), model, inputs)["0"].tolist() == removed_one_by_one(parts)


def test_thinet_knows_that_two_units_cancel():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
    weighted(model[0], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    weighted(model[1], [3.0, -3.0, 4.0])
    # Each of the first two makes more of a difference than none, together they make none.
    assert scores(ThiNet(), model, SQUARE)["0"].tolist() == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_thinet_estimates_the_whole_response():
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 3)), torch.randn(8, 2, 5, 5)
    with torch.no_grad():
        model[2].weight *= torch.tensor([1.0, 0.2, 3.0, 0.5])[:, None, None]
        hidden = model[:2](images)
        alone = [hidden * torch.eye(4)[unit][:, None, None] for unit in range(4)]
        parts = torch.stack([(model[2](one) - model[2](0 * one)).flatten() for one in alone], 1)
    assert scores(ThiNet(draws=50), model, images)["0"].tolist() == removed_one_by_one(parts)


def attention():
    def forward(net, x):
        return net.out(torch.softmax(net.query(x) @ net.key(x).mT, -1) @ net.value(x))

    return Net(forward, **{name: nn.Linear(3, 4) for name in ("query", "key", "value")}, out=nn.Linear(4, 2))


@pytest.mark.parametrize("name", ["apoz", "hrank", "chip", "nisp", "thinet"])
def test_what_no_parameter_reads_is_said(name):
    criterion = criterion_from(name)
    with pytest.raises(PruneError, match="channel group 'query': no operator reads it with a parameter in eval"):
        scores(criterion, attention(), torch.randn(2, 5, 3))


@pytest.mark.parametrize("criterion", [APoZ, HRank, CHIP, NISP, ThiNet])
def test_there_must_be_a_batch(criterion):
    with pytest.raises(ConfigurationError, match=f"{criterion.__name__}: batches must be at least 1, but is 0"):
        criterion(batches=0)


@pytest.mark.parametrize(("criterion", "argument"), [(CHIP, "samples"), (ThiNet, "draws")])
def test_there_must_be_a_sample(criterion, argument):
    with pytest.raises(ConfigurationError, match=f"{argument} must be at least 1, but is 0"):
        criterion(**{argument: 0})


def test_weights_alone_are_refused():
    graph = trace(two_channels(), IMAGE)
    with pytest.raises(PruneError, match="APoZ cannot score channel group '0' by its weights"):
        APoZ().score(graph.groups["0"], {}, {}, torch.Generator())


class Largest(ActivationCriterion):
    batches = 2

    def observe(self, group, reading):
        return reading.channels.amax((0, 2))


class Wrong(ActivationCriterion):
    def observe(self, group, reading):
        return reading.channels


def test_a_criterion_of_the_users_own():
    module, _ = fit(pruning(criterion=Largest()))
    assert sum(widths(module)) == 30  # of 60


def test_scores_of_a_wrong_shape_are_an_error_before_training():
    used = trainer(pruning(criterion=Wrong()))
    with pytest.raises(PruneError, match=r"channel group 'net\.0' has 12 units, but its scores have shape"):
        fit_with(used)
    assert used.global_step == 0


class Flat(SmallNet):
    """Without any maps."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 3))


def test_what_cannot_be_scored_is_an_error_before_training():
    used = trainer(pruning(criterion="hrank"))
    with pytest.raises(PruneError, match=r"HRank cannot score channel group 'net\.1'.*`exclude`"):
        used.fit(Flat(), loader())
    assert used.global_step == 0


def fit_with(used):
    used.fit(small_net(), loader())

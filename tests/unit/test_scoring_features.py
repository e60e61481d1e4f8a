"""What a scorer sees of channels, against numbers worked out by hand."""

from __future__ import annotations

from math import log10, sqrt

import pytest
import torch
from torch import nn

from lightning_prune import ChannelGroup, Slot, trace
from lightning_prune.scoring import FEATURE_VERSION, Scorer, features, gradient_statistics, mean_ranks
from lightning_prune.scoring.features import CONTEXT_FEATURES, FEATURE_COUNT, UNIT_FEATURES
from tests.fits import SmallNet
from tests.helpers import Net, randomise

OWN = [  # of both units, in the order of UNIT_FEATURES
    (log10(2), log10(0.05)),
    (log10(sqrt(5)), log10(sqrt(0.005))),
    (2, -0.05),
    (log10(1), log10(0.05)),
    (log10(3), log10(0.1)),
    (41 / 25, 2),
    (log10(3), log10(0.01)),
    (0.5, 2),
    (0.1, 0.3),
    (2.5, 5.5),
    (log10(sqrt(8.5)), log10(sqrt(42.5))),
    (log10(0.1), log10(0.1)),
    (log10(0.2), -8),
    (log10(6), log10(0.05)),
    (log10(0.1), log10(sqrt(0.02))),
]
GRADIENTS = {
    "0.weight": torch.tensor([0.1, -0.1, 0.0, 0.2]).view(2, 1, 1, 2),
    "5.weight": torch.tensor([[2.0, -5.0]]),
}


def two_channels():
    """A convolution of two channels, batch-norm and a head; its tensors and its only group."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, (1, 2), bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(2, 1, bias=False),
    ).eval()  # fmt: skip
    values = {
        "0.weight": [1.0, 3.0, -0.1, 0.0],
        "1.weight": [0.5, -2.0],
        "1.bias": [0.1, 0.3],
        "1.running_mean": [1.0, 2.0],
        "1.running_var": [4.0, 9.0],
        "5.weight": [3.0, 0.01],
    }
    tensors = net.state_dict()
    for name, numbers in values.items():
        tensors[name].copy_(torch.tensor(numbers).view(tensors[name].shape))
    return tensors, trace(net, torch.ones(1, 1, 4, 4)).groups


def test_features_of_two_channels_by_hand():
    tensors, groups = two_channels()
    statistics = {name: gradient_statistics(group, tensors, GRADIENTS) for name, group in groups.items()}
    found = features(groups, tensors, statistics, {"0": (0.75, 0.25)})["0"]
    own = torch.tensor(OWN).T
    half = (own[0] - own[1]).abs() / 2
    signs = torch.tensor([[1.0], [-1.0]]) * (own[0] - own[1]).sign()
    context = torch.tensor([0, log10(2), log10(1), log10(2), log10(2), 0.75, 0.25])
    expected = torch.cat([signs, own.mean(0).expand(2, -1), half.expand(2, -1), context.expand(2, -1)], 1)
    torch.testing.assert_close(found, expected.clamp(-5, 5), atol=2e-4, rtol=1e-4)


def test_statistics_of_gradients_by_hand():
    tensors, groups = two_channels()
    found = gradient_statistics(groups["0"], tensors, GRADIENTS)
    expected = torch.tensor([[0.1, 0.2, 36.0, 0.01], [0.1, 0.0, 0.0025, 0.02]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_mean_ranks_by_hand():
    tensors, groups = two_channels()
    statistics = gradient_statistics(groups["0"], tensors, GRADIENTS)
    # By the norm the first, by the scale (0.5 and 2) the second, by the slope (36 and 0.0025) the first is higher.
    assert mean_ranks(groups["0"], tensors, statistics).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert mean_ranks(groups["0"], tensors, None).tolist() == [0.5, 0.5]


def test_without_gradients_their_features_are_zero():
    tensors, groups = two_channels()
    found = features(groups, tensors, {}, {"0": (0.75, 0.25)})["0"]
    assert found[:, [11, 12, 13, 14, 26, 27, 28, 29]].abs().max() == 0
    assert found[:, [0, 15, 25]].abs().min() > 0


def test_what_a_group_lacks_counts_as_zero():
    reads = Slot("head", 1, torch.arange(3)[:, None], "consumer")
    group = ChannelGroup("inputs", (reads,), (reads,))
    tensors = {"head": torch.tensor([[1.0, 10.0, 0.0]])}
    gradients = {"head": torch.tensor([[1.0, 1.0, 1.0]])}
    statistics = {"inputs": gradient_statistics(group, tensors, gradients)}
    found = features({"inputs": group}, tensors, statistics, {"inputs": (0.0, 0.0)})["inputs"]
    there = [number for number, name in enumerate(UNIT_FEATURES) if name.startswith(("consumers", "off"))]
    missing = [number for number in range(len(UNIT_FEATURES)) if number not in there]
    assert len(there) == 2
    assert found[:, missing].abs().max() == 0
    assert found[:, [number + len(UNIT_FEATURES) for number in missing]].abs().max() == 0
    assert all(float(found[:, number].abs().min()) > 0 for number in there)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 8) for _ in range(3))
        self.out = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.zeros(8, dtype=torch.complex64))

    def forward(self, x):
        weights = torch.softmax(self.query(x) @ self.key(x).mT, -1)
        return self.out(torch.relu(weights @ self.value(x))) * self.scale.real


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (SmallNet(), torch.ones(2, 2, 6, 6)),
        (nn.Sequential(Attention(), nn.Linear(8, 2)), torch.ones(2, 3, 6)),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)), torch.ones(2, 3)),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 2, 3)), torch.ones(1, 2, 9)),
        (Net(lambda net, x: net.b(net.a(x) * net.gate), a=nn.Linear(3, 4), gate=torch.ones(4), b=nn.Linear(4, 2)),
         torch.ones(2, 3)),
    ],
    ids=["convolutions", "attention", "perceptron", "transposed", "buffer"],
)  # fmt: skip
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e12])
def test_features_are_finite_and_bounded_for_every_group(net, inputs, scale):
    groups = trace(net.eval(), inputs).groups
    assert groups
    tensors = {name: value * scale for name, value in net.state_dict().items()}
    gradients = {name: torch.full_like(parameter, scale) for name, parameter in net.named_parameters()}
    statistics = {name: gradient_statistics(group, tensors, gradients) for name, group in groups.items()}
    for seen in (statistics, {}):
        found = features(groups, tensors, seen, dict.fromkeys(groups, (0.1, 0.1)))
        for name, group in groups.items():
            assert found[name].shape == (group.width, FEATURE_COUNT)
            assert found[name].dtype is torch.float32
            assert bool(torch.isfinite(found[name]).all())
            assert float(found[name].abs().max()) <= 5


def test_the_version_names_this_list_of_features():
    assert (len(UNIT_FEATURES), len(CONTEXT_FEATURES), FEATURE_COUNT) == (15, 7, 52)
    # Whoever changes a feature changes its name or this number, and so refuses the scorers that know the old ones.
    assert FEATURE_VERSION == "386fff9ddcfc"


def test_permuting_channels_permutes_scores():
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1)
    )
    tensors = randomise(net).state_dict()
    groups, order = trace(net.eval(), torch.ones(1, 2, 9, 9)).groups, torch.randperm(6)
    permuted = {n: v[order] if n.startswith(("0.", "1.")) and v.dim() else v for n, v in tensors.items()}
    permuted["3.weight"] = tensors["3.weight"][:, order]
    shares = dict.fromkeys(groups, (0.2, 0.3))
    scorer = Scorer(seed=1)
    with torch.no_grad():
        before, after = (scorer(features(groups, values, {}, shares)) for values in (tensors, permuted))
    # In single precision, summed in another order: scores differ by 1e-6, and from each other by a thousand times that.
    torch.testing.assert_close(after["0"], before["0"][order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(after["3"], before["3"], atol=1e-5, rtol=1e-5)
    assert float(before["0"].std()) > 1e-3

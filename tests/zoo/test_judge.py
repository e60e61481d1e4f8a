"""The zoo's judge: proves what is exact, flags what is not, and makes up its own mind from the weights."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from examples.benchmarks.zoo_parts.backends import finds_again
from examples.benchmarks.zoo_parts.informative import make_informative
from examples.benchmarks.zoo_parts.judge import judge
from examples.benchmarks.zoo_parts.locate import surviving
from lightning_prune import shrink, trace
from tests.helpers import Net, random_keep


def convnet(**options):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 6, 3, **options), nn.ReLU()]
    return make_informative(nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 4 * 2, 5))).eval()


def normed(norm, width=8):
    torch.manual_seed(0)
    return make_informative(nn.Sequential(nn.Linear(4, width), norm, nn.GELU(), nn.Linear(width, 3))).eval()


def cut(model, keep):
    """A copy whose parameters keep only the named positions: ``{name: {dim: positions}}``."""
    pruned = copy.deepcopy(model)
    for name, dims in keep.items():
        module_name, _, attribute = name.rpartition(".")
        module = pruned.get_submodule(module_name)
        value = getattr(module, attribute)
        for dim, positions in dims.items():
            value = value.index_select(dim, torch.tensor(positions))
        setattr(module, attribute, nn.Parameter(value.detach()))
    return pruned


def test_an_exact_shrink_is_exact() -> None:
    original = convnet()
    pruned, image = copy.deepcopy(original), torch.randn(2, 3, 8, 6)
    graph = trace(pruned, image)
    shrink(pruned, graph, random_keep(graph))
    verdict = judge(original, pruned, (image,))
    assert verdict.word == "exact"
    assert verdict.error < 1e-6
    assert verdict.change > 1e-3


@pytest.mark.parametrize("consumer", ["3.weight", "6.weight"])
def test_swapped_columns_of_a_consumer_are_wrong(consumer) -> None:
    original = convnet()
    pruned, image = copy.deepcopy(original), torch.randn(2, 3, 8, 6)
    graph = trace(pruned, image)
    shrink(pruned, graph, random_keep(graph))
    with torch.no_grad():
        weight = pruned.get_parameter(consumer)
        weight[:, [0, 1]] = weight[:, [1, 0]]
    assert judge(original, pruned, (image,)).word == "WRONG"


def test_columns_of_other_channels_than_the_rows_are_wrong() -> None:
    original = normed(nn.Identity())
    keep = {"0.weight": {0: [0, 2, 5]}, "0.bias": {0: [0, 2, 5]}, "3.weight": {1: [0, 2, 6]}}
    assert judge(original, cut(original, keep), (torch.randn(2, 4),)).word == "WRONG"


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8)])
def test_a_cut_norm_is_exact_up_to_its_statistics(norm) -> None:
    original, x = normed(norm), torch.randn(5, 4)
    kept = [0, 2, 5, 7]
    tensors = {"0.weight": {0: kept}, "0.bias": {0: kept}, "1.weight": {0: kept}, "3.weight": {1: kept}}
    pruned = cut(original, tensors if isinstance(norm, nn.RMSNorm) else tensors | {"1.bias": {0: kept}})
    if not isinstance(norm, nn.GroupNorm):
        pruned[1].normalized_shape = (4,)
    else:
        pruned[1].num_channels = 4
    assert judge(original, pruned, (x,)).word == "norm-exact"
    with torch.no_grad():
        pruned[3].weight[:, [0, 1]] = pruned[3].weight[:, [1, 0]]
    assert judge(original, pruned, (x,)).word == "norm-inexact"


class ByHand(nn.Module):
    """An RMS norm that is no norm of torch."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x)


def test_a_cut_norm_that_is_written_by_hand_is_exact_up_to_its_statistics() -> None:
    original, x, kept = normed(ByHand(8)), torch.randn(5, 4), [0, 2, 5, 7]
    tensors = {"0.weight": {0: kept}, "0.bias": {0: kept}, "1.weight": {0: kept}, "3.weight": {1: kept}}
    pruned = cut(original, tensors)
    assert judge(original, pruned, (x,)).word == "norm-exact"
    with torch.no_grad():
        pruned[3].weight[:, [0, 1]] = pruned[3].weight[:, [1, 0]]
    assert judge(original, pruned, (x,)).word == "norm-inexact"


class Standardised(nn.Conv2d):
    """A convolution whose weights have mean 0 and variance 1, live, times a gain."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.gain = nn.Parameter(torch.ones(self.out_channels))

    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        rows = nn.functional.batch_norm(rows, None, None, weight=self.gain, training=True, momentum=0.0)
        return nn.functional.conv2d(x, rows.reshape(self.weight.shape), self.bias)


def test_fewer_inputs_of_standardised_weights_are_exact_up_to_their_statistics() -> None:
    torch.manual_seed(0)
    original = make_informative(nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), Standardised(8, 4, 3))).eval()
    kept = [0, 2, 5]
    pruned = cut(original, {"0.weight": {0: kept}, "0.bias": {0: kept}, "2.weight": {1: kept}})
    x = torch.randn(2, 3, 8, 6)
    assert judge(original, pruned, (x,)).word == "norm-exact"
    with torch.no_grad():
        pruned[2].weight[:, [0, 1]] = pruned[2].weight[:, [1, 0]]
    assert judge(original, pruned, (x,)).word == "norm-inexact"


def test_narrower_heads_are_exact_up_to_their_scale() -> None:
    def attend(net, x):
        heads = [part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (net.q, net.k, net.v)]
        return net.out(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    original = make_informative(Net(attend, **{name: nn.Linear(6, 8) for name in "qkv"}, out=nn.Linear(8, 3)))
    kept = [1, 3, 4, 6]
    rows = {f"{name}.{kind}": {0: kept} for name in "qk" for kind in ("weight", "bias")}
    assert judge(original, cut(original, rows), (torch.randn(2, 5, 6),)).word == "scale-exact"


def test_other_values_are_not_judged() -> None:
    original = convnet()
    pruned = cut(original, {"6.weight": {1: range(24)}})
    with torch.no_grad():
        pruned[6].weight[0, 0] += 1
    verdict = judge(original, pruned, (torch.randn(2, 3, 8, 6),))
    assert verdict.word == "other"
    assert "6.weight" in verdict.reason


def test_each_block_may_lose_other_columns() -> None:
    original = convnet(groups=2)
    pruned = copy.deepcopy(original)
    weight = original[3].weight.detach()
    pruned[3].weight = nn.Parameter(torch.cat([weight[:3, [0, 2, 3]], weight[3:, [1, 2, 3]]]))
    mask = surviving(original, pruned)["3.weight"]
    assert mask[:3].all(dim=0).flatten(1).all(1).tolist() == [True, False, True, True]
    assert mask[3:].all(dim=0).flatten(1).all(1).tolist() == [False, True, True, True]


def test_removal_that_changes_nothing_is_no_evidence() -> None:
    original = normed(nn.Identity())
    with torch.no_grad():
        original[3].weight[:, [1, 4]] *= 1e-9
    kept = [0, 2, 3, 5, 6, 7]
    pruned = cut(original, {"0.weight": {0: kept}, "0.bias": {0: kept}, "3.weight": {1: kept}})
    assert judge(original, pruned, (torch.randn(2, 4),)).word == "no evidence"


def test_a_shrunk_network_has_the_same_groups_less_what_went() -> None:
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1)]
    network, x = make_informative(nn.Sequential(*layers)), torch.randn(2, 3, 4, 5)
    graph = trace(network, x)
    name = "0"
    assert graph.widths == {name: 2}
    both, one = {name: torch.tensor([0, 1])}, {name: torch.tensor([1])}
    assert finds_again(graph, both, trace(network, x))
    shrink(network, graph, one)
    again = trace(network, x)
    assert len(again.widths) == 2  # an ordinary convolution now, whose inputs and outputs go one by one
    assert finds_again(graph, one, again)
    assert not finds_again(graph, both, again)
    strange = replace(again, groups={"strange": replace(again.groups[name], name="strange", slots=())})
    assert not finds_again(graph, one, strange)

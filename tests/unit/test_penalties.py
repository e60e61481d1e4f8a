"""Penalties on channels, against numbers worked out by hand and against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune import (
    BatchNormISTA,
    ChannelPenalty,
    ConfigurationError,
    GroupLasso,
    GroupNormDecay,
    Slimming,
    trace,
)
from lightning_prune.penalties import Growth, Step, add_decay, learning_rates, penalty_from


def values(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def two_channels():
    """A convolution of two channels, their norm, and what reads them; with zero gradients."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(values(3.0, 0.06).view(2, 1, 1, 1))
        net[1].weight.copy_(values(0.5, -2.0))
        net[1].bias.copy_(values(0.0, 0.0))
        net[3].weight.copy_(values(4.0, 0.08).view(1, 2, 1, 1))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return net


def step_of(net, rates=None, costs=None, inputs=(2, 1, 3, 3)):
    """A step of one optimizer that moves everything at a rate of 0.1, unless told otherwise."""
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    rates = dict.fromkeys(dict(net.named_parameters()), 0.1) if rates is None else rates
    return Step(trace(net, torch.randn(inputs)).groups, tensors, rates, costs or {})


def gradients(net):
    return {name: parameter.grad.flatten().tolist() for name, parameter in net.named_parameters()}


def weights(net):
    return {name: parameter.detach().flatten().clone() for name, parameter in net.named_parameters()}


def test_slimming_adds_the_sign_of_each_scale_and_nothing_else():
    net = two_channels()
    Slimming(0.25).before_step(step_of(net))
    assert gradients(net) == {"0.weight": [0, 0], "1.weight": [0.25, -0.25], "1.bias": [0, 0], "3.weight": [0, 0]}


def test_slimming_adds_to_the_gradient_that_is_there_and_leaves_a_scale_of_zero_alone():
    net = two_channels()
    with torch.no_grad():
        net[1].weight[0] = 0
    net[1].weight.grad += 1
    Slimming(0.25).before_step(step_of(net))
    assert net[1].weight.grad.tolist() == [1.0, 0.75]


def test_a_parameter_without_gradient_or_of_another_optimizer_is_passed_over():
    net = two_channels()
    Slimming(0.25).before_step(step_of(net, rates={"0.weight": 0.1}))
    assert net[1].weight.grad.tolist() == [0, 0]
    net[1].weight.grad = None
    Slimming(0.25).before_step(step_of(net))
    assert net[1].weight.grad is None


@pytest.mark.parametrize(
    ("cost", "expected"),
    [(1.0, [0.1, -1.6]), (2.0, [0.0, -1.2])],  # thresholds 0.1 * 4 * cost
)
def test_bn_ista_thresholds_the_scales_by_rate_strength_and_cost(cost, expected):
    net = two_channels()
    before = weights(net)
    BatchNormISTA(4.0).after_step(step_of(net, costs={"0": cost}))
    assert net[1].weight.tolist() == pytest.approx(expected, abs=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in weights(net).items() if name != "1.weight")


def test_group_lasso_shrinks_what_makes_and_what_reads_a_channel_as_one():
    net = two_channels()
    GroupLasso(5.0).after_step(step_of(net))  # norms 5 and 0.1; threshold 0.1 * 5 * sqrt(2)
    kept = 1 - 0.5 * 2**0.5 / 5
    assert net[0].weight.flatten().tolist() == pytest.approx([3 * kept, 0])
    assert net[3].weight.flatten().tolist() == pytest.approx([4 * kept, 0])
    assert net[1].weight.tolist() == [0.5, -2.0]


def test_group_lasso_takes_the_proximal_step():
    """What it gives is the least of |x - w|^2 / 2 + rate * strength * sqrt(n) |x|: all points around it are worse."""
    net = two_channels()
    start = torch.tensor([3.0, 4.0])
    GroupLasso(2.0).after_step(step_of(net))
    found = torch.stack([net[0].weight.detach()[0, 0, 0, 0], net[3].weight.detach()[0, 0, 0, 0]])

    def objective(point):
        return (point - start).square().sum() / 2 + 0.1 * 2.0 * 2**0.5 * point.norm()

    draw = torch.Generator().manual_seed(0)
    nearby = [found + 0.05 * torch.randn(2, generator=draw) for _ in range(200)]
    assert all(objective(point) > objective(found) for point in nearby)


def test_each_optimizer_shrinks_its_own_parameters_at_their_rates():
    net = two_channels()
    step = step_of(net, rates={"0.weight": 0.2})
    GroupLasso(5.0).after_step(step)
    assert net[0].weight.flatten().tolist() == pytest.approx([3 * (1 - 2**0.5 / 5), 0])
    assert net[3].weight.flatten().tolist() == pytest.approx([4.0, 0.08])


def test_a_channel_of_zeros_stays_what_it_is():
    net = two_channels()
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    for penalty in (Slimming(), BatchNormISTA(), GroupLasso(), GroupNormDecay()):
        penalty.before_step(step_of(net))
        penalty.after_step(step_of(net))
    assert all(not value.any() for value in weights(net).values())
    assert all(not any(gradient) for gradient in gradients(net).values())


def three_channels(*norms):
    """Perceptron whose hidden units have the given joint norms, in equal parts from their row and column."""
    net = nn.Sequential(nn.Linear(1, len(norms), bias=False), nn.Tanh(), nn.Linear(len(norms), 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor(norms)[:, None] / 2**0.5)
        net[2].weight.copy_(torch.tensor(norms)[None] / 2**0.5)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return net


@pytest.mark.parametrize(
    ("norms", "alpha", "factors"),
    [([5.0, 3.0, 1.0], 4, [1, 4, 16]), ([1.0, 2.0, 5.0], 2, [4, 2**1.5, 1]), ([2.0, 2.0, 2.0], 4, [1, 1, 1])],
)
def test_group_norm_pushes_the_least_important_hardest(norms, alpha, factors):
    net = three_channels(*norms)
    GroupNormDecay(0.01, alpha).before_step(step_of(net, inputs=(2, 1)))
    expected = [0.01 * factor * norm / 2**0.5 for factor, norm in zip(factors, norms, strict=True)]
    assert net[0].weight.grad.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert net[2].weight.grad.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_lies_where_each_channel_is_read():
    """A flattened map is read by several columns for each channel; autograd of the penalty itself is the oracle."""
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    coefficients = torch.tensor([0.5, 0.0, 2.0])
    columns = net[4].weight.view(2, 3, 4).square().sum((0, 2))
    rows = net[0].weight.square().sum((1, 2, 3))
    vectors = net[0].bias.square() + net[1].weight.square() + net[1].bias.square()
    (coefficients * (columns + rows + vectors)).sum().div(2).backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step = step_of(net, inputs=(2, 1, 4, 4))
    add_decay(step.groups["0"], step, coefficients)
    assert expected.keys() == dict(net.named_parameters()).keys() - {"4.bias"}
    for name, gradient in expected.items():
        torch.testing.assert_close(net.get_parameter(name).grad, gradient)
    assert not net[4].bias.grad.any()


def test_the_rates_are_those_of_the_groups_of_that_optimizer():
    net = two_channels()
    optimizer = torch.optim.SGD([{"params": net[0].parameters(), "lr": 0.5}, {"params": net[1].parameters()}], lr=0.25)
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert learning_rates(optimizer, tensors) == {"0.weight": 0.5, "1.weight": 0.25, "1.bias": 0.25}


def test_a_coefficient_grows_by_delta_up_to_its_ceiling():
    growth = Growth(delta=0.1, every=3, ceiling=0.25, start=0.01)
    grown = [growth.after(step) for step in (0, 2, 3, 5, 6, 8, 100)]
    assert grown == pytest.approx([0.11, 0.11, 0.21, 0.21, 0.25, 0.25, 0.25])
    assert growth.steps == 9


def test_the_numbers_of_the_source_take_fifty_thousand_steps():
    assert Growth(delta=1e-4, every=5, ceiling=1.0).steps == 50_000
    assert Growth(delta=1e-5, every=5, ceiling=1e-2).steps == 5_000


def test_a_growth_without_delta_takes_the_steps_there_are():
    growth = Growth.within(steps=17, delta=None, every=5, ceiling=0.9, start=0.3)
    assert growth.delta == pytest.approx(0.2)
    assert growth.steps == 15
    assert growth.after(10) == pytest.approx(0.9)


@pytest.mark.parametrize(("steps", "delta"), [(4, None), (0, None), (49, 0.1)])
def test_a_growth_that_does_not_fit_is_refused(steps, delta):
    with pytest.raises(ConfigurationError, match=f"only {steps} are known"):
        Growth.within(steps, delta, every=5, ceiling=1.0)


@pytest.mark.parametrize("wrong", [{"delta": 0.0}, {"every": 0}, {"ceiling": 0.1}, {"start": -1.0}])
def test_what_does_not_grow_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="growing coefficient"):
        Growth(**{"delta": 0.1, "every": 5, "ceiling": 1.0, "start": 0.1, **wrong})


@pytest.mark.parametrize("kind", [Slimming, BatchNormISTA, GroupLasso, GroupNormDecay])
@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan")])
def test_a_strength_that_is_none_is_refused(kind, strength):
    with pytest.raises(ConfigurationError, match=f"{kind.__name__}: strength must be above 0"):
        kind(strength)


def test_penalties_are_found_by_name():
    kinds = {"slimming": Slimming, "bn_ista": BatchNormISTA, "group_lasso": GroupLasso, "group_norm": GroupNormDecay}
    assert all(type(penalty_from(name)) is kind for name, kind in kinds.items())
    own = GroupLasso(1.0)
    assert penalty_from(own) is own
    assert isinstance(own, ChannelPenalty)
    with pytest.raises(ConfigurationError, match="unknown penalty 'sliming': did you mean 'slimming'"):
        penalty_from("sliming")


def test_a_penalty_says_when_no_group_has_what_it_acts_on():
    groups = step_of(three_channels(1.0, 2.0), inputs=(2, 1)).groups
    GroupLasso().check(groups)
    with pytest.raises(ConfigurationError, match=r"Slimming.* none of the channel groups 0: .* a scale"):
        Slimming().check(groups)

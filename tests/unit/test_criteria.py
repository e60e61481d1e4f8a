from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_prune.criteria import (
    FPGM,
    BatchNormScale,
    Hessian,
    Norm,
    Random,
    Taylor,
    criterion_from,
    normalise,
)
from lightning_prune.errors import ConfigurationError, PruneError
from lightning_prune.graph.channels import ChannelGroup, Slot


def each(count: int, width: int = 1) -> Tensor:
    return torch.arange(count * width).reshape(count, width)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_group() -> tuple[ChannelGroup, dict[str, Tensor]]:
    """Two units: a linear layer with bias and norm, read by a layer that sees two columns of each unit."""
    reads = Slot("head.weight", 1, each(2, 2), "consumer")
    slots = (
        Slot("fc.weight", 0, each(2), "producer"),
        Slot("fc.bias", 0, each(2), "bias"),
        Slot("bn.weight", 0, each(2), "scale"),
        Slot("bn.running_mean", 0, each(2), "statistic"),
        reads,
    )
    tensors = {
        "fc.weight": torch.tensor([[3.0, -4.0], [1.0, 0.0]]),
        "fc.bias": torch.tensor([2.0, -1.0]),
        "bn.weight": torch.tensor([-0.5, 0.25]),
        "bn.running_mean": torch.tensor([100.0, 100.0]),
        "head.weight": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
    }
    return ChannelGroup("fc", slots, (reads,)), tensors


def test_l1_is_the_sum_of_the_producers() -> None:
    group, tensors = small_group()
    assert criterion_from("l1").score(group, tensors, {}, generator()).tolist() == [7.0, 1.0]


def test_l2_takes_all_coupled_weights_but_no_statistics() -> None:
    group, tensors = small_group()
    # 9 + 16 + 4 + 0.25 + (1 + 4) and 1 + 1 + 0.0625 + (9 + 16)
    expected = torch.tensor([34.25, 27.0625]).sqrt()
    torch.testing.assert_close(criterion_from("l2").score(group, tensors, {}, generator()), expected)


def test_a_group_that_no_parameter_makes_is_scored_by_its_readers() -> None:
    reads = Slot("head.weight", 1, each(2, 2), "consumer")
    group = ChannelGroup("concatenated", (reads,), (reads,))
    _, tensors = small_group()
    assert Norm(p=1).score(group, tensors, {}, generator()).tolist() == [3.0, 7.0]


def test_scores_of_half_precision_weights_are_single_precision() -> None:
    group, tensors = small_group()
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    score = Norm(p=2).score(group, halves, {}, generator())
    assert score.dtype == torch.float32
    assert score.tolist() == [5.0, 1.0]


def test_bn_scale_is_the_mean_absolute_scale() -> None:
    group, tensors = small_group()
    assert BatchNormScale().score(group, tensors, {}, generator()).tolist() == [0.5, 0.25]
    second = Slot("bn2.weight", 0, each(2), "scale")
    twice = ChannelGroup("fc", (*group.slots, second), group.off)
    both = {**tensors, "bn2.weight": torch.tensor([0.1, -0.75])}
    torch.testing.assert_close(BatchNormScale().score(twice, both, {}, generator()), torch.tensor([0.3, 0.5]))


def test_bn_scale_without_a_scale_is_the_normalised_producer_norm() -> None:
    group, tensors = small_group()
    bare = ChannelGroup("fc", group.with_role("producer", "consumer"), group.off)
    torch.testing.assert_close(BatchNormScale().score(bare, tensors, {}, generator()), torch.tensor([5 / 3, 1 / 3]))


def test_taylor_is_the_squared_gradient_of_a_gate_on_the_activation() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.GELU(), nn.Conv2d(5, 3, 3), nn.Flatten(), nn.Linear(12, 4)
    ).double()
    images, labels = torch.randn(6, 2, 6, 6, dtype=torch.double), torch.arange(6) % 4
    reads = Slot("3.weight", 1, each(5), "consumer")
    group = ChannelGroup("0", (Slot("0.weight", 0, each(5), "producer"), reads), (reads,))

    gate = torch.ones(5, 1, 1, dtype=torch.double, requires_grad=True)
    functional.cross_entropy(net[3:](net[:3](images) * gate), labels).backward()
    assert gate.grad is not None
    expected = gate.grad.flatten().square()

    net.zero_grad()
    functional.cross_entropy(net(images), labels).backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}
    score = Taylor().score(group, dict(net.named_parameters()), gradients, generator())
    torch.testing.assert_close(score, expected)
    assert not score.requires_grad


def test_taylor_names_a_missing_gradient() -> None:
    group, tensors = small_group()
    with pytest.raises(PruneError, match=r"head\.weight"):
        Taylor().score(group, tensors, {}, generator())


def test_taylor_needs_a_batch() -> None:
    assert criterion_from("taylor").batches == 8
    assert Taylor(batches=3).batches == 3
    with pytest.raises(ConfigurationError, match="batches"):
        Taylor(batches=0)


def test_hessian_is_half_of_squared_weight_times_gradient_over_all_parameters_of_the_group() -> None:
    group, tensors = small_group()
    gradients = {
        "fc.weight": torch.tensor([[1.0, 0.5], [-2.0, 7.0]]),
        "fc.bias": torch.tensor([2.0, 3.0]),
        "bn.weight": torch.tensor([4.0, 0.0]),
        "head.weight": torch.tensor([[1.0, 0.0, 1.0, 2.0]]),
    }
    # (9 + 4 + 16 + 4 + 1 + 0) / 2 and (4 + 0 + 9 + 0 + 9 + 64) / 2
    hessian = criterion_from("hessian")
    assert hessian.score(group, tensors, gradients, generator()).tolist() == [17.0, 43.0]
    # A gate that is a buffer has no gradient: without (-0.5 * 4)^2.
    del gradients["bn.weight"]
    assert hessian.score(group, tensors, gradients, generator()).tolist() == [15.0, 43.0]


def test_hessian_is_optimal_brain_damage_where_the_fisher_matrix_is_the_hessian() -> None:
    # Loss (w - y)^2 / 2 with y drawn from N(w, 1): the second derivative is 1, and so is the mean square of w - y.
    reads = Slot("weight", 0, each(2), "producer")
    group, weight = ChannelGroup("fc", (reads,), (reads,)), torch.tensor([3.0, -4.0])
    noise = torch.randn(4000, 2, generator=generator())
    scores = [Hessian().score(group, {"weight": weight}, {"weight": one}, generator()) for one in noise[:, :, None]]
    torch.testing.assert_close(torch.stack(scores).mean(0), torch.tensor([4.5, 8.0]), rtol=0.1, atol=0)


def test_hessian_names_a_missing_gradient_and_needs_a_batch() -> None:
    group, tensors = small_group()
    with pytest.raises(PruneError, match=r"fc\.weight"):
        Hessian().score(group, tensors, {}, generator())
    with pytest.raises(ConfigurationError, match="batches"):
        Hessian(batches=0)


def test_fpgm_sums_distances_to_all_other_filters() -> None:
    group = ChannelGroup("conv", (Slot("conv.weight", 0, each(3), "producer"),), ())
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]]).reshape(3, 1, 1, 2)
    score = FPGM().score(group, {"conv.weight": weight}, {}, generator())
    torch.testing.assert_close(score, torch.tensor([5.0 + 4, 5 + 3, 4 + 3]))


def test_fpgm_keeps_its_digits_for_many_filters_far_from_zero() -> None:
    group = ChannelGroup("fc", (Slot("fc.weight", 0, each(64), "producer"),), ())
    weight = 100 + torch.rand(64, 8, generator=generator())
    exact = (weight.double()[:, None] - weight.double()[None]).norm(dim=2).sum(1)
    torch.testing.assert_close(
        FPGM().score(group, {"fc.weight": weight}, {}, generator()).double(), exact, rtol=1e-4, atol=0
    )


def test_random_draws_from_the_generator_alone() -> None:
    group, tensors = small_group()
    state = torch.get_rng_state()
    first = Random().score(group, tensors, {}, generator(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, Random().score(group, tensors, {}, generator(1)))
    assert not torch.equal(first, Random().score(group, tensors, {}, generator(2)))


@pytest.mark.parametrize("name", ["l1", "l2", "bn_scale", "taylor", "hessian", "fpgm", "random"])
def test_scoring_changes_nothing_and_ranks_every_unit(name: str) -> None:
    group, tensors = small_group()
    before = copy.deepcopy(tensors)
    score = criterion_from(name).score(group, tensors, tensors, generator())  # type: ignore[arg-type]
    assert score.shape == (group.width,)
    assert all(torch.equal(tensors[key], before[key]) for key in tensors)


def test_normalise() -> None:
    scores = torch.tensor([1.0, 2.0, 6.0])
    torch.testing.assert_close(normalise(scores), scores / 3)
    torch.testing.assert_close(normalise(scores, torch.tensor([False, True, True])), scores / 4)
    assert normalise(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_names() -> None:
    own = Norm(p=3)
    assert criterion_from(own) is own
    assert criterion_from("bn_scale").normalised is False
    with pytest.raises(ConfigurationError, match="did you mean 'taylor'"):
        criterion_from("tailor")  # type: ignore[arg-type]


def test_what_is_no_norm_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="p must be above 0"):
        Norm(p=0)
    with pytest.raises(ConfigurationError, match="did you mean 'producer'"):
        Norm(slots="producers")  # type: ignore[arg-type]

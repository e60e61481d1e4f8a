from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lightning_prune.criteria import (
    LAMP,
    SNIP,
    GraSP,
    Magnitude,
    Movement,
    Norm,
    RandomWeights,
    SynFlow,
    Wanda,
    WeightCriterion,
    WeightCriterionName,
    WeightSource,
    weight_criterion_from,
)
from lightning_prune.errors import ConfigurationError, PruneError
from lightning_prune.weight_budget import select_weights


class Given(WeightSource):
    """Answers every question with the same tensors."""

    def __init__(self, answers, watched=None):
        self.answers, self.watched = answers, watched or {}

    def gradients(self, batches):
        return self.answers

    def hessian_vector(self, vectors, batches):
        return self.answers

    def synaptic_flow(self):
        return self.answers

    def input_norms(self, batches):
        return self.answers


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def score(criterion, *values, gradient=None) -> list[float]:
    source = Given({} if gradient is None else {"w": torch.tensor(gradient)})
    return criterion.score({"w": torch.tensor(values)}, source, generator())["w"].tolist()


def test_magnitude_is_the_absolute_value() -> None:
    assert score(Magnitude(), 1.0, -2.0, 0.0) == [1.0, 2.0, 0.0]


def test_lamp_divides_by_all_that_is_no_smaller() -> None:
    # Squares 4, 1, 16, 9: their sums from each one upwards are 29, 30, 16, 25.
    expected = [4 / 29, 1 / 30, 16 / 16, 9 / 25]
    assert score(LAMP(), -2.0, 1.0, 4.0, 3.0) == pytest.approx(expected)


def test_lamp_takes_equal_weights_one_after_the_other() -> None:
    assert score(LAMP(), 1.0, -2.0, 0.0, 2.0) == pytest.approx([1 / 9, 4 / 8, 0, 1])
    assert score(LAMP(), 0.5, -0.5, 0.5) == pytest.approx([1 / 3, 1 / 2, 1])


def test_lamp_of_nothing_but_zeros_is_zero() -> None:
    assert score(LAMP(), 0.0, 0.0) == [0.0, 0.0]


def test_lamp_sees_no_weight_that_is_off() -> None:
    with_zeros = score(LAMP(), 0.0, 3.0, 0.0, 1.0, 2.0)
    assert [with_zeros[i] for i in (1, 3, 4)] == score(LAMP(), 3.0, 1.0, 2.0)


def test_lamp_is_blind_to_the_scale_of_a_tensor() -> None:
    weight = torch.randn(5, 7, generator=generator())
    scores = LAMP().score({"a": weight, "b": 1024 * weight}, WeightSource(), generator())
    assert torch.equal(scores["a"], scores["b"])


def test_lamp_keeps_tiny_weights_apart() -> None:
    assert score(LAMP(), 1e-25, 2e-25) == pytest.approx([1 / 5, 1])


def test_lamp_does_not_empty_a_tensor_under_the_global_scope() -> None:
    weights = {"tiny": 1e-4 * torch.randn(4, 5, generator=generator()), "large": torch.randn(30, 30)}
    kept = select_weights(LAMP().score(weights, WeightSource(), generator()), {}, 1 - 2 / 920, floor=0)
    assert {name: int(mask.sum()) for name, mask in kept.items()} == {"tiny": 1, "large": 1}
    assert kept["tiny"].flatten().tolist().index(True) == int(weights["tiny"].abs().argmax())


def test_snip_is_the_absolute_product() -> None:
    assert score(SNIP(), 2.0, -3.0, 0.0, gradient=[0.5, 2.0, 9.0]) == [1.0, 6.0, 0.0]


def test_snip_of_summed_gradients_is_the_gradient_of_gates_on_the_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
    batches = [(torch.randn(6, 2, 4, 4, dtype=torch.double), torch.arange(6) % 4) for _ in range(3)]

    gates = {name: torch.ones_like(p, requires_grad=True) for name, p in net.named_parameters()}
    gated = {name: p.detach() * gates[name] for name, p in net.named_parameters()}
    total = sum(functional.cross_entropy(functional_call(net, gated, (x,)), y) for x, y in batches)
    assert isinstance(total, Tensor)
    expected = dict(zip(gates, torch.autograd.grad(total, list(gates.values())), strict=True))

    for images, labels in batches:
        functional.cross_entropy(net(images), labels).backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    scores = SNIP(batches=3).score(dict(net.named_parameters()), Given(gradients), generator())
    for name, gate in expected.items():
        torch.testing.assert_close(scores[name], gate.abs())
        assert not scores[name].requires_grad


@pytest.mark.parametrize("criterion", [SNIP(), GraSP()])
def test_what_has_no_gradient_is_named(criterion) -> None:
    with pytest.raises(PruneError, match=r"cannot score frozen\.weight: there is no gradient"):
        criterion.score({"frozen.weight": torch.ones(2)}, Given({}), generator())


@pytest.mark.parametrize("kind", [SNIP, GraSP, Wanda])
def test_a_criterion_that_reads_data_needs_a_batch(kind) -> None:
    assert kind(batches=3).batches == 3
    with pytest.raises(ConfigurationError, match=f"{kind.__name__}: batches must be at least 1, but is 0"):
        kind(batches=0)


def test_synflow_needs_a_round() -> None:
    with pytest.raises(ConfigurationError, match="SynFlow: rounds must be at least 1, but is 0"):
        SynFlow(rounds=0)


def test_grasp_keeps_the_sign() -> None:
    assert score(GraSP(), 2.0, -3.0, 1.0, gradient=[0.5, 2.0, -4.0]) == [1.0, -6.0, -4.0]


def test_grasp_multiplies_the_hessian_with_the_gradient() -> None:
    class Bowl(WeightSource):
        """The loss a * b, whose Hessian swaps the two."""

        def gradients(self, batches):
            return {"w": torch.tensor([3.0, 2.0])}

        def hessian_vector(self, vectors, batches):
            return {"w": vectors["w"].flip(0)}

    assert GraSP().score({"w": torch.tensor([2.0, 3.0])}, Bowl(), generator())["w"].tolist() == [4.0, 9.0]


def test_synflow_is_the_absolute_product() -> None:
    assert score(SynFlow(), 2.0, -3.0, 0.0, gradient=[0.5, 2.0, 9.0]) == [1.0, 6.0, 0.0]


def test_wanda_is_the_absolute_weight_times_the_norm() -> None:
    assert score(Wanda(), 2.0, -3.0, 0.0, gradient=[0.5, 2.0, 9.0]) == [1.0, 6.0, 0.0]


def test_movement_adds_up_what_pushes_weights_away_from_zero() -> None:
    watched: dict[str, Tensor] = {}
    for weight, gradient in (([2.0, -3.0, 0.0], [1.0, 1.0, 5.0]), ([1.0, -4.0, 1.0], [1.0, -1.0, -0.5])):
        Movement().watch({"w": torch.tensor(weight)}, {"w": torch.tensor(gradient)}, watched)
    scores = Movement().score({"w": torch.ones(3), "frozen": torch.ones(2)}, Given({}, watched), generator())
    assert scores["w"].tolist() == [-2.0 - 1.0, 3.0 - 4.0, 0.0 + 0.5]
    assert scores["frozen"].tolist() == [0.0, 0.0]


def test_movement_passes_over_steps_that_a_scaler_leaves_out() -> None:
    watched: dict[str, Tensor] = {}
    Movement().watch({"w": torch.tensor([1.0, 0.0, 2.0])}, {"w": torch.tensor([torch.inf, torch.nan, 1.0])}, watched)
    assert watched["w"].tolist() == [0.0, 0.0, -2.0]


def test_movement_needs_a_step() -> None:
    with pytest.raises(PruneError, match="movement has seen no optimizer step yet"):
        Movement().score({"w": torch.ones(2)}, Given({}), generator())


def test_random_draws_from_the_generator_alone() -> None:
    weights = {"a": torch.ones(4, 3), "b": torch.ones(4, 3)}
    state = torch.get_rng_state()
    first = RandomWeights().score(weights, WeightSource(), generator(1))
    again, other = (RandomWeights().score(weights, WeightSource(), generator(seed)) for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in weights)
    assert not torch.equal(first["a"], first["b"])
    assert not torch.equal(first["a"], other["a"])


@pytest.mark.parametrize("name", get_args(WeightCriterionName))
def test_scoring_changes_nothing_and_ranks_every_weight(name: str) -> None:
    weights = {
        "conv": torch.randn(4, 3, 2, 2).to(torch.bfloat16),
        "fc": torch.randn(5, 4, requires_grad=True),
        "double": torch.randn(3, dtype=torch.double),
    }
    before = copy.deepcopy(weights)
    answers = Given(weights, {name: weight.detach().float() for name, weight in weights.items()})
    scores = weight_criterion_from(name).score(weights, answers, generator())  # type: ignore[arg-type]
    assert {key: value.shape for key, value in scores.items()} == {key: value.shape for key, value in weights.items()}
    assert all(torch.equal(weights[key], before[key]) for key in weights)
    assert all(torch.isfinite(value).all() and not value.requires_grad for value in scores.values())
    assert all(value.dtype in (torch.float32, torch.double) for value in scores.values())


def test_names() -> None:
    own = SNIP(batches=2)
    assert weight_criterion_from(own) is own
    assert isinstance(weight_criterion_from("magnitude"), Magnitude)
    assert isinstance(weight_criterion_from("random"), RandomWeights)
    assert isinstance(weight_criterion_from("lamp"), LAMP)
    kinds = (GraSP, SynFlow, Movement, Wanda)
    assert all(type(weight_criterion_from(kind.__name__.lower())) is kind for kind in kinds)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="unknown criterion of weights 'magnitud': did you mean 'magnitude'"):
        weight_criterion_from("magnitud")  # type: ignore[arg-type]


def test_a_criterion_of_channels_is_no_criterion_of_weights() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown criterion of weights: Norm is none.*'magnitude'"):
        weight_criterion_from(Norm())  # type: ignore[arg-type]


def test_a_criterion_needs_a_score() -> None:
    with pytest.raises(TypeError, match="abstract"):
        WeightCriterion()  # type: ignore[abstract]

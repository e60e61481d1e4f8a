"""What reads the channels is refitted to those that stay: against least squares, and in whole fits."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import weight_norm

from lightning_prune import ConfigurationError, OneShot, trace
from lightning_prune.graph.program import module_programs
from lightning_prune.graph.tracer import named_leaves
from lightning_prune.surgery.readers import observe
from lightning_prune.surgery.regression import scales
from lightning_prune.surgery.reparameterise import hand_over
from tests.fits import Exactness, StiffNet, fit, images, pruning, small_net
from tests.helpers import HalfPrecision, randomise, run

GONE = torch.tensor([False, True, False, True, False])
IMAGES, VECTORS = torch.randn(30, 2, 6, 6).double(), torch.randn(40, 3).double()


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_factors_are_the_least_squares_solution(ridge):
    torch.manual_seed(0)
    parts = torch.randn(40, 5, dtype=torch.float64)
    found = scales(parts.T @ parts, GONE, ~GONE, ridge)
    # A ridge is the same as more equations, each of which wants one factor to be 1.
    strength = (ridge * parts[:, ~GONE].square().sum(0).mean()) ** 0.5
    left = torch.cat([parts[:, ~GONE], strength * torch.eye(3, dtype=torch.float64)])
    right = torch.cat([parts.sum(1), strength * torch.ones(3, dtype=torch.float64)])
    torch.testing.assert_close(found, torch.linalg.lstsq(left, right[:, None]).solution[:, 0])


def test_factors_by_hand():
    # Two samples: the staying unit adds 1 and 2, the other 3 and 1; (1 * 4 + 2 * 3) / (1 + 4) = 2.
    parts = torch.tensor([[1.0, 3.0], [2.0, 1.0]])
    assert scales(parts.T @ parts, torch.tensor([False, True]), torch.tensor([True, False]), 0.0).tolist() == [2.0]


def refitted(model, inputs, gone):
    """The model with the readers of its first layer rescaled for units of it that go."""
    model = copy.deepcopy(model)
    graph, tensors = trace(model, inputs), named_leaves(model)
    readers = observe(graph, module_programs(model, inputs)[:1], tensors, seeded())
    alive = torch.ones(len(gone), dtype=torch.bool)
    hand_over([tensors], readers, {"0": ~gone}, {"0": alive}, ridge=1e-12, how="scale")
    return model


def contributions(model, inputs):
    """What each unit of the first layer adds to the response of the last, ``[everything, units]``."""
    hidden = model[:-1](inputs) if not isinstance(model[-2], nn.Flatten) else model[:-2](inputs)
    bias = model[-1].bias.detach()

    def part(unit):
        alone = torch.zeros_like(hidden)
        alone[:, unit] = hidden[:, unit]
        response = model[-1](alone.flatten(1) if isinstance(model[-1], nn.Linear) else alone)
        return (response - bias.view(-1, *[1] * (response.dim() - 2))).flatten()

    with torch.no_grad():
        return torch.stack([part(unit) for unit in range(hidden.shape[1])], 1)


def test_a_linear_layer_is_rescaled_as_least_squares_says():
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))).double().eval()
    parts = contributions(model, VECTORS)
    factors = torch.linalg.lstsq(parts[:, ~GONE], parts.sum(1, keepdim=True)).solution[:, 0]
    found = refitted(model, VECTORS, GONE)
    torch.testing.assert_close(found[2].weight[0, ~GONE], model[2].weight[0, ~GONE] * factors, rtol=1e-6, atol=1e-9)
    assert torch.equal(found[2].weight[0, GONE], model[2].weight[0, GONE])  # who switches them off does it
    assert torch.equal(found[2].bias, model[2].bias)
    assert torch.equal(found[0].weight, model[0].weight)


def alike(tensor, dim):
    """Make the second of five units nearly the first, and the fourth nearly the third."""
    with torch.no_grad():
        values = tensor.movedim(dim, 0).unflatten(0, (5, -1))
        for unit, other in ((1, 0), (3, 2)):
            values[unit] = values[other] + 0.1 * values[unit]


READERS = {
    "convolution": lambda: [nn.Conv2d(5, 3, 3, stride=2, padding=1)],
    "transposed": lambda: [nn.ConvTranspose2d(5, 3, 3, stride=2)],
    "flattened": lambda: [nn.Flatten(), nn.Linear(180, 3)],
}


@pytest.mark.parametrize("kind", READERS)
def test_random_sums_of_the_response_are_as_good_as_all_of_it(kind):
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), *READERS[kind]())).double().eval()
    alike(model[0].weight, 0)
    alike(model[0].bias, 0)
    alike(model[-1].weight, 0 if kind == "transposed" else 1)
    parts = contributions(model, IMAGES)
    best = torch.linalg.lstsq(parts[:, ~GONE], parts.sum(1, keepdim=True)).solution[:, 0]

    def error(factors):
        return (parts.sum(1) - parts[:, ~GONE] @ factors).square().sum().item()

    readers = refitted(model, IMAGES, GONE)[-1].weight, model[-1].weight
    dim = 0 if kind == "transposed" else 1
    found, before = (weight.detach().movedim(dim, 0).reshape(5, -1)[~GONE] for weight in readers)
    ratios = found / before
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios))  # one factor for each unit
    assert error(best) <= error(ratios[:, 0]) < 1.2 * error(best) < 0.9 * error(torch.ones(3).double())


def test_a_unit_that_repeats_another_leaves_no_gap():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 1), nn.ReLU(), nn.Conv2d(5, 3, 3, padding=1)).double().eval()
    with torch.no_grad():
        for tensor, dim in ((model[0].weight, 0), (model[0].bias, 0), (model[2].weight, 1)):
            tensor.select(dim, 4).copy_(tensor.select(dim, 1))
    gone = torch.tensor([False, False, False, False, True])
    found = refitted(model, IMAGES, gone)
    with torch.no_grad():
        found[2].weight[:, 4] = 0
    torch.testing.assert_close(found(IMAGES), model(IMAGES), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[2].weight[:, 1], 2 * model[2].weight[:, 1], rtol=1e-5, atol=1e-7)


def test_under_autocast_a_layer_is_rescaled_alike():
    torch.manual_seed(0)
    model, inputs = randomise(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 1))).eval(), torch.randn(40, 3)
    expected = refitted(model, inputs, GONE)[2].weight
    found = refitted(HalfPrecision(*model), inputs, GONE)[2].weight
    change = (expected - model[2].weight).abs().max()
    assert change > 0.1
    assert (found - expected).abs().max() < 0.1 * change  # what is read was rounded to eight bits


def test_what_is_worked_out_before_it_reads_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), weight_norm(nn.Linear(5, 2))).double()
    found = refitted(model, VECTORS, GONE)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.state_dict().items())


class LossAfterTheCut(L.Callback):
    """Loss on all samples when training goes on, in evaluation mode."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            samples, labels = images().tensors
            self.loss = cross_entropy(run(pl_module, samples)[0], labels).item()


def loss_after_a_cut(module, repair, **trainer):
    seen = LossAfterTheCut()
    now = {"schedule": OneShot(0, "step"), "criterion": "thinet", "remove": 0.3, "scope": "group"}
    callback = pruning(**now, repair=repair, repair_batches=6)
    fit(callback, seen, module=copy.deepcopy(module), epochs=1, **trainer)
    return seen.loss


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_loss_after_a_cut_is_lower_with_repair(precision):
    trained, _ = fit(module=small_net(seed=1), epochs=4)
    ways = ("none", "scale", "regression")
    plain, scaled, regressed = (loss_after_a_cut(trained, how, precision=precision) for how in ways)
    assert scaled < 0.8 * plain
    assert regressed < 0.8 * plain


def test_a_group_that_cannot_go_after_all_is_not_refitted_either(monkeypatch):
    exactness = Exactness(monkeypatch, lambda module: run(module, images(seed=5).tensors[0]))
    callback = pruning(criterion="l2", repair="regression", remove=0.3)
    torch.manual_seed(0)
    module, _ = fit(callback, module=StiffNet())
    assert module.net[4].out_channels == 24
    assert callback.report.reached == pytest.approx(0.3)
    assert max(exactness.differences) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repair": "glue"}, "unknown repair 'glue'"),
        ({"repair": "scale", "repair_batches": 0}, "repair_batches must be at least 1"),
        ({"repair": "scale", "reinit": "rewind"}, "refits weights that reinit=Rewind.. replaces"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        pruning(**arguments)

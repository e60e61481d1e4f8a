"""Weights behind masks and gates: values, gradients, and steps of optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune import trace
from lightning_prune.effective import ChannelGates, EffectiveWeights
from lightning_prune.errors import ConfigurationError
from lightning_prune.gated_training import GatedTraining, refuse_repeated_losses
from lightning_prune.graph.channels import ChannelGroup, Slot
from lightning_prune.surgery.resize import Cut


class Attention(nn.Module):
    """Queries and keys that meet each other, so that they are switched off by what makes them."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, x):
        return self.head((self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1) @ x)


def networks():
    residual = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    image = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 3, 1),
        nn.Flatten(), nn.Linear(3, 2),
    )  # fmt: skip
    return {
        "linear": (residual, torch.randn(6, 3)),
        "depthwise": (image, torch.randn(4, 1, 5, 5)),
        "attention": (Attention(), torch.randn(2, 4, 3)),
    }


@pytest.mark.parametrize("name", ["linear", "depthwise", "attention"])
def test_gradients_of_gates_are_those_of_finite_differences(name):
    torch.manual_seed(0)
    model, inputs = networks()[name]
    model, inputs = model.double().eval(), inputs.double()
    groups = trace(model, (inputs,)).groups
    tensors = dict(model.named_parameters())
    gating = ChannelGates(groups.values(), tensors)
    effective = EffectiveWeights({n: tensors[n] for n in gating.names})
    gates = {n: torch.rand(group.width, dtype=torch.float64) + 0.5 for n, group in groups.items()}

    def loss(at):
        effective.place(gating.factors(at))
        return model(inputs).square().sum()

    loss(gates).backward()
    found = gating.gradients(gates, effective.slopes())
    for group, gate in gates.items():
        for unit in range(len(gate)):
            step = torch.zeros_like(gate)
            step[unit] = 1e-6
            with torch.no_grad():
                rise = loss({**gates, group: gate + step}) - loss({**gates, group: gate - step})
            assert float(found[group][unit]) == pytest.approx(float(rise) / 2e-6, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", ["linear", "depthwise", "attention"])
def test_a_shut_gate_is_a_channel_that_is_off(name):
    torch.manual_seed(1)
    model, inputs = networks()[name]
    model.eval()
    graph = trace(model, (inputs,))
    tensors = dict(model.named_parameters())
    gating = ChannelGates(graph.groups.values(), tensors)
    effective = EffectiveWeights({n: tensors[n] for n in gating.names})
    whole = model(inputs)
    effective.place(gating.factors({n: torch.ones(g.width) for n, g in graph.groups.items()}))
    assert torch.equal(model(inputs), whole)
    first = next(iter(graph.groups.values()))
    gate = torch.ones(first.width)
    gate[0] = 0
    effective.place(gating.factors({first.name: gate}))
    assert all(not slot.gather(tensors[slot.tensor])[0].any() for slot in first.off)
    assert not torch.equal(model(inputs), whole)


def test_dense_values_follow_a_resize():
    weight = nn.Parameter(torch.arange(6.0).view(2, 3))
    effective = EffectiveWeights({"weight": weight})
    effective.cut({"weight": [Cut(1, torch.tensor([0, 2]))]})
    assert effective.dense["weight"].tolist() == [[0, 2], [3, 5]]


class TestGatedTraining:
    def gated(self, weight, gates, dense=None):
        reads = Slot("fc.weight", 1, torch.arange(2)[:, None], "consumer")
        group = ChannelGroup("conv", (reads,), (reads,))
        return GatedTraining([group], {"fc.weight": weight}, {"conv": gates}, dense)

    def test_the_optimizer_moves_what_is_behind_the_gates(self):
        weight = torch.nn.Parameter(torch.tensor([[4.0, 2.0]]))
        gated = self.gated(weight, torch.tensor([0.5, 1.0]))
        assert weight.tolist() == [[2.0, 2.0]]
        (3 * weight).sum().backward()
        gated.before_step(["fc.weight"])
        torch.optim.SGD([weight], lr=0.1).step()
        gated.after_step()
        # 4 - 0.1 * 3 * 0.5 and 2 - 0.1 * 3
        assert torch.allclose(gated.dense["fc.weight"], torch.tensor([[3.85, 1.7]]))
        assert torch.allclose(weight, torch.tensor([[1.925, 1.7]]))
        assert torch.allclose(weight.grad, torch.tensor([[1.5, 3.0]]))

    def test_gradients_of_another_optimizer_are_left_alone(self):
        weight = torch.nn.Parameter(torch.tensor([[4.0, 2.0]]))
        gated = self.gated(weight, torch.tensor([0.5, 1.0]))
        weight.sum().backward()
        gated.before_step([])
        assert weight.grad.tolist() == [[1.0, 1.0]]

    def test_goes_on_with_what_was_behind_the_gates(self):
        weight = torch.nn.Parameter(torch.tensor([[2.0, 2.0]]))
        gated = self.gated(weight, torch.tensor([0.5, 1.0]), {"fc.weight": torch.tensor([[8.0, 2.0]])})
        assert weight.tolist() == [[4.0, 2.0]]
        gated.open()
        assert weight.tolist() == [[8.0, 2.0]]

    def test_a_step_that_was_not_taken_is_undone(self):
        weight = torch.nn.Parameter(torch.tensor([[4.0, 2.0]]))
        gated = self.gated(weight, torch.tensor([0.5, 1.0]))
        gated.before_step(["fc.weight"])
        gated.after_step()
        assert weight.tolist() == [[2.0, 2.0]]
        assert gated.dense["fc.weight"].tolist() == [[4.0, 2.0]]

    def test_optimizers_that_compute_the_loss_again_are_refused(self):
        with pytest.raises(ConfigurationError, match="LBFGS computes the loss again"):
            refuse_repeated_losses([torch.optim.LBFGS([torch.zeros(1, requires_grad=True)])], "it")

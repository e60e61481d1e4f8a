from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune import ShrinkError, shrink, trace
from lightning_prune.surgery.verify import Observed, Output, largest_difference, masked_outputs, tolerant


class Branching(nn.Module):
    """Hands out minus infinity for every class that is not allowed."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(self.first(x).relu()).masked_fill(torch.tensor([False, True, False]), float("-inf"))


NAN, INF = float("nan"), float("inf")


class TestDifference:
    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    def test_what_is_not_finite_in_both_does_not_count(self, value):
        a, b = torch.tensor([1.0, value, 4.0]), torch.tensor([1.0, value, 4.0002])
        assert largest_difference(Observed([Output(a, 1e-4)]), Observed([Output(b, 1e-4)])) == pytest.approx(
            5e-5, rel=1e-2
        )

    @pytest.mark.parametrize(("masked", "shrunk"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (-INF, INF), (INF, NAN)])
    def test_what_is_not_finite_in_one_of_them_does(self, masked, shrunk):
        a, b = torch.tensor([2.0, masked]), torch.tensor([2.0, shrunk])
        with pytest.raises(ShrinkError, match="differs from the masked one"):
            largest_difference(Observed([Output(a, 1e-4)]), Observed([Output(b, 1e-4)]))

    def test_too_large_a_difference(self):
        a, b = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 4.002])
        with pytest.raises(ShrinkError, match=r"by 0\.0005 of the largest output"):
            largest_difference(Observed([Output(a, 1e-4)]), Observed([Output(b, 1e-4)]))

    def test_imaginary_parts_count(self):
        a, b = torch.tensor([1 + 1j]), torch.tensor([1 + 2j])
        with pytest.raises(ShrinkError, match="differs from the masked one"):
            largest_difference(Observed([Output(a, 1e-4)]), Observed([Output(b, 1e-4)]))

    def test_a_complex_network_can_be_shrunk(self):
        model = nn.Sequential(nn.Linear(4, 8, dtype=torch.complex64), nn.Linear(8, 2, dtype=torch.complex64))
        inputs = torch.randn(3, 4, dtype=torch.complex64)
        shrunk = shrink(model, trace(model, inputs), {"0": torch.tensor([0, 2, 3, 5, 7])})
        assert model[1].weight.shape == (2, 5)
        assert shrunk.error < 1e-5

    def test_zeros_are_compared_absolutely(self):
        zero = Output(torch.zeros(3), 1e-4)
        assert largest_difference(Observed([zero]), Observed([zero])) == 0
        with pytest.raises(ShrinkError):
            largest_difference(Observed([zero]), Observed([Output(torch.full((3,), 0.1), 1e-4)]))

    def test_other_tensors_than_before(self):
        one = Output(torch.zeros(3), 1e-4)
        with pytest.raises(ShrinkError, match="hands out 2 tensors, the masked one 1"):
            largest_difference(Observed([one]), Observed([one, one]))

    def test_a_network_that_hands_out_infinities_can_be_shrunk(self):
        model, inputs = Branching(), torch.randn(3, 4)
        shrunk = shrink(model, trace(model, inputs), {"first": torch.tensor([0, 5])})
        assert shrunk.error < 1e-5
        assert model(inputs)[:, 1].tolist() == [-INF] * 3


class Cancelling(nn.Module):
    """What is left of two linear layers that nearly cancel each other, as large as if they did not."""

    def __init__(self, gap: float):
        super().__init__()
        self.first, self.plus, self.minus, self.gap = nn.Linear(8, 3000), nn.Linear(3000, 4), nn.Linear(3000, 4), gap
        with torch.no_grad():
            for name, parameter in self.minus.named_parameters():
                parameter.copy_((1 - gap) * self.plus.get_parameter(name))

    def forward(self, x):
        x = self.first(x).relu()
        return (self.plus(x) - self.minus(x)) / self.gap


class Undecided(nn.Module):
    """Picks one of many very different values by scores that are equal but for rounding."""

    def __init__(self):
        super().__init__()
        self.first, self.scores, self.values = nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(8, 16)
        with torch.no_grad():
            for parameter in self.scores.parameters():
                parameter[:] = parameter[:1].clone()

    def forward(self, x):
        x = self.first(x).relu()
        return self.values(x).gather(1, self.scores(x).topk(1).indices)


class TestAmplifiedRounding:
    def cut(self, gap):
        torch.manual_seed(0)
        model, inputs = Cancelling(gap), torch.randn(16, 8)
        graph, keep = trace(model, inputs), {"first": torch.randperm(3000)[:777]}
        return model, graph, keep, lambda: shrink(model, graph, keep)

    def test_that_of_the_network_itself_is_allowed(self):
        model, *_, cut = self.cut(1e-3)
        assert 1e-4 < cut().error < 0.05
        assert model.plus.in_features == 777

    def test_but_no_large_difference(self):
        model, *_, cut = self.cut(1e-7)
        with pytest.raises(ShrinkError, match="differs from the masked one"):
            cut()
        assert model.plus.in_features == 3000

    @pytest.mark.parametrize(("gap", "low", "high"), [(1.0, 1e-4, 1e-4), (1e-2, 2e-4, 9e-3), (1e-7, 0.05, 0.05)])
    def test_what_it_allows(self, gap, low, high):
        model, graph, keep, _ = self.cut(gap)
        units = {name: units.sort().values for name, units in keep.items()}
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected = masked_outputs(graph.evidence, units)
        allowed = tolerant(graph.evidence, units, {}, expected).outputs[0]
        assert low <= allowed.tolerance <= high
        torch.testing.assert_close(allowed.value, expected.outputs[0].value, rtol=0, atol=0)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    def test_in_double_precision_it_allows_more_too(self):
        torch.manual_seed(0)
        model = Cancelling(1e-6).double()
        graph = trace(model, torch.randn(16, 8).double())
        units = {"first": torch.arange(777)}
        expected = masked_outputs(graph.evidence, units)
        assert 1e-9 < tolerant(graph.evidence, units, {}, expected).outputs[0].tolerance < 1e-6

    def test_what_is_picked_does_not_change_with_the_last_digits(self):
        torch.manual_seed(0)
        model = Undecided()
        graph, units = trace(model, torch.randn(16, 4)), {"first": torch.arange(5)}
        expected = masked_outputs(graph.evidence, units)
        assert tolerant(graph.evidence, units, {}, expected).outputs[0].tolerance == 1e-4

"""Soft gates under a budget, by numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_prune.annealing import (
    Mixture,
    annealed,
    best,
    cooled,
    falling,
    fit_mixture,
    gaussian_scales,
    log_odds,
    soft_gates,
    threshold_for,
    weighed,
)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_scales_are_most_probable_under_the_prior():
    weights = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    # (25 + 2b) / (2 + 2a + 2) and 2b / (2 + 2a + 2)
    assert gaussian_scales(weights, shape=1.0, scale=0.5).tolist() == pytest.approx([26 / 6, 1 / 6])
    assert gaussian_scales(weights, shape=2.0).tolist() == pytest.approx([25 / 8, 0.0])


class TestMixture:
    def test_two_clear_clusters_are_found(self):
        generator = torch.Generator().manual_seed(0)
        low, high = torch.randn(300, generator=generator) * 0.5 - 4, torch.randn(100, generator=generator) * 1.5 + 6
        mixture = fit_mixture(torch.cat([high, low]))
        assert mixture.shares.tolist() == pytest.approx([0.75, 0.25], abs=1e-3)
        assert mixture.means.tolist() == pytest.approx([float(low.mean()), float(high.mean())], abs=1e-2)
        variances = [float(part.var(unbiased=False)) for part in (low, high)]
        assert mixture.variances.tolist() == pytest.approx(variances, rel=2e-2)

    def test_one_step_by_hand(self):
        # From means -1 and 1, variance 1 and equal shares, a value x belongs to the higher one with sigmoid(2 x).
        values = doubles(-1, -1, 1, 1)
        upper = 1 / (1 + math.exp(-2))
        mixture = fit_mixture(values, iterations=1)
        assert mixture.shares.tolist() == pytest.approx([0.5, 0.5])
        assert mixture.means.tolist() == pytest.approx([1 - 2 * upper, 2 * upper - 1])
        assert mixture.variances.tolist() == pytest.approx([1 - (2 * upper - 1) ** 2] * 2)

    def test_equal_values_make_no_trouble(self):
        odds = log_odds(torch.zeros(5), fit_mixture(torch.zeros(5)))
        assert bool(odds.isfinite().all())
        assert len(odds.unique()) == 1

    def test_log_odds_by_hand(self):
        mixture = Mixture(doubles(0.2, 0.8), doubles(0, 2), doubles(1, 1))
        # log 4 + ((x - 0)^2 - (x - 2)^2) / 2 = log 4 + 2 x - 2
        assert log_odds(doubles(1, 3), mixture).tolist() == pytest.approx([math.log(4), math.log(4) + 4])

    @pytest.mark.parametrize("variances", [(0.1, 4.0), (4.0, 0.1)])
    def test_odds_rise_with_the_value_however_wide_the_gaussians_are(self, variances):
        mixture = Mixture(doubles(0.5, 0.5), doubles(0, 1), doubles(*variances))
        values = torch.linspace(-20, 20, 401, dtype=torch.float64)
        plain = mixture.joint(values)[:, 1] - mixture.joint(values)[:, 0]
        assert bool((plain.diff() < 0).any())
        odds = log_odds(values, mixture)
        assert bool((odds.diff() > 0).all())
        between = (values >= 0) & (values <= 1)
        assert torch.equal(odds[between], plain[between])


class TestEvidence:
    def test_groups_of_any_scale_are_compared_by_their_medians(self):
        first = torch.tensor([1.0, 1.1, 1.2, 8.0, 9.0, 10.0])
        alive = {name: torch.ones(6, dtype=torch.bool) for name in "ab"}
        evidence, floors = weighed({"a": first, "b": 1000 * first}, alive)
        assert torch.allclose(evidence["a"], evidence["b"], rtol=1e-4)
        assert (evidence["a"] > 0).tolist() == [False] * 3 + [True] * 3
        # half the scale that is usual among the dormant ones: about 0.5 * 1.1
        assert floors["a"] == pytest.approx(0.55, rel=0.02)
        assert floors["b"] == pytest.approx(550, rel=0.02)

    def test_what_is_off_does_not_count(self):
        alive = {"a": torch.tensor([True, True, False, True, True])}
        scales = torch.tensor([1.0, 1.1, 1e6, 5.0, 5.5])
        evidence, _ = weighed({"a": scales}, alive)
        others, _ = weighed({"a": scales[alive["a"]]}, {"a": torch.ones(4, dtype=torch.bool)})
        assert evidence["a"][2] == -math.inf
        assert torch.equal(evidence["a"][alive["a"]], others["a"])

    def test_units_of_zeros_make_no_trouble(self):
        scales = {"a": torch.tensor([0.0, 1.0, 1.1, 2.0]), "b": torch.zeros(3)}
        evidence, _ = weighed(
            scales, {name: torch.ones(len(value), dtype=torch.bool) for name, value in scales.items()}
        )
        assert all(bool(values.isfinite().all()) for values in evidence.values())


class TestGates:
    def test_gates_by_hand(self):
        gates = soft_gates({"a": doubles(0, 2, -math.inf)}, threshold=1.0, temperature=0.5)["a"]
        assert gates.tolist() == pytest.approx([1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2)), 0.0])

    @pytest.mark.parametrize("temperature", [5.0, 0.5, 0.01])
    def test_the_threshold_meets_the_budget(self, temperature):
        evidence = {"a": torch.linspace(-3, 3, 10, dtype=torch.float64), "b": doubles(0.1, 0.2, 5)}

        def cost(widths):
            return widths["a"] * widths["b"] + 4 * widths["b"]

        for allowed in (35.0, 20.0, 5.0):
            gates = soft_gates(evidence, threshold_for(evidence, temperature, cost, allowed), temperature)
            found = cost({name: float(gate.sum()) for name, gate in gates.items()})
            assert found == pytest.approx(allowed, rel=1e-6)

    def test_a_budget_that_all_fit_in_leaves_all_open(self):
        gates = annealed({"a": doubles(-1, 0, 4)}, 0.5, lambda widths: widths["a"], 3.0, {})["a"]
        assert gates.tolist() == pytest.approx([1, 1, 1])

    def test_gates_start_at_the_spread_and_end_nearly_hard(self):
        evidence = {"a": doubles(-1, 1)}  # of standard deviation 1
        first, last = (annealed(evidence, x, lambda widths: widths["a"], 1.0, {})["a"].tolist() for x in (0.0, 1.0))
        assert first == pytest.approx([1 / (1 + math.e), 1 / (1 + 1 / math.e)])
        assert last == pytest.approx([0, 1], abs=1e-9)

    def test_what_stays_whatever_comes_is_open(self):
        evidence = {"a": doubles(-9, -8, -7), "b": doubles(1, 2, 3)}  # all that speaks for a group speaks against it
        gates = annealed(evidence, 0.9, lambda widths: sum(widths.values()), 2.0, {"a": 1, "b": 1})
        assert gates["a"].tolist() == pytest.approx([0, 0, 1], abs=1e-6)

    def test_temperatures_and_budgets_by_hand(self):
        assert [cooled(4.0, x, last=1 / 16) for x in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([4, 2, 1, 0.25])
        assert [falling(150.0, 30.0, x) for x in (0.0, 0.5, 1.0)] == pytest.approx([150, 45, 30])

    def test_the_best_are_kept(self):
        assert best(doubles(-math.inf, 2, 2, 5), 2).tolist() == [False, True, False, True]

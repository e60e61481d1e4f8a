"""Projections onto a budget: exact, against closed forms and an independent solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lightning_prune.projection import entropic, euclidean, top


def drawn(seed, count=9):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [0.7, 3.0, 6.5])
def test_the_nearest_point_of_the_budget_is_found(seed, budget):
    values = 1.5 * drawn(seed)
    start = np.full(len(values), budget / len(values))
    limits = [{"type": "ineq", "fun": lambda m: budget - m.sum()}]
    goal = values.numpy()
    solved = minimize(
        lambda m: ((m - goal) ** 2).sum(), start, jac=lambda m: 2 * (m - goal), bounds=[(0, 1)] * len(goal),
        constraints=limits, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    found = euclidean(values, budget)
    distance = float((found - values).square().sum())
    assert distance <= solved.fun + 1e-7  # older solvers stop a little early, and say so
    assert found.numpy() == pytest.approx(solved.x, abs=1e-6 if solved.success else 1e-3)
    assert float(found.sum()) <= budget + 1e-6


def test_what_is_within_the_budget_is_only_clipped():
    assert euclidean(torch.tensor([-0.5, 0.2, 1.5]), 2.0).tolist() == pytest.approx([0.0, 0.2, 1.0])


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("budget", [0.5, 4.0, 8.9])
def test_the_entropic_mask_meets_the_budget_and_is_optimal(temperature, budget):
    scores = drawn(3)
    mask = entropic(scores, budget, temperature)
    assert float(mask.sum()) == pytest.approx(budget, abs=1e-6)
    # At the optimum the gradient of <scores, m> + temperature * entropy(m) is the same number for all entries.
    inside = (mask > 1e-9) & (mask < 1 - 1e-9)
    gradient = scores - temperature * torch.logit(mask)
    assert float(gradient[inside].max() - gradient[inside].min()) <= 1e-5


def test_the_entropic_mask_goes_to_the_top_ones():
    scores = drawn(4)
    assert torch.equal(entropic(scores, 4, 1e-4).round(), top(scores, 4))


def test_wide_scores_do_not_upset_the_entropic_mask():
    mask = entropic(torch.tensor([1e4, 10.0, 0.0, -1e4]), 2.0, 0.05)
    assert mask.tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("count", range(6))
def test_exactly_as_many_stay_as_may(count):
    scores = torch.tensor([2.0, 1.0, 2.0, 2.0, 0.0])
    mask = top(scores, count)
    assert mask.sum() == count
    best = scores.sort(descending=True).values[:count].sum()
    assert (scores * mask).sum() == best


def test_of_equal_scores_the_later_stay():
    assert top(torch.zeros(4), 2).tolist() == [0.0, 0.0, 1.0, 1.0]

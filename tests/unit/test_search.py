"""Every search finds the minimum of a known function, in its box, the same one for the same seed."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_prune import Annealing, ConfigurationError, CrossEntropy, Genetic, ParticleSwarm
from lightning_prune.search import Search, search_from

SEARCHES = [Genetic(30, 40), ParticleSwarm(30, 40), Annealing(30, 40), CrossEntropy(30, 40)]
LOWER, UPPER = torch.tensor([-4.0, -1.0, 0.0]), torch.tensor([5.0, 1.0, 20.0])


def distance(target):
    """Squared distance in units of the box, and the points asked for."""
    asked = []

    def function(point):
        asked.append(point)
        return float((((point - torch.tensor(target)) / (UPPER - LOWER)) ** 2).sum())

    return function, asked


def minimise(search, function, starts=(), seed=0):
    return search.minimise(function, list(starts), LOWER, UPPER, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: type(search).__name__)
@pytest.mark.parametrize("seed", range(3))
def test_the_minimum_is_found(search, seed):
    function, asked = distance([3.0, -0.5, 16.0])
    found = minimise(search, function, seed=seed)
    assert torch.allclose(found.point, torch.tensor([3.0, -0.5, 16.0]).double(), atol=0.5)
    assert found.value == pytest.approx(function(found.point), abs=1e-12)
    assert found.value < 1e-3
    assert all(bool(((point >= LOWER) & (point <= UPPER)).all()) for point in asked)


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: type(search).__name__)
def test_a_minimum_at_the_edge_of_the_box_is_found(search):
    function, _ = distance([9.0, 0.0, -5.0])
    assert torch.allclose(minimise(search, function).point[[0, 2]], torch.tensor([5.0, 0.0]).double(), atol=0.3)


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: type(search).__name__)
def test_the_same_seed_asks_for_the_same_points(search):
    runs = []
    for seed in (1, 1, 2):
        function, asked = distance([3.0, -0.5, 16.0])
        minimise(search, function, seed=seed)
        runs.append(torch.stack(asked))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("search", [Genetic, ParticleSwarm, Annealing, CrossEntropy])
def test_starts_are_tried_first_and_the_count_of_trials_is_kept(search):
    function, asked = distance([0.0, 0.0, 0.0])
    starts = [torch.tensor([1.0, 0.5, 2.0]), torch.tensor([-4.0, 1.0, 20.0])]
    minimise(search(population=6, generations=4), function, starts)
    assert torch.allclose(torch.stack(asked[:2]), torch.stack(starts).double())
    extra = 2 if search is Genetic else 0  # the elite is not tried again
    assert len(asked) == 6 + 4 * (6 - extra)


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: type(search).__name__)
def test_nothing_is_worse_than_a_start_and_of_equals_the_first_start_stays(search):
    start = torch.tensor([0.25, 0.5, 10.0])
    best = minimise(search, lambda point: -1.0 if torch.allclose(point, start.double()) else math.nan, [start])
    assert torch.allclose(best.point, start.double())
    assert best.value == -1.0
    assert torch.allclose(minimise(search, lambda point: 7.0, [start]).point, start.double())
    assert minimise(search, lambda point: math.nan, [start]).value == math.inf


def test_a_side_of_no_length_is_left_alone():
    lower, upper = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0])
    for search in SEARCHES:
        found = search.minimise(
            lambda point: float((point[0] - 0.5) ** 2), [lower], lower, upper, torch.Generator().manual_seed(0)
        )
        assert float(found.point[1]) == 2.0
        assert float(found.point[0]) == pytest.approx(0.5, abs=0.05)


def test_searches_are_found_by_name():
    assert search_from("annealing") == Annealing()
    assert search_from(SEARCHES[0]) is SEARCHES[0]
    with pytest.raises(ConfigurationError, match="unknown optimizer 'genetics': did you mean 'genetic'"):
        search_from("genetics")
    with pytest.raises(ConfigurationError, match="CrossEntropy: population must be at least 2, but is 1"):
        CrossEntropy(population=1)
    with pytest.raises(ConfigurationError, match="generations must be at least 1"):
        ParticleSwarm(generations=0)
    assert issubclass(Genetic, Search)

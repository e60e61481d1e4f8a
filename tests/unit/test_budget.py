from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lightning_prune.budget import Limits, Scope, check_fraction, reachable, select
from lightning_prune.errors import BudgetError, ConfigurationError, PruneError


def channels(widths: Mapping[str, int]) -> float:
    return sum(widths.values())


def chain(widths: Mapping[str, int]) -> float:
    """Parameters of 3 -> a -> b -> 10 without biases."""
    return 3 * widths["a"] + widths["a"] * widths["b"] + widths["b"] * 10


def kept(masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: mask.nonzero().flatten().tolist() for name, mask in masks.items()}


SCORES = {"a": torch.tensor([5.0, 1.0, 3.0, 9.0]), "b": torch.tensor([2.0, 4.0, 8.0, 7.0])}
SIZE = {"a": 4, "b": 4}


def test_global_scope_removes_the_lowest_of_all() -> None:
    masks = select(SCORES, widths=SIZE, original=SIZE, cost=channels, allowed=5)
    assert kept(masks) == {"a": [0, 3], "b": [1, 2, 3]}


def test_group_scope_removes_equal_shares() -> None:
    scores = {"a": torch.arange(10.0), "b": torch.arange(100.0, 104.0)}
    size = {"a": 10, "b": 4}
    masks = select(scores, widths=size, original=size, cost=channels, allowed=7, scope="group")
    assert kept(masks) == {"a": [5, 6, 7, 8, 9], "b": [2, 3]}


def test_group_scope_counts_what_went_before() -> None:
    # a has lost half already, so only b may lose until it has lost half too.
    scores = {"a": torch.arange(5.0), "b": torch.arange(10.0)}
    masks = select(
        scores,
        widths={"a": 5, "b": 10},
        original={"a": 10, "b": 10},
        cost=channels,
        allowed=10,
        scope="group",
    )
    assert kept(masks) == {"a": [0, 1, 2, 3, 4], "b": [5, 6, 7, 8, 9]}


def test_isomorphic_scope_ranks_only_within_a_pattern() -> None:
    # Shares of the first pattern: 1/12, 3/12, ... in the order of a then b; of the second: 1/8, 3/8, ...
    scores = {"a": torch.arange(3.0), "b": torch.arange(3.0) + 10, "c": torch.arange(4.0) - 100}
    size = {"a": 3, "b": 3, "c": 4}
    chosen = select(
        scores,
        widths=size,
        original=size,
        cost=channels,
        allowed=7,
        scope="isomorphic",
        patterns={"a": "conv", "b": "conv", "c": "linear"},
    )
    assert kept(chosen) == {"a": [2], "b": [0, 1, 2], "c": [1, 2, 3]}


def test_narrow_groups_lose_the_nearest_number_of_units() -> None:
    size = {"wide": 100, "narrow": 3}
    scores = {name: torch.arange(float(width)) for name, width in size.items()}
    masks = select(scores, widths=size, original=size, cost=channels, allowed=82, scope="group")
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"wide": 80, "narrow": 2}


def test_a_group_without_pattern_competes_with_none() -> None:
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    size = {"a": 2, "b": 2}
    masks = select(
        scores,
        widths=size,
        original=size,
        cost=channels,
        allowed=2,
        scope="isomorphic",
        patterns={"a": None, "b": None},
    )
    assert kept(masks) == {"a": [1], "b": [1]}


def test_ties_go_by_group_then_unit() -> None:
    scores = {"b": torch.zeros(3), "a": torch.zeros(3)}
    size = {"a": 3, "b": 3}
    masks = select(scores, widths=size, original=size, cost=channels, allowed=3)
    assert kept(masks) == {"b": [2], "a": [1, 2]}
    masks = select(scores, widths=size, original=size, cost=channels, allowed=5)
    assert kept(masks) == {"b": [1, 2], "a": [0, 1, 2]}


@pytest.mark.parametrize(("allowed", "width"), [(10.0, 10), (9.4, 9), (9.6, 10), (9.5, 9), (9.0, 9)])
def test_the_nearest_cost_wins_and_a_tie_goes_to_the_smaller_network(allowed: float, width: int) -> None:
    size = {"a": 10}
    masks = select({"a": torch.arange(10.0)}, widths=size, original=size, cost=channels, allowed=allowed)
    assert int(masks["a"].sum()) == width


def test_rounding_of_the_allowed_cost_does_not_cost_a_unit() -> None:
    allowed = 1000 * (1 - 0.9)
    assert allowed < 100
    size = {"a": 1000}
    masks = select(
        {"a": torch.rand(1000)},
        widths=size,
        original=size,
        cost=channels,
        allowed=allowed,
        limits=Limits(min_channels=100),
    )
    assert int(masks["a"].sum()) == 100


def test_a_budget_that_is_met_removes_nothing() -> None:
    masks = select(SCORES, widths=SIZE, original=SIZE, cost=channels, allowed=100)
    assert all(bool(mask.all()) for mask in masks.values())


@pytest.mark.parametrize(
    ("limits", "wanted", "present", "original", "width"),
    [
        (Limits(), 0, 5, 5, 1),
        (Limits(min_channels=3), 1, 5, 8, 3),
        (Limits(min_channels=3), 1, 2, 8, 2),
        (Limits(min_channels=0.3), 1, 10, 10, 3),
        (Limits(min_channels=0.07), 0, 100, 100, 7),
        (Limits(min_channels=0.25), 1, 6, 10, 3),
        (Limits(round_to=8), 17, 64, 64, 24),
        (Limits(round_to=8), 16, 64, 64, 16),
        (Limits(round_to=8), 3, 6, 64, 6),
        (Limits(round_to=8), 61, 62, 62, 62),
        (Limits(min_channels=9, round_to=8), 1, 64, 64, 16),
    ],
)
def test_limits(limits: Limits, wanted: int, present: int, original: int, width: int) -> None:
    assert limits.width(wanted, present, original) == width


@pytest.mark.parametrize("arguments", [{"min_channels": 0}, {"min_channels": 1.5}, {"min_channels": -0.5}])
def test_impossible_limits_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="min_channels"):
        Limits(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="round_to"):
        Limits(round_to=0)


def test_rounded_widths_remove_the_lowest_units() -> None:
    size = {"a": 16, "b": 16}
    draw = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(16, generator=draw) for name in size}
    masks = select(scores, widths=size, original=size, cost=channels, allowed=20, limits=Limits(round_to=4))
    assert sum(int(mask.sum()) for mask in masks.values()) == 20
    for name, mask in masks.items():
        assert int(mask.sum()) % 4 == 0
        assert scores[name][mask].min() >= scores[name][~mask].max()


def test_fixed_ratios_hold_whatever_the_budget() -> None:
    masks = select(SCORES, widths=SIZE, original=SIZE, cost=channels, allowed=4, ratios={"b": 0.25})
    assert kept(masks) == {"a": [3], "b": [1, 2, 3]}
    masks = select(SCORES, widths=SIZE, original=SIZE, cost=channels, allowed=100, ratios={"b": 0.5})
    assert kept(masks) == {"a": [0, 1, 2, 3], "b": [2, 3]}


def test_fixed_ratios_are_of_the_original_width() -> None:
    masks = select(
        {"a": torch.arange(6.0)}, widths={"a": 6}, original={"a": 10}, cost=channels, allowed=100, ratios={"a": 0.5}
    )
    assert kept(masks) == {"a": [1, 2, 3, 4, 5]}


def test_what_is_off_stays_off_and_its_score_is_not_looked_at() -> None:
    scores = {"a": torch.tensor([99.0, 1.0, math.nan, 3.0]), "b": SCORES["b"]}
    keep = {"a": torch.tensor([False, True, False, True])}
    masks = select(scores, widths=SIZE, original=SIZE, cost=channels, allowed=5, keep=keep)
    assert kept(masks) == {"a": [3], "b": [0, 1, 2, 3]}


def test_masking_and_shrinking_between_rounds_select_the_same() -> None:
    draw = torch.Generator().manual_seed(3)
    scores = {"a": torch.rand(12, generator=draw), "b": torch.rand(20, generator=draw)}
    size = {"a": 12, "b": 20}
    for scope in ("global", "group"):
        first = select(scores, widths=size, original=size, cost=chain, allowed=300, scope=scope)
        masked = select(scores, widths=size, original=size, cost=chain, allowed=150, scope=scope, keep=first)
        small = {name: score[first[name]] for name, score in scores.items()}
        shrunk = select(
            small,
            widths={name: len(score) for name, score in small.items()},
            original=size,
            cost=chain,
            allowed=150,
            scope=scope,
        )
        assert {name: mask[first[name]].tolist() for name, mask in masked.items()} == {
            name: mask.tolist() for name, mask in shrunk.items()
        }


def test_groups_without_scores_are_left_alone_but_cost() -> None:
    masks = select({"a": SCORES["a"]}, widths=SIZE, original=SIZE, cost=channels, allowed=6)
    assert kept(masks) == {"a": [0, 3]}


def test_no_group_loses_all_of_its_units_to_a_tie() -> None:
    size = {"a": 4, "b": 8}
    even = {name: torch.zeros(width) for name, width in size.items()}
    assert kept(select(even, widths=size, original=size, cost=channels, allowed=6)) == {"a": [2, 3], "b": [4, 5, 6, 7]}


def brute_force(scores: dict[str, Tensor], allowed: float, limits: Limits) -> dict[str, list[int]]:
    """Global selection the slow way: try every number of lowest units, keep the nearest that is no worse."""
    places = [sorted(range(len(s)), key=lambda u, s=s: (float(s[u]), u)) for s in scores.values()]
    units = sorted(
        (float(s[u]), place / len(s), i, u) for i, s in enumerate(scores.values()) for place, u in enumerate(places[i])
    )
    options = []
    for count in range(len(units) + 1):
        left = dict.fromkeys(scores, 0) | {name: len(score) for name, score in scores.items()}
        for _, _, group, _ in units[:count]:
            left[list(scores)[group]] -= 1
        options.append({n: limits.width(w, len(scores[n]), len(scores[n])) for n, w in left.items()})
    below = next(i for i, option in enumerate(options) if chain(option) <= allowed)
    candidates = options[max(below - 1, 0) : below + 1]
    best = min(reversed(candidates), key=lambda option: abs(chain(option) - allowed))
    return {n: sorted(s.argsort(stable=True)[len(s) - best[n] :].tolist()) for n, s in scores.items()}


def test_selection_agrees_with_brute_force() -> None:
    draw = random.Random(0)
    for _ in range(100):
        size = {"a": draw.randint(2, 12), "b": draw.randint(2, 12)}
        scores = {name: torch.tensor([float(draw.randint(0, 8)) for _ in range(n)]) for name, n in size.items()}
        limits = Limits(min_channels=draw.choice([1, 2, 0.25]), round_to=draw.choice([1, 1, 3]))
        least = reachable(size, widths=size, original=size, cost=chain, limits=limits)
        allowed = least + draw.random() * (chain(size) - least)
        masks = select(scores, widths=size, original=size, cost=chain, allowed=allowed, limits=limits)
        assert kept(masks) == brute_force(scores, allowed, limits)


def test_search_is_logarithmic_in_the_number_of_units() -> None:
    size = {f"g{i}": 256 for i in range(40)}
    calls = itertools.count()

    def counted(widths: Mapping[str, int]) -> float:
        next(calls)
        return channels(widths)

    scores = {name: torch.rand(256) for name in size}
    masks = select(scores, widths=size, original=size, cost=counted, allowed=5000)
    assert sum(int(mask.sum()) for mask in masks.values()) == 5000
    assert next(calls) <= 14


def test_an_unreachable_budget_says_how_much_is_reachable_and_why() -> None:
    size = {"a": 10, "b": 10, "stays": 20}
    scores = {"a": torch.rand(10), "b": torch.rand(10)}
    limits = Limits(min_channels=2, round_to=4)
    with pytest.raises(BudgetError) as caught:
        select(scores, widths=size, original=size, cost=channels, allowed=4, limits=limits, of="channels")
    message = str(caught.value)
    # 40 channels, of which 2 * 4 + 20 stay: 30 %; 2 * 2 + 20 without round_to, and min_channels alone changes nothing.
    assert "cannot remove 90.0 % of the channels: at most 30.0 % can be reached" in message
    assert "round_to=4 (40.0 % without it)" in message
    assert "min_channels" not in message
    assert "refused" in message


def test_what_the_message_calls_reachable_can_be_reached() -> None:
    size = {"a": 7, "b": 9}
    scores = {name: torch.rand(width) for name, width in size.items()}
    limits = Limits(min_channels=0.3)
    arguments = {"widths": size, "original": size, "cost": chain, "limits": limits}
    with pytest.raises(BudgetError) as caught:
        select(scores, allowed=1, **arguments)  # type: ignore[arg-type]
    found = re.search(r"at most ([\d.]+) %", str(caught.value))
    assert found is not None
    masks = select(scores, allowed=chain(size) * (1 - float(found[1]) / 100), **arguments)  # type: ignore[arg-type]
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 3, "b": 3}


def test_reachable_knows_limits_ratios_and_present_widths() -> None:
    size = {"a": 10, "b": 10, "c": 10}
    limits = Limits(min_channels=0.2)
    arguments = {"original": size, "cost": channels, "limits": limits}
    assert reachable(["a", "b"], widths=size, **arguments) == 2 + 2 + 10  # type: ignore[arg-type]
    assert reachable(["a", "b"], widths=size, ratios={"b": 0.5}, **arguments) == 2 + 5 + 10  # type: ignore[arg-type]
    assert reachable(["a"], widths={**size, "a": 1}, **arguments) == 1 + 10 + 10  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    scores = {"a": SCORES["a"], "layer3.conv": torch.tensor([1.0, bad, 2.0])}
    size = {"a": 4, "layer3.conv": 3}
    with pytest.raises(PruneError, match=r"1 of the 3 scores of channel group 'layer3\.conv' are NaN or infinite"):
        select(scores, widths=size, original=size, cost=channels, allowed=3)


def test_scores_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(PruneError, match=r"'a' has 4 units, but its scores have shape \[4, 2\]"):
        select({"a": torch.zeros(4, 2)}, widths=SIZE, original=SIZE, cost=channels, allowed=3)


def test_an_unknown_scope_gets_a_suggestion() -> None:
    scope: Scope = "globl"  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match="did you mean 'global'"):
        select(SCORES, widths=SIZE, original=SIZE, cost=channels, allowed=3, scope=scope)


@pytest.mark.parametrize("remove", [-0.1, 1.0, math.nan, 50])
def test_fractions_out_of_range_are_refused(remove: float) -> None:
    with pytest.raises(ConfigurationError, match=r"remove must be a fraction in \[0, 1\)"):
        check_fraction(remove)


def test_percentages_get_a_hint() -> None:
    with pytest.raises(ConfigurationError, match=r"Did you mean 0\.5\?"):
        check_fraction(50)
    assert check_fraction(0.0) == 0.0

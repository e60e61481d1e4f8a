from __future__ import annotations

import math
import re
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_prune.errors import BudgetError, ConfigurationError, PruneError
from lightning_prune.weight_budget import apportion, check_pattern, select_weights


def kept(masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: mask.flatten().nonzero().flatten().tolist() for name, mask in masks.items()}


def counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def rising(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.arange(float(math.prod(shape))).view(shape) for name, shape in shapes.items()}


SCORES = {"a": torch.tensor([[5.0, 1.0], [3.0, 9.0]]), "b": torch.tensor([2.0, 4.0, 8.0, 7.0])}


def test_global_scope_keeps_the_highest_of_all() -> None:
    masks = select_weights(SCORES, {}, remove=3 / 8)
    assert masks["a"].tolist() == [[True, False], [False, True]]
    assert masks["b"].tolist() == [False, True, True, True]


def test_the_floor_comes_before_the_global_order() -> None:
    scores = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([10.0, 11.0, 12.0, 13.0])}
    assert kept(select_weights(scores, {}, remove=0.5)) == {"a": [3], "b": [1, 2, 3]}
    assert kept(select_weights(scores, {}, remove=0.5, floor=2)) == {"a": [2, 3], "b": [2, 3]}
    assert kept(select_weights(scores, {}, remove=0.5, floor=0.26)) == {"a": [2, 3], "b": [2, 3]}
    assert kept(select_weights(scores, {}, remove=0.5, floor=0.25)) == {"a": [3], "b": [1, 2, 3]}


def test_a_floor_above_a_tensors_size_keeps_it_whole() -> None:
    masks = select_weights(rising(small=(1, 2), large=(10, 10)), {}, remove=0.9, floor=5)
    assert counts(masks) == {"small": 2, "large": 8}


def test_layer_scope_removes_the_same_fraction_by_largest_remainder() -> None:
    # Half of 7, 2 and 3 is 3.5, 1 and 1.5; of equal remainders the earlier tensor gets the more.
    masks = select_weights(rising(a=(7,), b=(2,), c=(3,)), {}, remove=0.5, scope="layer")
    assert kept(masks) == {"a": [3, 4, 5, 6], "b": [1], "c": [2]}
    # 70 % of 7, 2 and 3 is 4.9, 1.4 and 2.1, and of all 12 it is 8.
    masks = select_weights(rising(a=(7,), b=(2,), c=(3,)), {}, remove=0.3, scope="layer")
    assert counts(masks) == {"a": 5, "b": 1, "c": 2}


def test_layer_scope_looks_at_no_other_layer() -> None:
    scores = {"a": torch.tensor([0.001, 0.002]), "b": torch.tensor([1.0, 2.0])}
    assert kept(select_weights(scores, {}, remove=0.5, scope="layer")) == {"a": [1], "b": [1]}


def test_erk_densities() -> None:
    # Sums of sizes: 4 + 2 + 3 + 3 = 12 and 10 + 20 = 30. Of 272 weights 136 stay: 12 / 42 and 30 / 42 of them,
    # which is 38.86 and 97.14.
    masks = select_weights(rising(conv=(4, 2, 3, 3), fc=(10, 20)), {}, remove=0.5, scope="erk")
    assert counts(masks) == {"conv": 39, "fc": 97}
    assert kept(masks)["fc"] == list(range(103, 200))


def test_erk_keeps_small_tensors_whole_and_spreads_the_rest() -> None:
    # Of 106 weights 53 stay; a share of 5 / 25 would be 10.6, but "a" has 6.
    masks = select_weights(rising(a=(2, 3), b=(10, 10)), {}, remove=0.5, scope="erk")
    assert counts(masks) == {"a": 6, "b": 47}
    # Of 306 weights 153 stay; what "a" leaves, 147, goes 20 : 30, which is 58.8 and 88.2.
    masks = select_weights(rising(a=(2, 3), b=(10, 10), c=(10, 20)), {}, remove=0.5, scope="erk")
    assert counts(masks) == {"a": 6, "b": 59, "c": 88}


def test_what_is_off_stays_off_and_its_score_is_not_looked_at() -> None:
    scores = {"a": torch.tensor([[99.0, 1.0], [math.nan, 3.0]]), "b": SCORES["b"]}
    off = {"a": torch.tensor([[False, True], [False, True]])}
    assert kept(select_weights(scores, off, remove=3 / 8)) == {"a": [3], "b": [0, 1, 2, 3]}


def test_what_is_off_may_regrow() -> None:
    off = {"a": torch.tensor([[False, True], [True, False]]), "b": torch.ones(4, dtype=torch.bool)}
    assert kept(select_weights(SCORES, off, remove=0.5)) == {"a": [2], "b": [1, 2, 3]}
    assert kept(select_weights(SCORES, off, remove=0.5, regrow=True)) == {"a": [0, 3], "b": [2, 3]}


def test_a_budget_that_is_met_removes_nothing() -> None:
    off = {"a": torch.tensor([[False, False], [False, True]])}
    assert kept(select_weights(SCORES, off, remove=0.1)) == {"a": [3], "b": [0, 1, 2, 3]}
    assert all(bool(mask.all()) for mask in select_weights(SCORES, {}, remove=0.0).values())


def test_other_layers_take_over_what_a_sparse_layer_cannot_keep() -> None:
    off = {"a": torch.tensor([True] + [False] * 9)}
    masks = select_weights(rising(a=(10,), b=(10,)), off, remove=0.5, scope="layer")
    assert kept(masks) == {"a": [0], "b": [1, 2, 3, 4, 5, 6, 7, 8, 9]}


def test_ties_go_by_tensor_then_position() -> None:
    scores = {"b": torch.zeros(3), "a": torch.zeros(3)}
    assert kept(select_weights(scores, {}, remove=1 / 3, floor=0)) == {"b": [2], "a": [0, 1, 2]}
    assert kept(select_weights(scores, {}, remove=0.5, floor=0.3)) == {"b": [2], "a": [1, 2]}


def test_the_number_kept_is_free_of_rounding_errors() -> None:
    assert (1 - 0.9) * 1000 < 100
    assert counts(select_weights(rising(a=(1000,)), {}, remove=0.9)) == {"a": 100}


def test_an_emptied_tensor_is_named_with_what_can_be_reached() -> None:
    scores = {"low": torch.tensor([1.0, 2.0]), "layer3.conv": torch.arange(10.0, 18.0)}
    with pytest.raises(BudgetError) as caught:
        select_weights(scores, {}, remove=0.5, floor=0)
    # Only with all of the upper eight does the best of the lower two stay: nine of ten.
    assert str(caught.value) == (
        "removing 50.00 % of the weights would leave 'low' without any. With scope='global' at most 10.00 % can be "
        "reached, with floor=1 80.00 %. Lower remove, or set a floor."
    )
    assert kept(select_weights(scores, {}, remove=0.1, floor=0)) == {"low": [1], "layer3.conv": list(range(8))}
    assert counts(select_weights(scores, {}, remove=0.8, floor=1)) == {"low": 1, "layer3.conv": 1}


@pytest.mark.parametrize("scope", ["layer", "erk"])
def test_a_share_below_one_weight_is_refused_by_name(scope) -> None:
    scores = rising(tiny=(1, 2), large=(30, 30))
    with pytest.raises(BudgetError, match=r"'tiny' without any.*at most [\d.]+ % can be reached"):
        select_weights(scores, {}, remove=0.999, scope=scope, floor=0)
    assert counts(select_weights(scores, {}, remove=1 - 4 / 902, scope=scope, floor=1)) == {"tiny": 1, "large": 3}


def test_the_default_floor_keeps_one_weight_of_every_tensor() -> None:
    scores = {"tiny": torch.zeros(1, 3), "large": torch.rand(40, 50) + 1}
    assert counts(select_weights(scores, {}, remove=0.99)) == {"tiny": 1, "large": 19}


def test_floors_that_leave_too_much_are_refused_with_what_can_be_reached() -> None:
    scores = rising(a=(1, 10), layer3=(9, 10))
    with pytest.raises(BudgetError) as caught:
        select_weights(scores, {}, remove=0.9, floor=0.25)
    # A quarter of 10 and of 90, rounded up: 3 + 23.
    assert str(caught.value) == (
        "cannot remove 90.00 % of the 100 weights: a floor of 0.25 keeps 26 of them, 23 in 'layer3', so at most "
        "74.00 % can be reached. Lower remove or the floor."
    )
    assert counts(select_weights(scores, {}, remove=0.74, floor=0.25)) == {"a": 3, "layer3": 23}


def test_what_the_message_calls_reachable_can_be_reached() -> None:
    scores = {"a": torch.rand(3, 5), "b": torch.rand(7, 11) + 0.5, "c": torch.rand(13)}
    for floor in (0, 0.123):
        with pytest.raises(BudgetError) as caught:
            select_weights(scores, {}, remove=0.99, floor=floor)
        found = re.search(r"at most ([\d.]+) %", str(caught.value))
        assert found is not None
        select_weights(scores, {}, remove=float(found[1]) / 100, floor=floor)
    with pytest.raises(BudgetError, match=r"at most 66\.66 % can be reached"):
        select_weights(rising(a=(100_001,)), {}, remove=0.6667, floor=1 / 3)


def test_a_tensor_that_is_all_off_stays_so() -> None:
    off = {"a": torch.zeros(2, 2, dtype=torch.bool)}
    assert counts(select_weights(SCORES, off, remove=0.75)) == {"a": 0, "b": 2}


def test_no_weights_give_no_masks() -> None:
    assert select_weights({}, {}, remove=0.5) == {}
    assert select_weights({}, {}, remove=0.5, scope="erk") == {}


def test_a_pattern_keeps_the_best_of_every_group() -> None:
    weight = torch.tensor([[1.0, -2, 3, -4, 9, 8, 7, 6], [0, 0, 0, 0, 5, -6, 0.1, 0.2]])
    masks = select_weights({"fc": weight.abs()}, {}, remove=0.5, pattern=(2, 4))
    assert kept(masks)["fc"] == [2, 3, 4, 5, 10, 11, 12, 13]
    masks = select_weights({"fc": weight.abs()}, {}, remove=0.75, pattern=(1, 4))
    assert kept(masks)["fc"] == [3, 4, 11, 13]


def test_groups_of_a_convolution_are_input_channels_at_each_place_of_the_kernel() -> None:
    weight = torch.zeros(1, 4, 1, 2)
    weight[0, :, 0, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    weight[0, :, 0, 1] = torch.tensor([5.0, 6.0, 7.0, 8.0])
    mask = select_weights({"conv": weight}, {}, remove=0.5, pattern=(2, 4))["conv"]
    assert mask[0, :, 0, 0].tolist() == [True, True, False, False]
    assert mask[0, :, 0, 1].tolist() == [False, False, True, True]
    mask = select_weights({"conv": weight}, {}, remove=0.5, pattern=(1, 2))["conv"]
    assert mask[0, :, 0, 0].tolist() == [True, False, True, False]


def test_on_the_way_to_a_pattern_groups_differ_by_one_at_most() -> None:
    scores = {"fc": torch.tensor([[1.0, 2, 3, 4], [15, 16, 17, 18]])}
    # 1 - 3/8 leaves 5 weights, 2.5 per group: the third place goes to the better one, 16 against 2.
    assert kept(select_weights(scores, {}, remove=3 / 8, pattern=(2, 4))) == {"fc": [2, 3, 5, 6, 7]}
    assert kept(select_weights(scores, {}, remove=2 / 8, pattern=(2, 4))) == {"fc": [1, 2, 3, 5, 6, 7]}
    # 7 of 8: the fourth place goes to 15, whatever there is in the first group.
    assert kept(select_weights(scores, {}, remove=1 / 8, pattern=(2, 4))) == {"fc": [1, 2, 3, 4, 5, 6, 7]}


def test_a_pattern_ends_the_same_in_every_scope_and_on_thirds() -> None:
    scores = {"a": torch.rand(4, 6), "b": torch.rand(2, 3, 5)}
    for scope in ("global", "layer", "erk"):
        masks = select_weights(scores, {}, remove=2 / 3, scope=scope, pattern=(1, 3))
        assert all(bool((mask.movedim(1, -1).reshape(-1, 3).sum(1) == 1).all()) for mask in masks.values())


def test_a_group_with_nothing_left_does_not_let_others_exceed_the_pattern() -> None:
    remove = 1 - 1 / 9
    assert (1 - remove) * 9 > 1
    off = {"a": torch.tensor([[False] * 9 + [True] * 9])}
    assert kept(select_weights(rising(a=(1, 18)), off, remove, pattern=(1, 9))) == {"a": [17]}


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((3, 6), r"it has 6 inputs, no multiple of 4"),
        ((8, 3, 3, 3), r"it has 3 inputs, no multiple of 4"),
        ((8,), r"it has no inputs to divide"),
    ],
)
def test_a_shape_that_does_not_divide_is_refused_by_name(shape, why) -> None:
    scores = {"fits": torch.rand(4, 4), "layer3.weight": torch.rand(shape)}
    named = rf"'layer3\.weight' of shape {re.escape(str(list(shape)))} cannot take a 2:4 pattern: {why}\. Exclude it"
    with pytest.raises(ConfigurationError, match=named):
        select_weights(scores, {}, remove=0.5, pattern=(2, 4))


def test_a_pattern_says_what_it_removes() -> None:
    check_pattern((2, 4), remove=0.25)
    check_pattern(None, remove=0.9, final=True)
    check_pattern((1, 3), remove=2 / 3, final=True)
    with pytest.raises(ConfigurationError, match=r"a 2:4 pattern removes 0\.5 of the weights, but remove is 0\.9"):
        select_weights({"a": torch.rand(4, 4)}, {}, remove=0.9, pattern=(2, 4))
    with pytest.raises(ConfigurationError, match=r"but remove is 0\.25\. Set remove=0\.5"):
        check_pattern((2, 4), remove=0.25, final=True)


@pytest.mark.parametrize("pattern", [(4, 4), (0, 4), (4, 2), (2,), (1.0, 2), "2:4", 2])
def test_what_is_no_pattern_is_refused(pattern) -> None:
    with pytest.raises(ConfigurationError, match=r"pattern must be two whole numbers \(n, m\)"):
        check_pattern(pattern, remove=0.25)


def test_a_floor_above_the_pattern_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"floor of 0\.75 keeps 12 of the 16 weights of 'a', but a 2:4 pattern"):
        select_weights({"a": torch.rand(4, 4)}, {}, remove=0.5, pattern=(2, 4), floor=0.75)


@pytest.mark.parametrize("floor", [-0.1, 1.5, math.nan])
def test_what_is_no_floor_is_refused(floor) -> None:
    with pytest.raises(ConfigurationError, match="floor must be 0, a share in"):
        select_weights(SCORES, {}, remove=0.5, floor=floor)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    scores = {"a": SCORES["a"], "layer3.conv": torch.tensor([1.0, bad, 2.0])}
    with pytest.raises(PruneError, match=r"1 of the 3 scores of 'layer3\.conv' are NaN or infinite"):
        select_weights(scores, {}, remove=0.5)
    with pytest.raises(PruneError, match="NaN or infinite"):
        select_weights(scores, {"layer3.conv": torch.tensor([True, False, True])}, remove=0.5, regrow=True)


def test_scores_and_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PruneError, match=r"mask of 'b' must be bool of shape \[4\] like its scores, but"):
        select_weights(SCORES, {"b": torch.ones(2, 2, dtype=torch.bool)}, remove=0.5)
    with pytest.raises(PruneError, match=r"but is torch\.float32 of shape"):
        select_weights(SCORES, {"b": torch.ones(4)}, remove=0.5)
    with pytest.raises(PruneError, match=r"masks but no scores for c"):
        select_weights(SCORES, {"c": torch.ones(4, dtype=torch.bool)}, remove=0.5)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'global'"):
        select_weights(SCORES, {}, remove=0.5, scope="globl")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"Did you mean 0\.5\?"):
        select_weights(SCORES, {}, remove=50)


def test_nothing_given_is_changed() -> None:
    scores = {name: score.clone().requires_grad_() for name, score in SCORES.items()}
    off = {"a": torch.tensor([[False, True], [True, True]])}
    masks = select_weights(scores, off, remove=0.5)
    masks["a"].fill_(True)
    assert all(torch.equal(scores[name], SCORES[name]) for name in SCORES)
    assert off["a"].tolist() == [[False, True], [True, True]]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_apportioned_numbers_are_clamped_shares_up_to_one(data) -> None:
    shares = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    bounds = []
    for _ in shares:
        low = data.draw(st.integers(0, 20))
        bounds.append((low, low + data.draw(st.integers(0, 20))))
    target = data.draw(st.integers(sum(low for low, _ in bounds), sum(high for _, high in bounds)))
    result = apportion(target, shares, bounds)
    assert sum(result) == target
    assert all(low <= value <= high for value, (low, high) in zip(result, bounds, strict=True))

    def at(level: float) -> list[float]:
        return [min(max(level * share, low), high) for share, (low, high) in zip(shares, bounds, strict=True)]

    lower, upper = 0.0, 50.0
    for _ in range(60):
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if sum(at(middle)) < target else (lower, middle)
    assert all(abs(value - exact) < 1 + 1e-6 for value, exact in zip(result, at(upper), strict=True))


SHAPES = st.lists(st.sampled_from([(1,), (4,), (3, 4), (2, 3, 2, 2), (8, 8), (5, 12)]), min_size=1, max_size=4)
SCOPES = st.sampled_from(["global", "layer", "erk"])


def drawn(data, shapes, share_off=0.3):
    """Scores with many ties and zeros, and masks with some weights off, from one drawn seed."""
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    levels = data.draw(st.sampled_from([1, 4, 10**6]))
    scores = {f"t{i}": torch.randint(levels, s, generator=draw).float() for i, s in enumerate(shapes)}
    keep = {name: torch.rand(score.shape, generator=draw) >= share_off for name, score in scores.items()}
    return scores, keep


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_the_count_is_exact_nothing_revives_and_floors_hold(data) -> None:
    scores, keep = drawn(data, data.draw(SHAPES))
    regrow = data.draw(st.booleans())
    floor = data.draw(st.sampled_from([1, 3, 0.001, 0.2]))
    remove = data.draw(st.floats(0, 0.99))
    alive = {name: torch.ones_like(mask) if regrow else mask for name, mask in keep.items()}
    least = {
        name: min(math.ceil(floor * mask.numel()) if floor < 1 else floor, int(mask.sum()))
        for name, mask in alive.items()
    }
    total = sum(score.numel() for score in scores.values())
    target = min(round((1 - remove) * total), sum(counts(alive).values()))
    arguments = {"scope": data.draw(SCOPES), "floor": floor, "regrow": regrow}
    if target < sum(least.values()):
        with pytest.raises(BudgetError, match="can be reached"):
            select_weights(scores, keep, remove, **arguments)
        return
    masks = select_weights(scores, keep, remove, **arguments)
    assert sum(counts(masks).values()) == target
    for name, mask in masks.items():
        assert not (mask & ~alive[name]).any()
        assert int(mask.sum()) >= least[name]
        gone = alive[name] & ~mask
        if gone.any() and mask.any():
            assert scores[name][gone].max() <= scores[name][mask].min()


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_global_scope_agrees_with_sorting_everything(data) -> None:
    scores, keep = drawn(data, data.draw(SHAPES))
    order = sorted(
        (float(value), i, position)
        for i, (name, score) in enumerate(scores.items())
        for position, value in enumerate(score.flatten())
        if keep[name].flatten()[position]
    )
    total = sum(score.numel() for score in scores.values())
    target = data.draw(st.integers(0, len(order)))
    winners = order[len(order) - target :]
    expected = {name: sorted(p for _, i, p in winners if i == n) for n, name in enumerate(scores)}
    remove = 1 - target / total
    if target == 0 or any(not units and keep[name].any() for name, units in expected.items()):
        with pytest.raises((BudgetError, ConfigurationError)):
            select_weights(scores, keep, remove, floor=0)
    else:
        assert kept(select_weights(scores, keep, remove, floor=0)) == expected


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_every_round_of_a_schedule_is_exact(data) -> None:
    """Round after round on new scores: nothing that went comes back, and still each round keeps the right number."""
    pattern = data.draw(st.sampled_from([None, (2, 4), (1, 4), (3, 4), (1, 2)]))
    shapes = data.draw(SHAPES) if pattern is None else [(3, 4), (2, 4, 2, 2), (8, 8)][: data.draw(st.integers(1, 3))]
    end = 0.8 if pattern is None else 1 - pattern[0] / pattern[1]
    scope = data.draw(SCOPES)
    keep: dict[str, Tensor] = {}
    for level in (0.2, 0.45, 0.7, 0.95, 1.0):
        scores, _ = drawn(data, shapes)
        total = sum(score.numel() for score in scores.values())
        if pattern is None and round((1 - level * end) * total) < len(shapes):
            return
        masks = select_weights(scores, keep, level * end, scope=scope, pattern=pattern)
        assert sum(counts(masks).values()) == round((1 - level * end) * total)
        assert all(not (mask & ~keep.get(name, mask)).any() for name, mask in masks.items())
        if pattern is not None:
            inputs_last = [mask.movedim(1, -1).reshape(-1, pattern[1]) for mask in masks.values()]
            per_group = torch.cat([group.sum(1) for group in inputs_last])
            exact = (1 - level * end) * pattern[1]
            assert math.floor(exact + 1e-6) <= int(per_group.min())
            assert int(per_group.max()) <= max(math.ceil(exact - 1e-6), pattern[0])
        keep = masks

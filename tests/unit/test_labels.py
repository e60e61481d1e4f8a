from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.graph.labels import (
    SOLID,
    LabelSpace,
    Plane,
    align,
    compact,
    components,
    reshape_ids,
    settle,
    user_line,
    varying,
)


def united(space: LabelSpace) -> list[int]:
    return components(space.count, space.edges).tolist()


def test_fresh_labels_number_every_dimension_that_can_be_cut() -> None:
    space = LabelSpace()
    rows, columns = space.fresh((2, 1, 3))
    assert rows.ids.shape == (2, 1, 1)
    assert rows.ids.flatten().tolist() == [1, 2]
    assert columns.ids.shape == (1, 1, 3)
    assert columns.ids.flatten().tolist() == [3, 4, 5]
    assert space.count == 6
    assert space.fresh(()) == ()
    assert SOLID not in [*rows.ids.flatten().tolist(), *columns.ids.flatten().tolist()]


def test_compact_drops_dimensions_along_which_nothing_varies() -> None:
    ids = torch.tensor([[1, 2], [1, 2], [1, 2]])
    assert compact(ids).tolist() == [[1, 2]]
    assert compact(ids.T).tolist() == [[1], [2]]
    assert compact(torch.full((2, 3), 7)).tolist() == [[7]]
    mixed = torch.tensor([[1, 2], [3, 4]])
    assert compact(mixed) is mixed
    assert varying(mixed) == (0, 1)
    assert varying(compact(ids)) == (1,)


def test_align_puts_new_dimensions_in_front() -> None:
    plane = align(Plane(torch.tensor([1, 2]), True), 3)
    assert plane.ids.shape == (1, 1, 2)
    assert plane.dims == (2,)


def test_unions_are_solved_to_the_smallest_label_of_each_component() -> None:
    space = LabelSpace()
    space.fresh((8,))
    space.unite(torch.tensor([8, 5, 3]), torch.tensor([5, 2, 7]))
    assert united(space) == [0, 1, 2, 3, 4, 2, 6, 3, 2]
    space.unite(torch.tensor([[2]]), torch.tensor([[7, 4]]))  # broadcast
    assert united(space) == [0, 1, 2, 2, 2, 2, 6, 2, 2]


@given(st.integers(1, 40).flatmap(lambda n: st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)))))
@settings(max_examples=60, deadline=None)
def test_components_agree_with_a_plain_search(pairs) -> None:
    count = 1 + max((max(pair) for pair in pairs), default=0)
    expected = list(range(count))
    for _ in range(count):
        for a, b in pairs:
            expected[a] = expected[b] = min(expected[a], expected[b])
    edges = [(torch.tensor([a]), torch.tensor([b])) for a, b in pairs]
    assert components(count, edges).tolist() == expected


def test_tie_unites_along_some_dimensions() -> None:
    space = LabelSpace()
    space.fresh((6,))
    tied = space.tie(torch.tensor([[1, 2, 3], [4, 5, 6]]), (0,))
    assert tied.tolist() == [[1, 2, 3]]
    assert united(space) == [0, 1, 2, 3, 1, 2, 3]


def test_settle_ties_what_varies_elsewhere_and_freezes_what_does_not() -> None:
    space = LabelSpace()
    space.fresh((7,))
    inside, block, outside = (
        Plane(torch.tensor([[1, 2]]), True),
        Plane(torch.tensor([[3, 4], [5, 6]]), False),
        Plane(torch.tensor([[7], [1]]), True),
    )
    settled = settle(space, (inside, block, outside), (1,), "mixed")
    assert [plane.ids.tolist() for plane in settled] == [[[3], [5]], [[7], [1]]]
    assert [plane.zero for plane in settled] == [False, True]
    assert united(space) == [0, 1, 2, 3, 3, 5, 5, 7]
    assert space.frozen[-1].ids.tolist() == [1, 2]
    assert space.frozen[-1].reason.startswith("mixed (test_labels.py:")


def test_a_freeze_without_reason_is_not_told() -> None:
    space = LabelSpace()
    space.freeze(torch.tensor([0]), None)
    assert space.frozen[-1].reason is None


def test_only_blocks_that_can_become_ragged_are_kept_dense() -> None:
    space = LabelSpace()
    space.keep_dense(torch.tensor([[1, 2, 3]]))
    assert space.blocks == []
    space.keep_dense(torch.tensor([[1, 2], [3, 4]]))
    assert len(space.blocks) == 1


def test_what_was_learnt_since_a_snapshot_is_forgotten() -> None:
    def learn(space, ids):
        space.unite(ids, ids.flip(0), static=True)
        space.freeze(ids, "reason")
        space.leave_out(ids)
        space.keep_dense(ids.view(2, 2))
        space.keep_number(ids.view(2, 2), 0)
        space.mark("mark", ids)
        space.choose_inner(ids)

    space = LabelSpace()
    first, second = (plane.ids.flatten() for plane in space.fresh((4, 4)))
    learn(space, first)
    forget = space.snapshot()
    learn(space, second)
    forget()
    lists = (space.edges, space.static_edges, space.left_out, space.blocks, space.pieces, space.marks["mark"])
    assert [len(found) for found in lists] == [1] * len(lists)
    assert [frozen.reason is None for frozen in space.frozen] == [True, False]
    assert space.prefers_inner(first)
    assert not space.prefers_inner(second)


def test_user_line_names_this_file() -> None:
    assert user_line().startswith("test_labels.py:")


RESHAPES = [
    ((2, 6), (12,)),
    ((2, 6), (2, 3, 2)),
    ((2, 6), (4, 3)),
    ((2, 3, 4), (6, 4)),
    ((2, 3, 4), (2, 12)),
    ((2, 3, 4), (4, 3, 2)),
    ((2, 1, 3), (1, 2, 3, 1)),
    ((1, 1), ()),
    ((), (1, 1)),
    ((2, 3, 1, 1), (2, 3)),
    ((2, 3), (2, 1, 3, 1)),
    ((1, 4, 1, 6), (4, 2, 3, 1)),
]


@pytest.mark.parametrize(("shape_in", "shape_out"), RESHAPES)
@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1), (2,), ()])
def test_reshape_moves_labels_like_elements(shape_in, shape_out, dims) -> None:
    ids = torch.arange(1, 1 + torch.Size(shape_in).numel()).reshape(shape_in)
    for dim in range(len(shape_in)):
        if dim not in dims:
            ids = ids.narrow(dim, 0, 1)
    moved = reshape_ids(ids, shape_in, shape_out)
    assert torch.equal(moved.expand(shape_out), ids.expand(shape_in).reshape(shape_out))
    assert torch.equal(compact(moved), moved)


def test_reshape_does_not_expand_what_does_not_mix() -> None:
    ids = torch.arange(6).reshape(1, 6, 1, 1)
    assert reshape_ids(ids, (64, 6, 100, 100), (64, 6, 10000)).shape == (1, 6, 1)
    assert reshape_ids(ids, (64, 6, 100, 100), (64, 2, 3, 10000)).shape == (1, 2, 3, 1)
    assert reshape_ids(ids, (64, 6, 100, 100), (64, 60000)).shape == (1, 60000)


@pytest.mark.parametrize(("shape_in", "shape_out"), [((0, 3), (3, 0)), ((0, 3), (0, 2)), ((0, 0, 3), (0, 4, 3))])
def test_a_reshape_of_nothing_may_leave_no_labels(shape_in, shape_out) -> None:
    ids = torch.arange(1, 4).reshape([1] * (len(shape_in) - 1) + [3])
    assert reshape_ids(ids, shape_in, shape_out).unique().tolist() == [0]


def test_a_reshape_beside_an_empty_dimension_keeps_labels() -> None:
    ids = torch.arange(1, 7).reshape(1, 6)
    assert reshape_ids(ids, (0, 6), (0, 1, 2, 3)).tolist() == [[[[1, 2, 3], [4, 5, 6]]]]
    assert reshape_ids(ids[:, None], (2, 0, 6), (2, 0, 3, 2)).tolist() == [[[[1, 2], [3, 4], [5, 6]]]]

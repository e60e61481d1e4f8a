from __future__ import annotations

import math
import pickle
import random

import pytest

from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import (
    Cosine,
    Cubic,
    Geometric,
    Linear,
    OneShot,
    Position,
    Schedule,
    schedule_from,
)

CURVES = [Linear, Cubic, Geometric, Cosine]


def at(value: float) -> Position:
    """The same number in all units, so that a test can use any."""
    return Position(epoch=value, step=value, fraction=value)


def length(epochs: float = 10, steps: float = 1000) -> Position:
    return Position(epoch=epochs, step=steps, fraction=1.0)


@pytest.mark.parametrize(
    ("start", "end", "interval", "expected"),
    [
        (1, 3, 1, [1, 2, 3]),
        (1, 4, 2, [1, 3, 4]),
        (0, 29, 0.29, [i * 0.29 for i in range(101)]),
        (2, 2, 1, [2]),
        (0, 0.5, 10, [0, 0.5]),
        (0.1, 0.6, 0.1, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        (0.0, 0.3, 0.1, [0.0, 0.1, 0.2, 0.3]),
    ],
)
def test_end_is_always_the_last_round(start: float, end: float, interval: float, expected: list[float]) -> None:
    rounds = Linear(start, end, interval, "epoch").rounds()
    assert rounds == pytest.approx(expected)
    assert rounds[-1] == end


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Hand-computed for x = 1/4, 2/4, 3/4, 1 and remove = 0.75.
        (Linear, [0.25, 0.5, 0.75, 1.0]),
        (Cubic, [1 - 27 / 64, 1 - 1 / 8, 1 - 1 / 64, 1.0]),
        (Geometric, [(1 - math.sqrt(0.5)) / 0.75, 0.5 / 0.75, (1 - 0.5**1.5) / 0.75, 1.0]),
        (Cosine, [(1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2, 1.0]),
    ],
)
def test_curves(schedule: type[Schedule], expected: list[float]) -> None:
    built = schedule(start=2, end=5, interval=1, unit="epoch")
    assert [built.level(at(epoch), remove=0.75) for epoch in (2, 3, 4, 5)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", CURVES)
def test_level_waits_between_rounds_and_never_falls(schedule: type[Schedule]) -> None:
    built = schedule(start=1, end=3, interval=1, unit="epoch")
    levels = [built.level(at(i / 100), remove=0.6) for i in range(500)]
    assert levels == sorted(levels)
    assert levels[:100] == [0.0] * 100
    assert len(set(levels)) == 4
    assert levels[100] == levels[199] < levels[200]
    assert set(levels[300:]) == {1.0}


@pytest.mark.parametrize("unit", ["epoch", "step", "fraction"])
def test_each_unit_reads_its_own_field(unit: str) -> None:
    due = {"epoch": 0.0, "step": 0.0, "fraction": 0.0, unit: 1.0}
    built = OneShot(at=1, unit=unit)  # type: ignore[arg-type]
    assert built.level(Position(**due), remove=0.5) == 1.0
    assert built.level(Position(**{name: 1.0 - value for name, value in due.items()}), remove=0.5) == 0.0


def test_a_point_reached_by_inexact_sums_counts() -> None:
    thirds = sum([0.1] * 3)
    assert thirds != 0.3
    schedule = Linear(start=0.1, end=0.5, interval=0.1)
    assert schedule.level(at(thirds - 1e-15), remove=0.5) == pytest.approx(3 / 5)
    assert Linear(1, 3, 1, "epoch").level(at(3 - 1e-12), remove=0.5) == 1.0
    assert Linear(1, 3, 1, "epoch").level(at(3 - 1e-3), remove=0.5) == pytest.approx(2 / 3)


def test_levels_agree_with_the_list_of_rounds_on_random_grids() -> None:
    draw = random.Random(0)
    for _ in range(300):
        start = draw.choice([0.0, 0.1, 1.0, 7.0, draw.random() * 100])
        interval = draw.choice([0.1, 0.3, 1.0, 25.0, 0.01 + draw.random() * 10])
        end = start + draw.choice([0.0, interval * 3, interval * 3.5, draw.random() * 100])
        schedule = Linear(start, end, interval, "step")
        rounds = schedule.rounds()
        assert rounds[0] == start
        assert rounds[-1] == end
        assert rounds == sorted(set(rounds))
        for i, point in enumerate(rounds):
            assert schedule.level(at(point), remove=0.5) == pytest.approx((i + 1) / len(rounds))
            assert schedule.level(at(point - 1e-6), remove=0.5) == pytest.approx(i / len(rounds))


def test_nothing_to_remove_divides_by_nothing() -> None:
    assert Geometric(1, 3, 1, "epoch").level(at(1), remove=0.0) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"interval": 0}, "interval"),
        ({"interval": math.nan}, "interval"),
        ({"start": -0.1}, "start is -0.1"),
        ({"start": 0.7, "end": 0.6}, "start <= end"),
        ({"end": 5}, "lies between 0 and 1"),
        ({"end": math.inf, "unit": "epoch"}, "end is inf"),
        ({"unit": "epochs"}, "did you mean 'epoch'"),
    ],
)
def test_impossible_grids_are_refused(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        Cubic(**arguments)  # type: ignore[arg-type]


def test_a_schedule_that_can_never_fire_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"can never fire.*epoch 10.*10 epochs \(1000 optimizer steps\)"):
        Linear(10, 20, 5, "epoch").check(length())
    with pytest.raises(ConfigurationError, match="can never fire"):
        OneShot(1000, "step").check(length())
    with pytest.raises(ConfigurationError, match=r'can never fire.*unit="epoch"\?'):
        OneShot(1).check(length())
    with pytest.raises(ConfigurationError, match=r"ends after 10 epochs\. Train"):
        OneShot(10, "epoch").check(Position(epoch=10, step=math.inf, fraction=1.0))
    with pytest.raises(ConfigurationError, match=r"ends after 50 steps\. Train"):
        OneShot(50, "step").check(Position(epoch=math.inf, step=50, fraction=1.0))


def test_a_schedule_that_is_cut_off_is_told() -> None:
    told = Linear(5, 20, 5, "epoch").check(length(epochs=15))
    assert told is not None
    assert "2 of its 4 rounds" in told


def test_a_schedule_that_fits_passes_silently() -> None:
    assert Linear(5, 9, 2, "epoch").check(length()) is None
    assert OneShot(999, "step").check(length()) is None
    assert Cubic().check(length()) is None


def test_a_fit_without_end_takes_epochs_but_no_fractions() -> None:
    endless = Position(epoch=math.inf, step=math.inf, fraction=1.0)
    assert Linear(5, 9, 2, "epoch").check(endless) is None
    with pytest.raises(ConfigurationError, match="no set end"):
        Cubic().check(endless)
    assert Cubic().check(Position(epoch=math.inf, step=100, fraction=1.0)) is None


def test_names() -> None:
    assert schedule_from("cubic") == Cubic(start=0.1, end=0.6, interval=0.1, unit="fraction")
    assert schedule_from("one_shot").rounds() == [0.3]
    own = Linear(1, 2, 1, "epoch")
    assert schedule_from(own) is own
    with pytest.raises(ConfigurationError, match="did you mean 'cosine'"):
        schedule_from("cosin")  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", [OneShot(3, "epoch"), Cubic(1, 2, 0.5, "epoch")])
def test_schedules_survive_pickling(schedule: Schedule) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == schedule

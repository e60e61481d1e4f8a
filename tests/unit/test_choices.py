from __future__ import annotations

from lightning_prune.choices import unknown_name


def test_a_near_miss_gets_a_suggestion() -> None:
    assert "did you mean 'fpgm'?" in str(unknown_name("criterion", "FPMG", ["l1", "fpgm", "taylor"]))


def test_a_far_miss_gets_the_list_only() -> None:
    message = str(unknown_name("criterion", "zzzzzz", ["l1", "fpgm"]))
    assert "did you mean" not in message
    assert "'l1', 'fpgm'" in message

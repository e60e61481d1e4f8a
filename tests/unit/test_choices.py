from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_prune import ChannelPruning, Magnitude, Norm, OneShot, Random, WeightPruning
from lightning_prune.choices import check_at_least, unknown_name
from lightning_prune.errors import ConfigurationError


def test_a_near_miss_gets_a_suggestion() -> None:
    assert "did you mean 'fpgm'?" in str(unknown_name("criterion", "FPMG", ["l1", "fpgm", "taylor"]))


def test_criteria_of_weights_and_of_channels_are_told_apart():
    with pytest.raises(ConfigurationError, match=r"unknown criterion of channels: Magnitude is none. Give a Crit"):
        ChannelPruning(Magnitude())
    with pytest.raises(ConfigurationError, match="unknown criterion of channels 'lamp'"):
        ChannelPruning("lamp")
    with pytest.raises(ConfigurationError, match="unknown criterion of weights 'l2': did you mean 'magnitude'"):
        WeightPruning("l2")
    with pytest.raises(ConfigurationError, match=r"unknown criterion of weights: Norm is none. Give a WeightCrit"):
        WeightPruning(Norm())


def test_a_far_miss_gets_the_list_only() -> None:
    message = str(unknown_name("criterion", "zzzzzz", ["l1", "fpgm"]))
    assert "did you mean" not in message
    assert "'l1', 'fpgm'" in message


def test_what_others_call_the_same_is_suggested() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'macs'"):
        ChannelPruning(of="flops")
    with pytest.raises(ConfigurationError, match="did you mean 'l2'"):
        ChannelPruning("magnitude")
    assert "did you mean 'magnitude'" in str(unknown_name("criterion", "magnitud", ["l2", "magnitude"]))


def test_a_class_in_place_of_an_instance_is_told_apart() -> None:
    with pytest.raises(ConfigurationError, match=r"is the class Random: give an instance, such as Random\(\)"):
        ChannelPruning(Random)
    with pytest.raises(ConfigurationError, match=r"the schedule is the class OneShot: .* such as OneShot\(\)"):
        ChannelPruning(schedule=OneShot)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ({}, "3", "size must be a finite number of at least 2, but is '3'"),
        ({}, math.nan, "size must be a finite number of at least 2, but is nan"),
        ({}, math.inf, "but is inf"),
        ({}, True, "but is True"),
        ({}, None, "but is None"),
        ({"whole": True}, 2.0, "size must be a whole number of at least 2, but is 2.0"),
        ({"whole": True, "optional": True}, 1, "but is 1"),
    ],
)
def test_what_is_no_such_number_is_refused(kind, value, message):
    with pytest.raises(ConfigurationError, match=message):
        check_at_least(2, **kind, size=value)


def test_such_numbers_are_let_by():
    check_at_least(2, size=2, other=np.float32(2.5))
    check_at_least(2, whole=True, optional=True, size=np.int64(2), other=None)


def test_a_number_in_place_of_a_name_belongs_elsewhere() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown criterion of channels 0\.5: .* as in remove=0\.5"):
        ChannelPruning(0.5)

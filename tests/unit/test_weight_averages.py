"""Averages of the weights that other callbacks hold are pruned along; other copies of the network are not."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

from tests.fits import equal, fit, images, loader, pruning, small_net, trainer, widths

SAMPLES = images(seed=5).tensors[0]
HALF = [6, 12, 12]


def halving(**arguments):
    return pruning(scope="group", **arguments)


AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "mean": lambda: WeightAveraging(),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1),
}


@pytest.mark.parametrize("first", [True, False], ids=["average first", "pruning first"])
@pytest.mark.parametrize("shrink", ["rounds", "end", "never"])
@pytest.mark.parametrize("average", AVERAGES)
def test_averages_of_the_weights_are_pruned_along(average, shrink, first):
    callbacks = [AVERAGES[average](), halving(shrink=shrink)]
    module, _ = fit(*(callbacks if first else callbacks[::-1]), epochs=3)
    assert widths(module) == ([12, 24, 24] if shrink == "never" else HALF)
    assert torch.isfinite(module(SAMPLES)).all()
    if shrink == "never":
        assert int((module.net[9].weight == 0).all(dim=0).sum()) == 12


@pytest.mark.parametrize("first", [True, False], ids=["average first", "pruning first"])
def test_a_fit_with_averages_resumes_bit_identically(tmp_path, first):
    def train(module, **arguments):
        callbacks = [EMAWeightAveraging(decay=0.5), halving()]
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        used = trainer(*(callbacks if first else callbacks[::-1]), keep, enable_checkpointing=True)
        used.fit(module, loader(), **arguments)
        return module.state_dict()

    whole = train(small_net())
    for epoch in (0, 1):
        assert equal(train(small_net(seed=9), ckpt_path=tmp_path / f"epoch={epoch}.ckpt"), whole)


def test_a_teacher_of_the_same_class_is_left_alone():
    class Distillation(L.Callback):
        def __init__(self, teacher):
            self.teacher = teacher

    teacher = small_net(seed=3)
    before = copy.deepcopy(teacher.state_dict())
    fit(halving(), Distillation(teacher), epochs=2)
    assert equal(teacher.state_dict(), before)

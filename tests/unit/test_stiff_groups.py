"""Channels that turn out in the middle of training to be impossible to cut stay, and the fit goes on."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune import Linear
from tests.fits import BATCHES, Liveness, StiffNet, equal, fit, loader, pruning, trainer, widths


def stiff_net(epoch=1, seed=0):
    torch.manual_seed(seed)
    return StiffNet(epoch)


def test_other_channels_go_in_their_place():
    callback = pruning(criterion="random", remove=0.25)
    with pytest.warns(UserWarning, match=r"(?s)cutting net\.4 is not exact.*goes on with net\.4 as wide as it is"):
        module, _ = fit(callback, Liveness(), module=stiff_net())
    assert widths(module)[2] == 24
    report = callback.report
    assert report.reached >= 0.25
    assert report.after.channels == sum(widths(module))
    assert dict(report.refused)["net.4.weight (dim 0)"].startswith("zeros cannot follow a change of width")


def test_the_rest_goes_where_the_budget_is_out_of_reach_without_them():
    callback = pruning(scope="group", remove=0.75)
    with pytest.warns(UserWarning, match=r"with net\.4 as wide as it is this round misses its budget"):
        module, _ = fit(callback, module=stiff_net())
    assert widths(module) == [3, 6, 24]
    assert callback.report.reached == pytest.approx(27 / 60)


def test_later_rounds_and_a_resume_know_of_them(tmp_path):
    def callback():
        return pruning(criterion="l1", remove=0.4, schedule=Linear(1, 2, 0.5, "epoch"))

    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=BATCHES + 1, save_top_k=-1)
    with pytest.warns(UserWarning, match=r"goes on with net\.4"):
        whole, _ = fit(callback(), saving, module=stiff_net(), enable_checkpointing=True)
    resumed, again = stiff_net(seed=5), callback()
    trainer(again).fit(resumed, loader(), ckpt_path=tmp_path / f"step={BATCHES + 1}.ckpt")
    assert widths(resumed) == widths(whole)
    assert widths(whole)[2] == 24
    assert equal(resumed.state_dict(), whole.state_dict())
    assert len(again.report.history) == 3


def test_what_was_masked_stays_as_zeros_where_it_cannot_go_at_the_end():
    callback = pruning(scope="group", shrink="end")
    with pytest.warns(UserWarning, match=r"The masked channels of net\.4 stay, as zeros"):
        module, _ = fit(callback, module=stiff_net(epoch=2))
    assert widths(module) == [6, 12, 24]
    assert int((module.net[9].weight.abs().sum(0) == 0).sum()) == 12
    assert callback.report.after.channels == 6 + 12 + 24
    assert callback.report.reached == pytest.approx(18 / 60)

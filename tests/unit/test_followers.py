"""Copies that follow the network outside of the training step are not cut apart from it without a word."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.nn.functional import mse_loss

from lightning_prune import ChannelPruning, ConfigurationError, Linear, OneShot


class Twins(L.LightningModule):
    """An online network that learns to predict what a target network says, which follows it or does not."""

    def __init__(self, follows, runs=True, whole_optimizer=False):
        super().__init__()
        self.online = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.before = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
        self.follows, self.runs, self.whole_optimizer = follows, runs, whole_optimizer

    def training_step(self, batch, batch_idx):
        if self.follows == "in the step":
            self.update()
        goal = self.target(batch) if self.runs else batch[:, :3]
        return mse_loss(self.online(self.before(batch)), goal)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.follows == "in a hook" or (self.follows == "late" and self.global_step > 5):
            self.update()

    @torch.no_grad()
    def update(self):
        for mine, theirs in zip(self.target.parameters(), self.online.parameters(), strict=True):
            mine.data = 0.9 * mine.data + 0.1 * theirs.data

    def configure_optimizers(self):
        parts = self if self.whole_optimizer else nn.ModuleList([self.online, self.before])
        return torch.optim.SGD(parts.parameters(), lr=0.1)


def fit(module, tmp_path, *callbacks, **arguments):
    arguments = {"remove": 0.5, "of": "channels", "scope": "group", "schedule": OneShot(1, "epoch"), **arguments}
    callback = ChannelPruning(**arguments)
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_epochs=2, callbacks=[callback, *callbacks], accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    L.seed_everything(5)
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=8))
    return callback


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("whole_optimizer", [True, False])
def test_what_follows_in_a_hook_is_refused_before_anything_is_cut(runs, whole_optimizer, tmp_path):
    module = Twins("in a hook", runs, whole_optimizer)
    words = r"target\.0\.weight has moved .* follow online\.0\.weight .*WeightAveraging.*exclude online\.0\.weight"
    with pytest.raises(ConfigurationError, match=words):
        fit(module, tmp_path)
    assert module.online[0].out_features == module.target[0].out_features == 12


def test_what_follows_in_the_step_is_cut_alike(tmp_path):
    module = Twins("in the step")
    before = module.target[0].weight.detach().clone()
    fit(module, tmp_path)
    assert module.online[0].out_features == module.target[0].out_features == 6
    assert not torch.equal(before[:6], module.target[0].weight)


def test_what_does_not_move_follows_nothing(tmp_path):
    module = Twins("nothing")
    fit(module, tmp_path, exclude="target*")
    assert (module.online[0].out_features, module.target[0].out_features) == (6, 12)


def test_what_was_cut_has_not_moved_by_that(tmp_path):
    module = Twins("nothing")
    callback = fit(module, tmp_path, schedule=Linear(1, 7, 2, "step"))
    assert len(callback.report.history) == 4
    assert (module.online[0].out_features, module.target[0].out_features) == (6, 6)


def test_where_nothing_of_both_goes_nothing_is_refused(tmp_path):
    module = Twins("in a hook")
    callback = fit(module, tmp_path, include="before.0")
    assert (module.online[0].out_features, module.before[0].out_features) == (12, 4)
    assert callback.report.reached == 0.5


def test_masks_that_end_in_a_cut_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"target\.0\.weight seems to follow online\.0\.weight in a hook"):
        fit(Twins("in a hook", runs=False), tmp_path, shrink="end")


@pytest.mark.parametrize("follows", ["late", "nothing"])
def test_what_begins_to_follow_after_the_cut_is_told(follows, tmp_path, recwarn):
    fit(Twins(follows), tmp_path, include=["online*", "target*"])
    told = [str(warning.message) for warning in recwarn if "are mixed" in str(warning.message)]
    assert len(told) == (follows == "late")
    assert all("target.0.weight has moved" in message and "online.0.weight" in message for message in told)


def test_what_begins_to_follow_and_was_cut_alike_is_not_told(tmp_path, recwarn):
    module = Twins("late")
    fit(module, tmp_path, include="before.0")
    assert module.before[0].out_features == 4
    assert not any("are mixed" in str(warning.message) for warning in recwarn)


class Backbone(Twins):
    """A part that is frozen at first and trained later, beside one of the same shape."""

    def __init__(self):
        super().__init__("nothing")
        self.backbone = self.target

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_what_is_unfrozen_follows_nothing(tmp_path):
    module = Backbone()
    del module.target
    module.target = module.backbone.requires_grad_(True)
    unfreeze = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.1)
    fit(module, tmp_path, unfreeze, schedule=OneShot(6, "step"))
    assert module.backbone[0].out_features == 6

"""Pruning beside everything else that a Trainer can do."""

from __future__ import annotations

import copy
import io
import logging
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import Linear, OneShot, load_pruned
from tests.fits import BATCHES, Liveness, SmallNet, equal, fit, images, loader, pruning, small_net, trainer, widths
from tests.helpers import run

SAMPLES = images(seed=5).tensors[0]
HALF = [6, 12, 12]


def halving(**arguments):
    return pruning(**{"scope": "group", **arguments})


class Stream(IterableDataset):
    """The images again, with no length and no way to look at them twice without moving on."""

    def __init__(self):
        self.started = 0

    def __iter__(self):
        self.started += 1
        return iter(images())


def stream():
    return DataLoader(Stream(), batch_size=8)


def test_a_second_fit_goes_on_where_the_first_one_ended():
    callback = halving()
    module, _ = fit(callback, epochs=2)
    _, second = fit(callback, module=module, epochs=2)
    assert second.global_step == 2 * BATCHES
    assert widths(module) == HALF
    assert [group.before for group in callback.report.groups] == [12, 24, 24]
    assert len(callback.report.history) == 1


def test_a_second_fit_may_be_shorter_than_the_schedule_that_is_done():
    callback = halving(schedule=OneShot(2, "epoch"))
    module, _ = fit(callback, epochs=3)
    fit(callback, module=module, epochs=1)
    assert widths(module) == HALF


def test_the_same_callback_prunes_another_module_afresh():
    callback = halving()
    fit(callback, epochs=2)
    other, _ = fit(callback, module=small_net(seed=4), epochs=2)
    assert widths(other) == HALF
    assert len(callback.report.history) == 1


def test_a_new_callback_prunes_a_pruned_module_again():
    module, _ = fit(halving(), epochs=2)
    fit(halving(), module=module, epochs=2)
    assert widths(module) == [3, 6, 6]


def test_fast_dev_run_prunes_and_writes_nothing(tmp_path):
    module, _ = fit(halving(schedule="cubic", directory=str(tmp_path / "files")), fast_dev_run=True)
    assert widths(module) == HALF
    assert list(tmp_path.iterdir()) == []


def test_barebones_trains_and_logs_nothing():
    class Quiet(SmallNet):
        def log(self, name, *args, **kwargs):
            raise AssertionError(name)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    bare = {"logger": None, "enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None}
    module, _ = fit(halving(), module=Quiet(), epochs=2, barebones=True, num_sanity_val_steps=None, **bare)
    assert widths(module) == HALF


def test_sanity_checking_changes_nothing():
    def train(sanity):
        module = small_net()
        trainer(halving(), epochs=2, num_sanity_val_steps=sanity).fit(module, loader(), loader(2, seed=7))
        return module.state_dict()

    assert equal(train(2), train(0))


def test_a_shrink_amid_gradient_accumulation_cuts_the_gradients_gathered_so_far():
    seen = {}

    class Before(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                seen["strong"] = pl_module.net[4].weight.detach().abs().sum((1, 2, 3)).topk(12).indices.sort().values
                seen["before"] = pl_module.net[4].weight.grad.clone()

    class After(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                seen["after"] = pl_module.net[4].weight.grad.clone()

    callback = pruning(include=["net.4"], schedule=OneShot(0.5, "epoch"))
    module, used = fit(Before(), callback, After(), epochs=1, accumulate_grad_batches=4)
    assert widths(module) == [12, 24, 12]
    assert used.global_step == 2
    assert torch.equal(seen["after"], seen["before"][seen["strong"]])


def test_accumulation_that_changes_over_epochs_leaves_the_schedule_where_it_is():
    callback = halving(schedule=OneShot(0.5, "fraction"))
    fit(callback, GradientAccumulationScheduler({0: 6, 2: 1}), epochs=4)
    assert [(event.epoch, event.step) for event in callback.report.history] == [(2, 2)]


def test_data_that_cannot_be_looked_at_twice_is_pruned_from_its_first_batch_on():
    data = stream()
    callback = halving(criterion="taylor", schedule=OneShot(0, "step"))
    module, used = fit(callback, Liveness(), data=data, epochs=2)
    assert widths(module) == HALF
    assert used.global_step == 2 * BATCHES
    assert data.dataset.started == 2
    assert callback.report.history[0].step == 0


def test_data_without_a_length_has_rounds_at_the_starts_of_epochs_only():
    callback = halving(schedule=Linear(0.25, 0.75, 0.25, "fraction"))
    with pytest.warns(UserWarning, match="the training data has no length"):
        fit(callback, data=stream(), epochs=2)
    assert [event.epoch for event in callback.report.history] == [1, 2]
    assert callback.report.reached == 0.5


@pytest.mark.parametrize(("epochs", "steps"), [(-1, 9), (5, 9)])
def test_the_length_of_a_fit_may_be_set_in_steps(epochs, steps):
    callback = halving(schedule=OneShot(0.5, "fraction"))
    module, used = fit(callback, epochs=epochs, max_steps=steps)
    assert used.global_step == steps
    assert [event.step for event in callback.report.history] == [5]
    assert widths(module) == HALF


def test_checkpoints_can_follow_the_metrics_of_pruning(tmp_path):
    best = ModelCheckpoint(tmp_path, filename="best", monitor="prune/removed", mode="max")
    module, used = fit(halving(), best, epochs=3, enable_checkpointing=True)
    assert float(best.best_model_score) == 0.5
    assert used.callback_metrics["prune/channels"] == 30
    assert used.callback_metrics["prune/parameters"] == sum(p.numel() for p in module.parameters())
    assert widths(load_pruned(best.best_model_path, SmallNet)) == HALF


def test_checkpoints_at_validation_see_the_rounds_before_it(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="prune/macs", mode="min", save_top_k=1, filename="{epoch}")
    used = trainer(halving(), best, EarlyStopping("prune/macs", patience=9), epochs=3, enable_checkpointing=True)
    used.fit(small_net(), loader(), loader(2, seed=7))
    assert best.best_model_path.endswith("epoch=1.ckpt")


def test_files_of_weights_only_load(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_weights_only=True, save_top_k=-1)
    module, _ = fit(halving(), keep, epochs=2, enable_checkpointing=True)
    loaded = load_pruned(tmp_path / "epoch=1.ckpt", SmallNet)
    assert "optimizer_states" not in torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert equal(run(loaded, SAMPLES), run(module, SAMPLES))
    assert widths(load_pruned(tmp_path / "epoch=0.ckpt", SmallNet)) == [12, 24, 24]


def test_a_checkpoint_of_another_width_can_be_tested_and_trained_on(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    used = trainer(halving(), keep, epochs=2, enable_checkpointing=True)
    module = small_net()
    used.fit(module, loader(), loader(2, seed=7))
    small = copy.deepcopy(module.state_dict())
    used.validate(module, loader(2, seed=7), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert widths(module) == [12, 24, 24]
    used.validate(module, loader(2, seed=7), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert widths(module) == HALF
    assert equal(module.state_dict(), small)


def test_the_checkpoint_of_a_crash_can_be_resumed(tmp_path):
    class Crash(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 2 * BATCHES - 1 and not list(tmp_path.iterdir()):
                raise OSError("no more disk")

    def train(module, **arguments):
        used = trainer(halving(), Crash(), OnExceptionCheckpoint(tmp_path, "crash"), enable_checkpointing=True)
        used.fit(module, loader(), **arguments)
        return module.state_dict()

    with pytest.raises(OSError, match="no more disk"):
        train(small_net())
    resumed = train(small_net(seed=5), ckpt_path=tmp_path / "crash.ckpt")
    assert equal(resumed, train(small_net()))


def test_a_file_saved_after_the_fit_can_be_resumed(tmp_path):
    _, used = fit(halving(), epochs=2)
    used.save_checkpoint(tmp_path / "later.ckpt")
    resumed, again = small_net(seed=5), trainer(halving())
    again.fit(resumed, loader(), ckpt_path=tmp_path / "later.ckpt")
    assert again.global_step == 3 * BATCHES
    assert widths(resumed) == HALF


def test_a_copy_of_the_module_made_during_the_fit_is_free_of_this_library():
    copies = []

    class Copy(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            file = io.BytesIO()
            torch.save(pl_module, file)
            assert b"lightning_prune" not in file.getvalue()
            copies.append(copy.deepcopy(pl_module))

    module, _ = fit(halving(), Copy(), epochs=2)
    for number, made in enumerate(copies):
        assert widths(made) == (HALF if number else [12, 24, 24])
        checkpoint = {"state_dict": made.state_dict()}
        made.on_save_checkpoint(checkpoint)
        assert checkpoint.keys() == {"state_dict"}
    assert equal(copies[-1].state_dict(), module.state_dict())


def test_the_callback_can_be_copied_during_and_after_a_fit():
    copies = []

    class Copy(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            copies.append(copy.deepcopy(callback))

    callback = halving()
    fit(callback, Copy(), epochs=2)
    assert copies[-1].remove == callback.remove
    fit(copy.deepcopy(callback), module=small_net(), epochs=2)


def test_a_learning_rate_search_before_the_fit_leaves_the_network_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module, used = small_net(), trainer(halving(), epochs=2)
    module.lr = 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Tuner(used).lr_find(module, loader(), num_training=8)
    assert widths(module) == [12, 24, 24]
    used.fit(module, loader())
    assert widths(module) == HALF


@pytest.mark.parametrize("what", ["the module", "its network", "its network in place"])
def test_compiled_networks(what):
    module = small_net()
    plain, given = module.net, module
    if what == "the module":
        given = torch.compile(module, backend="eager")
    elif what == "its network":
        module.net = torch.compile(module.net, backend="eager")
    else:
        module.net.compile(backend="eager")
    callback = halving(schedule=Linear(1, 2, 1, "epoch"), exclude=["net.4"])
    fit(callback, Liveness(), module=given)
    module.eval()
    with torch.no_grad():
        compiled = module(SAMPLES)
        torch._dynamo.reset()
        expected = torch.compile(plain, backend="eager")(SAMPLES) if what == "the module" else plain.forward(SAMPLES)
    assert torch.equal(compiled, expected)
    assert [plain[0].out_channels, plain[3].depthwise.groups, plain[4].out_channels] == [6, 12, 24]


def test_mixed_precision():
    module, _ = fit(halving(criterion="taylor"), Liveness(), epochs=2, precision="bf16-mixed")
    assert widths(module) == HALF


def test_messages_go_to_the_log_where_there_is_no_progress_bar(caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        fit(halving(), epochs=2)
    said = [record.getMessage() for record in caplog.records]
    assert "pruned 50.0% of the channels so far (epoch 1)" in said
    assert any("requested 50.0% of channels, reached 50.0%" in message for message in said)

"""What every way of pruning promises, whatever its arguments."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_prune import load_pruned
from tests.contract.rows import ROWS
from tests.fits import (
    BATCHES,
    Exactness,
    Liveness,
    Rows,
    SmallNet,
    equal,
    fit,
    images,
    loader,
    optimizer_hooks,
    small_net,
    surface,
    trainer,
)
from tests.helpers import difference, disagreeing_attributes, run

SAMPLES = images(seed=5).tensors[0]
EPOCHS = 3  # the default of tests.fits.trainer
MIDDLE = BATCHES + 2  # optimizer steps: in the middle of the second epoch


class Done:
    """A fit to the end, with what was seen on the way.

    Attributes:
        module, trainer, callback, logger: Of that fit.
        before: What hung on the module and its optimizers before the fit.
        exactness: What every shrink of it did to the outputs.
        folder: Where a checkpoint of every epoch and one from the middle of an epoch lie.
    """

    def __init__(self, row, folder, exactness):
        self.row, self.folder, self.exactness = row, folder, exactness
        self.callback, self.logger, self.live = row.callback(), Rows(), Liveness(row.trains)
        self.module = small_net()
        self.before = surface(self.module)
        kept = [
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=MIDDLE, save_top_k=-1),
        ]
        self.trainer = trainer(
            self.callback, self.live, *kept, logger=self.logger, log_every_n_steps=1, enable_checkpointing=True
        )
        self.trainer.fit(self.module, loader(), loader(2, seed=7))


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: row.name)
def done(request, tmp_path_factory):
    """One fit for each row; all promises are checked on it."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Done(
            request.param,
            tmp_path_factory.mktemp(request.param.name),
            Exactness(patch, lambda module: run(module, SAMPLES)),
        )


def test_the_budget_is_reached(done):
    report = done.callback.report
    assert report.requested.fraction == done.row.callback().goal
    assert report.reached == pytest.approx(report.requested.fraction, abs=0.06)
    assert len(report.history) >= 1
    assert report.history[-1].removed <= report.reached or not done.row.lasts
    if done.row.chooses_channels:  # else dead channels take more weights along when they go
        assert report.history[-1].removed == report.reached


def test_every_shrink_is_exact(done):
    if done.row.chooses_channels:  # of single weights perhaps none frees a channel
        assert bool(done.exactness.differences) == done.row.shrinks
    assert all(difference <= 1e-5 for difference in done.exactness.differences)
    if done.row.shrinks_in_fit:  # else what goes was off before
        assert all(change > 1e-3 for change in done.exactness.changed)
    assert disagreeing_attributes(done.module) == []


def test_masked_channels_stay_off_to_the_end_of_the_fit(done):
    if done.row.shrinks_in_fit:
        pytest.skip("nothing is masked")
    if done.row.decides_at_the_end:
        pytest.skip("nothing is off before the end")
    saved = torch.load(done.folder / f"epoch={EPOCHS - 1}.ckpt", weights_only=True)
    full = small_net()
    full.load_state_dict(saved["state_dict"])
    full(SAMPLES)
    record = saved["lightning_prune"]
    off = [full.net[4].weight[:, ~mask] for name, mask in record["masks"].items() if name == "net.0"]
    off += [full.get_parameter(name)[~mask] for name, mask in record["weights"].items()]
    assert sum(part.numel() for part in off) > 0
    assert all(torch.count_nonzero(part) == 0 for part in off)


def test_optimizers_hold_the_living_parameters_and_all_of_them_move(done):
    assert done.live.batches == EPOCHS * BATCHES


@pytest.mark.parametrize(("file", "step"), [("epoch=0", BATCHES), ("epoch=1", 2 * BATCHES), (f"step={MIDDLE}", MIDDLE)])
def test_a_fit_that_was_stopped_and_resumed_ends_like_one_that_was_not(done, file, step, tmp_path):
    callback, logger, module = done.row.callback(), Rows(), small_net(seed=99)
    resumed = trainer(callback, Liveness(done.row.trains), logger=logger, log_every_n_steps=1)
    resumed.fit(module, loader(), loader(2, seed=7), ckpt_path=done.folder / f"{file}.ckpt")
    assert equal(module.state_dict(), done.module.state_dict())
    assert equal(resumed.optimizers[0].state_dict(), done.trainer.optimizers[0].state_dict())
    rows = rows_from(done.logger, step)
    assert len(rows) >= BATCHES
    assert rows_from(logger, step) == rows
    assert callback.report.history == done.callback.report.history
    assert callback.report.groups == done.callback.report.groups
    assert callback.report.reached == done.callback.report.reached
    resumed.save_checkpoint(tmp_path / "again.ckpt", weights_only=False)
    assert disagreeing_attributes(load_pruned(tmp_path / "again.ckpt", SmallNet)) == []


def rows_from(logger, step):
    """Everything logged from a step on, but for the mean loss of an epoch that Lightning itself starts afresh."""
    partial = {"train_loss_epoch"} if step == MIDDLE else set()
    return [
        (number, {name: value for name, value in row.items() if name not in partial or row["epoch"] > step // BATCHES})
        for number, row in logger.rows
        if number >= step
    ]


def test_nothing_is_left_on_the_module_and_its_optimizers(done):
    assert surface(done.module) == done.before
    _, used = fit(epochs=1)
    assert optimizer_hooks(done.trainer.optimizers) == optimizer_hooks(used.optimizers)


def test_nothing_is_left_after_an_exception(done):
    class Failing(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == BATCHES + 1:
                raise OSError("the disk is full")

    module = small_net()
    before = surface(module)
    callback = done.row.callback()
    used = trainer(callback, Failing())
    with pytest.raises(OSError, match="the disk is full"):
        used.fit(module, loader())
    assert surface(module) == before
    assert all(count == 0 for hooks in optimizer_hooks(used.optimizers) for count in hooks.values())


def test_the_checkpoint_loads_without_trainer_or_callback(done):
    path = done.folder / "pruned.ckpt"
    expected = run(done.module, SAMPLES)
    for model in (SmallNet, small_net(seed=5)):
        loaded = load_pruned(path, model)
        assert type(loaded) is SmallNet
        assert equal(run(loaded, SAMPLES), expected)
        assert disagreeing_attributes(loaded) == []
    assert torch.load(path, weights_only=True)["state_dict"].keys() == small_net().state_dict().keys()


def test_the_result_is_exported_by_torch(done):
    loaded = load_pruned(done.folder / "pruned.ckpt", SmallNet).eval()
    exported = torch.export.export(loaded, (SAMPLES,))
    assert difference(run(loaded, SAMPLES), [exported.module()(SAMPLES)]) <= 1e-6

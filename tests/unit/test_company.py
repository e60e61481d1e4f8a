"""Pruning in the company of Lightning's other callbacks, of its command line, and of the ways in which a fit ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    Timer,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_prune import Linear, OneShot, load_pruned
from tests.fits import (
    BATCHES,
    Liveness,
    Rows,
    SmallNet,
    equal,
    fit,
    images,
    loader,
    pruning,
    small_net,
    surface,
    trainer,
    widths,
)
from tests.helpers import run

ROOT = Path(__file__).parents[2]
SAMPLES = images(seed=5).tensors[0]
FULL, HALF = [12, 24, 24], [6, 12, 12]
ALL_ROUNDS = Linear(1, 3, 1, "epoch")


def halving(**arguments):
    return pruning(**{"scope": "group", **arguments})


class Sized(SmallNet):
    """Makes its own loaders, of a batch size that may be searched for."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.batch_size, self.lr = 8, 0.01

    def train_dataloader(self):
        return DataLoader(images(), batch_size=self.batch_size)

    def val_dataloader(self):
        return DataLoader(images(2, seed=7), batch_size=self.batch_size)


@pytest.mark.parametrize("shrink", ["rounds", "end"])
def test_a_batch_size_search_leaves_the_network_whole(tmp_path, shrink):
    module = Sized()
    search = BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=2)
    callbacks = [search, halving(shrink=shrink), Liveness()]
    trainer(*callbacks, epochs=2, default_root_dir=tmp_path).fit(module)
    assert module.batch_size == 4
    assert widths(module) == HALF
    assert callbacks[-1].batches == 2 * 12
    assert len(callbacks[1].report.history) == 1


@pytest.mark.parametrize("shrink", ["rounds", "end"])
def test_a_learning_rate_search_between_two_rounds(tmp_path, shrink):
    class AtMilestone(LearningRateFinder):
        def on_fit_start(self, *args):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                before = {name: value.clone() for name, value in pl_module.state_dict().items()}
                self.lr_find(trainer, pl_module)
                searched.append(equal(before, pl_module.state_dict()))

    module, callback, searched = Sized(), halving(shrink=shrink, schedule=ALL_ROUNDS), []
    used = trainer(callback, AtMilestone(num_training_steps=4), epochs=4, default_root_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        used.fit(module)
    assert searched == [True]
    assert widths(module) == HALF
    assert [event.epoch for event in callback.report.history] == [1, 2, 3]
    assert used.global_step == 4 * BATCHES


class Transferred(SmallNet):
    """Starts with all but its head frozen, as transfer learning does."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.backbone = self.net[:4]

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-3)


@pytest.mark.parametrize("shrink", ["rounds", "end"])
def test_what_is_frozen_is_cut_too_and_trains_once_it_is_not_frozen(tmp_path, shrink):
    def train(module, **arguments):
        thaw = BackboneFinetuning(2, lambda epoch: 1.5, verbose=False)
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, enable_version_counter=False)
        callbacks = thaw, halving(shrink=shrink, schedule=ALL_ROUNDS), keep
        used = trainer(*callbacks, epochs=4, enable_checkpointing=True)
        used.fit(module, loader(), **arguments)
        return used

    torch.manual_seed(0)
    module = Transferred()
    frozen = module.net[3].expand.weight.detach().clone()
    used = train(module)
    assert widths(module) == HALF
    held = {id(p) for group in used.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    rows = [row for row in module.net[3].expand.weight.detach()[:, :, 0, 0]]
    assert not any(torch.equal(row, old[:6]) for row in rows for old in frozen[:, :, 0, 0])
    for epoch in (0, 1):  # BackboneFinetuning itself does not go on bit for bit once it has thawed
        resumed = Transferred()
        train(resumed, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert equal(resumed.state_dict(), module.state_dict())


@pytest.mark.parametrize("criterion", ["l1", "taylor"])
@pytest.mark.parametrize("shrink", ["rounds", "never"])
def test_layers_that_never_train_lose_channels_and_stay_frozen(criterion, shrink):
    module = small_net()
    module.net[:3].requires_grad_(False)
    rows = module.net[0].weight.detach().clone()
    fit(halving(criterion=criterion, shrink=shrink), module=module, epochs=2)
    assert not any(p.requires_grad for p in module.net[:3].parameters())
    assert widths(module) == (FULL if shrink == "never" else HALF)
    if shrink == "rounds":
        assert all(any(torch.equal(row, old) for old in rows) for row in module.net[0].weight.detach())


def test_a_learning_rate_monitor_logs_every_step():
    rows = Rows()
    fit(LearningRateMonitor("step"), halving(), logger=rows, log_every_n_steps=1, epochs=2)
    assert len([row for _, row in rows.rows if "lr-AdamW" in row]) == 2 * BATCHES


def test_early_stopping_may_end_the_fit_before_its_last_round_and_the_report_says_so():
    class Worse(SmallNet):
        def on_train_epoch_end(self):
            self.log("worse", float(self.current_epoch))

    callback = halving(schedule=Linear(1, 5, 1, "epoch"))
    _, used = fit(EarlyStopping("worse", patience=2), callback, module=Worse(), epochs=9)
    assert used.current_epoch == 3
    assert callback.report.reached == pytest.approx(0.2, abs=0.05)
    assert any("ended before the last round" in note for note in callback.report.notes)


def test_early_stopping_can_wait_for_the_budget():
    """What is monitored is logged from the round on that reaches it."""

    class Waiting(SmallNet):
        def on_train_epoch_end(self):
            if self.trainer.callback_metrics["prune/removed"] >= 0.5:
                self.log("worse", float(self.current_epoch))

    callback = halving(schedule=ALL_ROUNDS)
    stop = EarlyStopping("worse", patience=2, strict=False, check_on_train_epoch_end=True)
    _, used = fit(callback, stop, module=Waiting(), epochs=9)
    assert used.current_epoch == 6
    assert callback.report.reached == 0.5


@pytest.mark.parametrize("shrink", ["rounds", "end"])
def test_a_fit_whose_time_is_out_still_hands_back_what_it_has(shrink):
    timer = Timer("00:01:00:00")

    class LongGone(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == BATCHES + 2:
                timer.load_state_dict({"time_elapsed": {"train": 7200.0, "sanity_check": 0.0, "validate": 0.0}})

    callback = halving(shrink=shrink)
    module, used = fit(timer, LongGone(), callback, epochs=3)
    assert used.global_step == BATCHES + 3
    assert widths(module) == HALF
    assert callback.report.reached == 0.5


LIMITS = {
    "a number of batches": ({"limit_train_batches": 3}, 6),
    "a share of the batches": ({"limit_train_batches": 0.5}, 6),
    "overfitting on two": ({"overfit_batches": 2}, 4),
    "validation in mid-epoch": ({"val_check_interval": 2}, 12),
    "validation by batches": ({"val_check_interval": 8, "check_val_every_n_epoch": None}, 12),
    "rare validation": ({"check_val_every_n_epoch": 2, "reload_dataloaders_every_n_epochs": 1}, 12),
    "anomaly detection": ({"detect_anomaly": True}, 12),
}


@pytest.mark.parametrize("name", LIMITS)
def test_rounds_are_where_they_are_due(name):
    arguments, step = LIMITS[name]
    module, callback = small_net(), halving(criterion="taylor", schedule=OneShot(0.5, "fraction"))
    trainer(callback, Liveness(), epochs=4, **arguments).fit(module, loader(), loader(2, seed=7))
    assert [(event.epoch, event.step) for event in callback.report.history] == [(2, step)]
    assert widths(module) == HALF


def test_epochs_of_another_length_each_time():
    class Growing(SmallNet):
        def train_dataloader(self):
            return loader(2 + 2 * self.trainer.current_epoch)

    module, callback = Growing(), halving(schedule=OneShot(1.5, "epoch"))
    trainer(callback, Liveness(), epochs=3, reload_dataloaders_every_n_epochs=1).fit(module)
    assert [(event.epoch, event.step) for event in callback.report.history] == [(1, 2 + 4 // 2)]
    assert widths(module) == HALF


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_other_precisions(precision):
    module, _ = fit(halving(criterion="taylor", recalibrate=1), epochs=2, precision=precision)
    assert widths(module) == HALF
    assert module.net[0].weight.dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_that_are_computed_twice(reentrant):
    class Thrifty(SmallNet):
        def forward(self, images):
            hidden = self.net[:3](images)
            for part in (self.net[3], self.net[4:7]):
                hidden = checkpoint(part, hidden, use_reentrant=reentrant)
            return self.net[7:](hidden)

    torch.manual_seed(0)
    module = Thrifty()
    fit(halving(criterion="taylor", recalibrate=1), Liveness(), module=module, epochs=2)
    assert widths(module) == HALF


class Late(L.LightningModule):
    """Makes its network in ``configure_model``."""

    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = small_net().net

    forward = SmallNet.forward
    training_step = SmallNet.training_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def test_a_network_that_is_made_late(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module, _ = fit(halving(), Liveness(), keep, module=Late(), enable_checkpointing=True)
    assert widths(module) == HALF
    resumed = Late()
    trainer(halving()).fit(resumed, loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert equal(resumed.state_dict(), module.state_dict())
    assert equal(load_pruned(tmp_path / "epoch=2.ckpt", Late).state_dict(), module.state_dict())


def test_the_same_trainer_can_go_on():
    module, callback = small_net(), halving(schedule=ALL_ROUNDS)
    used = trainer(callback, Liveness(), epochs=2)
    with pytest.warns(UserWarning, match="only partly reached"):
        used.fit(module, loader())
    used.fit_loop.max_epochs = 4
    used.fit(module, loader())
    assert widths(module) == HALF
    assert [event.epoch for event in callback.report.history] == [1, 2, 3]


class Tested(SmallNet):
    __test__ = False  # is no test itself

    def test_step(self, batch, batch_idx):
        self.log("test_loss", cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.parametrize(("mode", "expected"), [("min", FULL), ("max", HALF)])
def test_the_best_checkpoint_is_tested_at_its_own_width(tmp_path, mode, expected):
    torch.manual_seed(0)
    best = ModelCheckpoint(tmp_path, monitor="prune/removed", mode=mode, filename="best")
    module = Tested()
    used = trainer(halving(schedule=Linear(1, 2, 1, "epoch")), best, enable_checkpointing=True)
    used.fit(module, loader())
    assert widths(module) == HALF

    loaded = load_pruned(best.best_model_path, Tested).eval()
    with torch.no_grad():
        losses = [cross_entropy(loaded(inputs), labels) for inputs, labels in loader(2, seed=7)]
    right = pytest.approx(float(sum(losses)) / 2, rel=1e-6)
    for current in (module, Tested()):  # the second is wider than the narrow checkpoint
        found = used.test(current, loader(2, seed=7), ckpt_path="best", verbose=False)
        assert widths(current) == expected
        assert found[0]["test_loss"] == right
        assert equal(run(current, SAMPLES), run(loaded, SAMPLES))


class Bare(L.LightningModule):
    """Leaves its optimizer to the command line."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.net = SmallNet(width).net

    forward = SmallNet.forward
    training_step = SmallNet.training_step

    def train_dataloader(self):
        return loader()


COMMAND = """--optimizer=AdamW --optimizer.lr=0.01 --lr_scheduler=CosineAnnealingLR --lr_scheduler.T_max=30
--trainer.logger=false --trainer.accelerator=cpu --trainer.max_epochs=4 --trainer.enable_progress_bar=false
--trainer.enable_model_summary=false --seed_everything=1 --trainer.callbacks+=lightning_prune.ChannelPruning
--trainer.callbacks.remove=0.5 --trainer.callbacks.of=channels --trainer.callbacks.scope=group
--trainer.callbacks.schedule=lightning_prune.Linear --trainer.callbacks.schedule.start=1
--trainer.callbacks.schedule.end=3 --trainer.callbacks.schedule.interval=1 --trainer.callbacks.schedule.unit=epoch
--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint --trainer.callbacks.filename={epoch}
--trainer.callbacks.save_top_k=-1 --trainer.callbacks.enable_version_counter=false"""


def test_an_optimizer_that_the_command_line_builds_early_trains_what_is_left(tmp_path):
    def train(**arguments):
        live, place = Liveness(), [f"--trainer.callbacks.dirpath={tmp_path}"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cli = LightningCLI(Bare, args=[*COMMAND.split(), *place], run=False, save_config_callback=None)
        cli.trainer.callbacks.append(live)
        cli.trainer.fit(cli.model, **arguments)
        assert widths(cli.model) == HALF
        return cli.model.state_dict(), live.batches

    whole, batches = train()
    assert batches == 4 * BATCHES
    resumed, batches = train(ckpt_path=tmp_path / "epoch=1.ckpt")
    assert batches == 2 * BATCHES
    assert equal(resumed, whole)


SIGNALS = {"SIGTERM": SIGTERMException, "SIGINT": SystemExit}


class Struck(L.Callback):
    """Sends the process a signal in the middle of the second epoch, right after the round."""

    def __init__(self, number):
        self.number = number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == BATCHES + 2:
            os.kill(os.getpid(), self.number)


def main(folder):
    """Two fits that are interrupted, in a process of their own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background ignores from birth on
    for name, error in SIGNALS.items():
        module = small_net()
        hung = surface(module)
        callbacks = halving(), Struck(getattr(signal, name)), OnExceptionCheckpoint(folder, name)
        try:
            fit(*callbacks, module=module, enable_checkpointing=True)
        except error:
            assert widths(module) == HALF
            assert surface(module) == hung
        else:
            raise AssertionError(f"{name} did not stop the fit")


def test_a_fit_that_a_signal_has_stopped_can_be_resumed(tmp_path):
    command = [sys.executable, "-m", "tests.unit.test_company", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, _ = fit(halving())
    for name in SIGNALS:
        resumed = small_net(seed=5)
        used = trainer(halving())
        used.fit(resumed, loader(), ckpt_path=tmp_path / f"{name}.ckpt")
        assert used.global_step == 3 * BATCHES
        assert equal(resumed.state_dict(), whole.state_dict())


def test_the_weights_saved_at_an_exception_load_at_their_width(tmp_path):
    class Crash(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == BATCHES + 2:
                raise OSError("no more disk")

    module = small_net()
    keep = ModelCheckpoint(tmp_path, filename="crash", save_on_exception=True, save_weights_only=True)
    with pytest.raises(OSError, match="no more disk"):
        fit(halving(), Crash(), keep, module=module, enable_checkpointing=True)
    loaded = load_pruned(tmp_path / "crash.ckpt", SmallNet)
    assert widths(loaded) == HALF
    assert equal(run(loaded, SAMPLES), run(module, SAMPLES))


if __name__ == "__main__":
    main(Path(sys.argv[1]))


class Waits(EarlyStopping):
    """Takes down what it compares with before every validation."""

    def __init__(self, **arguments):
        super().__init__("val_loss", **arguments)
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        self.seen.append((self.wait_count, float(self.best_score)))
        super().on_validation_end(trainer, pl_module)


@pytest.mark.parametrize(("mode", "worst"), [("min", float("inf")), ("max", -float("inf"))])
def test_early_stopping_waits_anew_after_a_round_if_told_to(mode, worst):
    def seen(choice):
        stop = Waits(patience=9, mode=mode)
        used = trainer(halving(monitors=choice, schedule=OneShot(2, "epoch")), stop, epochs=4)
        used.fit(small_net(), loader(), loader(2, seed=7))
        return stop.seen

    kept, anew = seen("keep"), seen("reset")
    assert kept[:2] == anew[:2]
    assert anew[2] == (0, worst)
    assert kept[2] != anew[2]
    assert anew[3][1] != worst

"""What a fit leaves and says at its end, and what looks for its best moment meanwhile."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_prune import (
    BayesianPruning,
    ConfigurationError,
    DecisionPatternPruning,
    EdgePopup,
    GrowAndPrune,
    Linear,
    OneShot,
    ScoringNetPruning,
    SearchAndTrain,
    load_pruned,
)
from tests.fits import BATCHES, SmallNet, fit, loader, pruning, small_net, trainer, widths

HALF = [6, 12, 12]


class Worse(SmallNet):
    """What it is watched by gets worse from epoch to epoch."""

    def on_train_epoch_end(self):
        self.log("worse", float(self.current_epoch))


def ended(*callbacks, epochs=6, **arguments):
    """The Trainer after a fit, and what it was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, used = fit(*callbacks, module=Worse(), epochs=epochs, **arguments)
    return used, " ".join(str(warning.message) for warning in caught)


def best_of(tmp_path):
    return ModelCheckpoint(tmp_path / "best", monitor="worse", filename="{epoch}", save_on_train_epoch_end=True)


@pytest.mark.parametrize(("monitors", "epoch", "size"), [("keep", 0, 12), ("reset", 3, 6), ("wait", 3, 6)])
def test_the_best_is_looked_for_anew_if_told_to(tmp_path, monitors, epoch, size):
    best = best_of(tmp_path)
    used, said = ended(
        best, pruning(schedule=Linear(1, 3, 1, "epoch"), monitors=monitors, scope="group"), enable_checkpointing=True
    )
    assert best.best_model_path.endswith(f"epoch={epoch}.ckpt")
    assert len(load_pruned(best.best_model_path, Worse()).net[0].weight) == size
    assert ("the best checkpoint by worse" in said) == (monitors == "keep")
    assert widths(used.lightning_module) == HALF


@pytest.mark.parametrize(("monitors", "epochs"), [("keep", 2), ("reset", 3), ("wait", 5)])
def test_early_stopping_waits_for_the_rounds_if_told_to(monitors, epochs):
    callback = pruning(schedule=Linear(1, 3, 2, "epoch"), monitors=monitors, scope="group")
    used, said = ended(EarlyStopping("worse", patience=1), callback, epochs=9)
    assert used.current_epoch == epochs
    assert ("ended before the last round" in said) == (monitors != "wait")


@pytest.mark.parametrize("stopped", [3, 9])
def test_waiting_goes_on_in_a_resumed_fit(tmp_path, stopped):
    def fitted(epochs, **arguments):
        save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stopped, save_top_k=-1)
        callbacks = (
            EarlyStopping("val_loss", patience=1, min_delta=9.0),
            pruning(schedule=OneShot(3, "epoch"), monitors="wait", scope="group"),
        )
        module = small_net()
        used = trainer(*callbacks, save, epochs=epochs, enable_checkpointing=True)
        used.fit(module, loader(), loader(1, seed=7), **arguments)
        return used.current_epoch, widths(module)

    assert fitted(9) == fitted(9, ckpt_path=tmp_path / f"step={stopped}.ckpt")
    assert fitted(9)[1] == HALF


@pytest.mark.parametrize(
    "method", [BayesianPruning, DecisionPatternPruning, GrowAndPrune, ScoringNetPruning, SearchAndTrain]
)
def test_methods_with_rounds_of_their_own_take_the_choice(method):
    with pytest.raises(ConfigurationError, match="choice for monitors"):
        method(monitors="wat")


def test_no_advice_is_given_that_would_change_nothing(tmp_path):
    best = best_of(tmp_path)
    _, said = ended(best, EdgePopup(remove=0.5), epochs=3, enable_checkpointing=True)  # channels go when the fit ends
    assert "Load pruned.ckpt instead." in said
    assert "monitors=" not in said


def test_an_unknown_choice_is_refused():
    with pytest.raises(ConfigurationError, match=r"choice for monitors.*'wat'.*did you mean 'wait'"):
        pruning(monitors="wat")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "nothing was written, as this fit has no folder of checkpoints: give the callback a directory"),
        ({"fast_dev_run": True}, "nothing was written, as this is a trial run"),
    ],
)
def test_a_fit_says_why_it_writes_nothing(caplog, arguments, words):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(pruning(schedule=OneShot(0, "step")), epochs=1, **arguments)
    assert words in caplog.text


def test_a_fit_says_where_it_has_written(caplog, tmp_path):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(pruning(directory=str(tmp_path / "here")), epochs=2)
    assert f"written to {tmp_path / 'here'}: pruned.ckpt" in caplog.text
    assert (tmp_path / "here" / "pruned.ckpt").exists()


def test_a_round_that_removes_nothing_is_not_announced(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(pruning(remove=0.05, round_to=12, schedule=Linear(0, 2, 1, "epoch")), epochs=4)
    assert "so far" not in caplog.text


def test_there_is_no_report_of_an_earlier_fit_after_one_that_failed():
    class Fails(SmallNet):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == BATCHES + 1:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    callback = pruning()
    fit(callback, epochs=2)
    assert callback.report.reached > 0
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(callback, module=Fails(), epochs=2)
    with pytest.raises(ConfigurationError, match="no report until a fit with this callback has come to its end"):
        _ = callback.report


def test_ratios_for_all_groups_leave_the_budget_nothing_to_choose():
    for remove in (0.0, 0.95):  # of which the second cannot be reached
        callback = pruning(remove=remove, of="macs", ratios={"*": 0.5}, schedule=Linear(1, 2, 1, "epoch"))
        module, _ = fit(callback, epochs=3)
        assert widths(module) == HALF
        assert callback.report.requested.fraction == pytest.approx(callback.report.reached)
        assert [entry.step for entry in callback.report.history] == [BATCHES, 2 * BATCHES]
        assert callback.report.history[0].removed < callback.report.history[1].removed


class HalfInTheDark(SmallNet):
    """Nothing that is learnt reaches its first layers."""

    def forward(self, images):
        with torch.no_grad():
            features = self.net[:4](images)
        return self.net[4:](features)


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_channels_that_no_gradient_reaches_are_not_taken_for_unimportant(criterion):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"^net\.3\.expand stay as they are: no gradient of the loss reaches"):
        module, _ = fit(pruning(criterion=criterion, remove=0.3), module=HalfInTheDark(), epochs=2)
    assert widths(module)[1] == 24
    assert sum(widths(module)) == 42

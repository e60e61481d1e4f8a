"""Pruning by decision patterns in real fits, and the search for the number of units."""

from __future__ import annotations

import csv
import warnings

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from lightning_prune import (
    ConfigurationError,
    DecisionPatternPruning,
    Linear,
    OneShot,
    PatternMining,
    PruneError,
    WidthSearch,
)
from lightning_prune.callbacks.width_record import Trial, WidthRecord
from tests.fits import Resumable, equal, trainer

SIMPLE = PatternMining(samples=256, min_samples=100, purity=0.9, min_support=0.02)


class Perceptron(L.LightningModule):
    """Two classes that the sign of the first of four numbers tells; ``score`` is what the test wants of a width."""

    def __init__(self, width=20, activation=None, score=None, classes=2):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, width), activation or nn.ReLU(), nn.Linear(width, classes))
        self.score = score

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch):
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch):
        if self.score is not None:
            self.log("score", float(self.score(self.width)))

    @property
    def width(self):
        return self.net[0].out_features

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


class Regression(Perceptron):
    def __init__(self):
        super().__init__(classes=1)

    def training_step(self, batch):
        return self(batch[0]).square().mean()


def data(samples=256):
    inputs = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0))
    return Resumable(TensorDataset(inputs, (inputs[:, 0] > 0).long()), 32)


def fitted(module, callback, *more, epochs=3, ckpt_path=None, **arguments):
    used = trainer(callback, *more, epochs=epochs, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        used.fit(module, data(), data(32), ckpt_path=ckpt_path)
    return used


def pruning(**arguments):
    return DecisionPatternPruning(**{"mining": SIMPLE, "schedule": OneShot(2, "epoch"), **arguments})


# Choosing ------------------------------------------------------------------------------------------------------------


def dying(module, count):
    """The first hidden units are never on, for good: they get no gradient."""
    with torch.no_grad():
        module.net[0].bias[:count] = -100
    return module


def test_dead_units_go_first_and_the_network_computes_what_it_did():
    class Witness(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            self.outputs = [*getattr(self, "outputs", []), pl_module(data().dataset.tensors[0]).detach()]

    before, after = Witness(), Witness()
    module, callback = dying(Perceptron(), 8), pruning(remove=0.4, reinit="keep")
    used = trainer(before, callback, after)
    used.fit(module, data())
    assert callback.learnt["statuses"]["net.0"]["dead"] == 8
    assert module.width == 12
    assert (module.net[0].bias > -50).all()
    torch.testing.assert_close(before.outputs[2], after.outputs[2])
    assert not torch.equal(before.outputs[1], before.outputs[2])


def test_what_is_left_is_drawn_anew_unless_told_otherwise():
    class Last(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            self.weights = pl_module.net[0].weight.detach().clone()

    found = {}
    for reinit in ("random", "keep"):
        before, after = Last(), Last()
        fitted(Perceptron(), pruning(reinit=reinit, remove=0.2), before, after)
        trained = Perceptron()
        fitted(trained, pruning(schedule=OneShot(2, "epoch"), remove=0.0, reinit="keep"), before, epochs=3)
        rows = {tuple(row) for row in before.weights.tolist()}
        found[reinit] = sum(tuple(row) in rows for row in after.weights.tolist())
    assert found == {"random": 0, "keep": 16}


def test_masks_hold_what_an_earlier_round_chose():
    callback = pruning(remove=0.5, reinit="keep", shrink="end", schedule=Linear(1, 2, 1, "epoch"))
    module = Perceptron()
    fitted(module, callback)
    assert callback.learnt["statuses"]["net.0"]["dead"] == 5  # what went in the first round counts for nothing
    assert module.width == 10
    assert callback.report.reached == 0.5


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "mining", "message"),
    [
        (lambda: Perceptron(activation=nn.Sigmoid()), SIMPLE, "no unit of channel group 'net.0' is ever off"),
        (Perceptron, PatternMining(), "256 training samples are too few"),
        (Perceptron, PatternMining(256, 100, purity=1.0, min_support=0.6), "no pattern of the units of .*'net.0'"),
    ],
)
def test_a_round_without_patterns_is_an_error_or_left_out(module, mining, message):
    failing = module()
    with pytest.raises(PruneError, match=message):
        fitted(failing, pruning(mining=mining))
    assert failing.width == 20
    left, free, callback = module(), module(), pruning(mining=mining, unpruned_ok=True)
    with pytest.warns(UserWarning, match=f"{message}.* This round removes nothing"):
        trainer(callback).fit(left, data())
    fitted(free, pruning(remove=0.0, reinit="keep", mining=SIMPLE, schedule=OneShot(2, "epoch"), unpruned_ok=True))
    assert equal(left.state_dict(), free.state_dict())  # not even drawn anew
    assert (callback.report.requested.fraction, callback.report.reached) == (0.5, 0.0)


def test_a_network_that_predicts_no_class_is_refused_before_it_trains():
    module = Regression()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ConfigurationError, match=r"none of its outputs is of shape \[32, classes\]"):
        fitted(module, pruning())
    assert equal(module.state_dict(), before)


def test_the_child_that_gives_the_scores_can_be_named():
    with pytest.raises(
        ConfigurationError, match="outputs='head' is no output of this network; there are: net, forward"
    ):
        fitted(Perceptron(), pruning(mining=PatternMining(256, 100, outputs="head")))
    fitted(Perceptron(), pruning(mining=PatternMining(256, 100, purity=0.9, min_support=0.02, outputs="net")))


# The search ----------------------------------------------------------------------------------------------------------


def step_at(width):
    """As good as can be down to a width, and bad below it."""
    return lambda present: 0.9 + present / 10_000 if present >= width else 0.5


def search(**arguments):
    return WidthSearch(**{"cycle": 1, "monitor": "score", "step": 0.2, "tolerance": 0.01, **arguments})


class Weights(L.Callback):
    """Remembers the weights at the end of the validation and at the start of each epoch."""

    def __init__(self):
        self.ends, self.starts = [], []

    def on_validation_end(self, trainer, pl_module):
        self.ends.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_train_epoch_start(self, trainer, pl_module):
        self.starts.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def test_the_search_goes_back_to_the_smallest_width_that_is_good_enough(tmp_path):
    # 20, 16, 12.8, 10.24, 8.192 of 20 units are asked for; 10 and 8 are not good enough.
    weights, module = Weights(), Perceptron(score=step_at(12))
    callback = DecisionPatternPruning(search=search(), mining=SIMPLE, directory=str(tmp_path))
    used = fitted(module, callback, weights, epochs=8)
    record = callback.widths_tried
    assert [trial.units for trial in record.trials] == [20, 16, 13, 10, 8]
    assert [trial.value for trial in record.trials] == pytest.approx([0.902, 0.9016, 0.9013, 0.5, 0.5])
    assert all(trial.seconds > 0 for trial in record.trials)
    assert record.chosen == 2
    assert [len(state["net.0.bias"]) for state in weights.starts] == [20, 16, 13, 10, 8, 13, 13, 13]
    assert equal(weights.starts[5], weights.ends[2])
    assert not equal(weights.starts[6], weights.ends[2])  # training goes on
    assert {id(p) for p in module.parameters()} == {id(p) for p in used.optimizers[0].param_groups[0]["params"]}
    assert module.width == 13
    report = callback.report
    assert report.requested.fraction == pytest.approx(0.36)
    assert report.reached == pytest.approx(0.35)
    assert report.history[-1].removed == report.reached
    with (tmp_path / "width_search.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["cycle"] * 2 + ["chosen"] + ["cycle"] * 2 + [
        "minimum", "maximum", "mean", "spread",
    ]  # fmt: skip
    assert [row["net.0"] for row in rows[:5]] == ["20", "16", "13", "10", "8"]
    assert float(rows[-1]["score"]) == pytest.approx(0.402)
    assert (tmp_path / "width_search.png").stat().st_size > 1000
    assert (tmp_path / "report.json").exists()


@pytest.mark.parametrize("stopped", ["epoch=2", "epoch=5", "step=20"])  # the last in the middle of an epoch
def test_a_search_that_was_stopped_goes_on_where_it_was(stopped, tmp_path):
    def fit(module, *more, **arguments):
        callback = DecisionPatternPruning(search=search(), mining=SIMPLE)
        fitted(module, callback, *more, epochs=7, **arguments)
        return callback

    module, again = Perceptron(score=step_at(12)), Perceptron(score=step_at(12))
    steps = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=20, save_top_k=-1)
    epochs = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fit(module, steps, epochs, enable_checkpointing=True)
    resumed = fit(again, ckpt_path=tmp_path / f"{stopped}.ckpt")
    assert again.width == 13
    assert equal(again.state_dict(), module.state_dict())
    assert resumed.report.history == whole.report.history
    assert resumed.report.requested == whole.report.requested
    assert resumed.widths_tried.chosen == 2
    found = [[(trial.units, trial.value) for trial in callback.widths_tried.trials] for callback in (whole, resumed)]
    assert found[0] == found[1]


def test_a_fit_that_ends_within_the_search_goes_back_all_the_same():
    weights, module = Weights(), Perceptron(score=step_at(16))
    callback = DecisionPatternPruning(search=search(), mining=SIMPLE)
    fitted(module, callback, weights, epochs=3)
    assert [trial.units for trial in callback.widths_tried.trials] == [20, 16, 13]
    assert equal(module.state_dict(), weights.ends[1])
    assert callback.report.reached == pytest.approx(0.2)


def test_a_last_width_that_is_good_stays_as_it_is():
    module, weights = Perceptron(score=step_at(1)), Weights()
    callback = DecisionPatternPruning(search=search(most=0.3), mining=SIMPLE)
    fitted(module, callback, weights, epochs=5)
    assert [trial.units for trial in callback.widths_tried.trials] == [20, 16, 14]
    assert module.width == 14
    assert callback.report.reached == pytest.approx(0.3)


def test_a_search_under_masks_goes_back_to_masks():
    callback = DecisionPatternPruning(search=search(), mining=SIMPLE, shrink="end")
    module = Perceptron(score=None)
    scores = [0.9, 0.9, 0.5, 0.5, 0.5]
    module.validation_step = lambda batch: module.log("score", scores[module.current_epoch])
    fitted(module, callback, epochs=5)
    assert [trial.units for trial in callback.widths_tried.trials] == [20, 16, 13, 10]
    assert module.width == 16


def test_what_is_measured_must_be_logged_in_each_cycle():
    with pytest.raises(ConfigurationError, match=r"measures 'val_acc', but that was not logged.*'score'"):
        fitted(Perceptron(score=step_at(1)), DecisionPatternPruning(search=search(monitor="val_acc"), mining=SIMPLE))
    callback = DecisionPatternPruning(search=search(), mining=SIMPLE)
    with pytest.raises(ConfigurationError, match="was not logged in the last 1 epochs"):
        fitted(Perceptron(score=step_at(1)), callback, check_val_every_n_epoch=2)


def test_a_search_can_be_written_in_yaml(tmp_path):
    entry = {"class_path": "lightning_prune.DecisionPatternPruning"}
    entry["init_args"] = {"search": {"cycle": 3, "monitor": "loss", "mode": "min"}, "mining": {"purity": 0.95}}
    written = tmp_path / "written.yaml"
    written.write_text(yaml.safe_dump({"trainer": {"callbacks": [entry], "logger": False}}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = LightningCLI(Perceptron, args=["--config", str(written)], run=False, save_config_callback=None)
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, DecisionPatternPruning))
    assert callback.search == WidthSearch(cycle=3, monitor="loss", mode="min")
    assert callback.mining == PatternMining(purity=0.95)


def test_a_search_finds_its_budget_itself():
    with pytest.raises(ConfigurationError, match=r"a search finds out how much can go, but remove=0.5"):
        DecisionPatternPruning(remove=0.5, search=search())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "least"}, "unknown mode 'least'"),
        ({"cycle": 0}, "cycle must be a whole number of at least 1"),
        ({"patience": 0}, "patience must be a whole number of at least 1"),
        ({"step": 1.0}, "step of a search must be a fraction"),
        ({"tolerance": -0.1}, "tolerance of a search must be at least 0"),
        ({"most": 1.0}, "most must be a fraction"),
    ],
)
def test_searches_that_cannot_work_are_refused(wrong, message):
    with pytest.raises(ConfigurationError, match=message):
        WidthSearch(**wrong)


@pytest.mark.parametrize(
    ("mode", "values", "misses", "chosen"),
    [
        ("max", [0.90, 0.92, 0.918], 0, 2),
        ("max", [0.90, 0.92, 0.91], 1, 1),
        ("max", [0.90, 0.80, 0.92, 0.80, 0.80], 2, 2),
        ("max", [0.90, float("nan")], 1, 0),
        ("max", [float("nan")], 1, None),
        ("min", [0.30, 0.20, 0.204, 0.21], 1, 2),
    ],
)
def test_the_choice_by_hand(mode, values, misses, chosen):
    rules = WidthSearch(mode=mode)
    assert (rules.misses(values), rules.chosen(values)) == (misses, chosen)


def test_the_summary_by_hand():
    record = WidthRecord("accuracy", [Trial({"a": 4, "b": 2}, 0.9, 3.0), Trial({"a": 3, "b": 1}, 0.6, 2.0)], 0)
    assert record.trials[0].units == 6
    summary = record.summary()
    assert summary["minimum"] == (0.6, 2.0)
    assert summary["maximum"] == (0.9, 3.0)
    assert summary["mean"] == pytest.approx((0.75, 2.5))
    assert summary["spread"] == pytest.approx((0.3, 1.0))

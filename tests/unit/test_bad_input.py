"""What cannot work is refused in words, and the module stays as it was."""

from __future__ import annotations

import re
from copy import deepcopy

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import nn

from lightning_prune import BudgetError, ConfigurationError, Linear, OneShot, PruneError, TraceError, load_pruned
from lightning_prune.probe import Probe
from tests.fits import SmallNet, equal, fit, parameters, pruning, small_net, surface, widths


def refused(error, words, *callbacks, module=None, trains=False, **arguments):
    """Fit, and expect an error that says all of the words; unless it ``trains`` before, no weight may have changed."""
    module = small_net() if module is None else module
    before, hung = deepcopy(module.state_dict()), surface(module)
    with pytest.raises(error) as raised:
        fit(*callbacks, module=module, **{"epochs": 2, **arguments})
    assert [word for word in words if word not in str(raised.value)] == []
    assert surface(module) == hung
    if trains:
        assert [value.shape for value in module.state_dict().values()] == [value.shape for value in before.values()]
    else:
        assert equal(module.state_dict(), before)


@pytest.mark.parametrize("remove", [1, 1.5, -0.1, 60, float("nan")])
def test_remove_outside_its_range(remove):
    with pytest.raises(ConfigurationError, match=re.escape(f"remove must be a fraction in [0, 1), but is {remove}.")):
        pruning(remove=remove)


def test_a_percentage_gets_a_hint():
    with pytest.raises(ConfigurationError, match=re.escape("Did you mean 0.6?")):
        pruning(remove=60)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"criterion": "talyor"}, ["unknown criterion of channels 'talyor'", "did you mean 'taylor'?"]),
        ({"schedule": "linaer"}, ["unknown schedule 'linaer'", "did you mean 'linear'?"]),
        ({"scope": "globl"}, ["unknown scope 'globl'", "did you mean 'global'?"]),
        ({"of": "mac"}, ["unknown measure 'mac'", "did you mean 'macs'?"]),
        ({"shrink": "round"}, ["unknown shrink 'round'", "did you mean 'rounds'?"]),
        ({"reinit": "keeep"}, ["unknown reinit 'keeep'", "did you mean 'keep'?"]),
        ({"ratios": {"net.0": 1.5}}, ["the ratio of 'net.0' must be a fraction"]),
        ({"min_channels": 0}, ["min_channels"]),
        ({"round_to": 0}, ["round_to"]),
        ({"recalibrate": -1}, ["recalibrate", "at least 0"]),
        ({"recalibrate": 2.5}, ["recalibrate must be a whole number of at least 0, but is 2.5"]),
        ({"recalibrate": True}, ["recalibrate must be a whole number of at least 0, but is True"]),
        ({"seed": "a"}, ["seed must be a whole number of at least 0, but is 'a'"]),
        ({"seed": -1}, ["seed must be a whole number of at least 0, but is -1"]),
        ({"seed": None}, ["seed must be a whole number of at least 0, but is None"]),
        ({"verify": "no"}, ["verify must be True or False, but is 'no'"]),
        ({"directory": 3}, ["directory must be the path of a folder or None, but is 3"]),
        ({"remove": "0.5"}, ["remove must be a fraction in [0, 1), but is '0.5'"]),
        ({"remove": None}, ["remove must be a fraction in [0, 1), but is None"]),
        ({"ratios": {"net.0": "0.3"}}, ["the ratio of 'net.0' must be a fraction in [0, 1), but is '0.3'"]),
        ({"ratios": [0.3]}, ["ratios must map patterns to fractions", "but is [0.3]"]),
        ({"include": 3}, ["include must be a pattern of names or a list of patterns", "but is 3"]),
        ({"exclude": [3]}, ["exclude must be a pattern of names or a list of patterns", "but is [3]"]),
        ({"inner": 3}, ["inner must be a pattern"]),
        ({"round_to": "8"}, ["round_to must be a whole number of at least 1, but is '8'"]),
        ({"round_to": 8.0}, ["round_to must be a whole number of at least 1, but is 8.0"]),
        ({"min_channels": "4"}, ["min_channels must be a number of units", "but is '4'"]),
        ({"min_channels": float("inf")}, ["min_channels must be a number of units", "but is inf"]),
    ],
)
def test_a_wrong_argument_is_refused_before_any_fit(arguments, words):
    with pytest.raises(ConfigurationError) as raised:
        pruning(**arguments)
    assert [word for word in words if word not in str(raised.value)] == []


def test_numbers_of_numpy_are_numbers(tmp_path):
    callback = pruning(
        remove=np.float32(0.5), round_to=np.int64(2), min_channels=np.float32(0.25), seed=np.int64(3),
        recalibrate=np.int64(1), ratios={"net.0": np.float64(0.5)}, directory=tmp_path,
    )  # fmt: skip
    module, _ = fit(callback, epochs=2)
    assert widths(module)[0] == 6
    assert widths(load_pruned(tmp_path / "pruned.ckpt", small_net())) == widths(module)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # The groups are 12, 24 and 24 wide, 60 in all.
        ({"min_channels": 8}, ["cannot remove 90.0 % of the channels", "at most 60.0 %", "min_channels=8 (95.0 %"]),
        ({"round_to": 8}, ["at most 60.0 %", "round_to=8 (95.0 %"]),
        ({"min_channels": 0.5}, ["at most 50.0 %", "min_channels=0.5"]),
        ({"exclude": ["net.0"], "of": "macs"}, ["cannot remove 90.0 % of the macs", "at most 83.3 %", "excluded"]),
        ({"ratios": {"net.4": 0.25}}, ["at most 66.6 %", "given a ratio"]),  # 1 + 1 + 18 are left
    ],
)
def test_a_budget_out_of_reach_says_what_can_be_reached(arguments, words):
    refused(BudgetError, words, pruning(remove=0.9, **arguments))


def test_a_budget_that_is_found_out_of_reach_later_still_counts_from_the_whole_network(monkeypatch):
    monkeypatch.setattr(Probe, "latency", lambda probe, repeats=30: parameters(probe._module))
    callback = pruning(remove=0.6, of="latency", schedule=Linear(0, 1, 1, "epoch"), min_channels=8)
    # 8 channels of each group are left: 8*2*9+8 + 2*8 + 8*8+8 + 8*9 + 2*8 + 8*8+8 + 8*8*9 + 2*8 + 3*8+3 = 1019 of 3843
    # parameters, 26.5 %.
    callback.remove = 0.9
    with pytest.raises(BudgetError, match=re.escape("cannot remove 90.0 % of the latency: at most 73.4 %")):
        fit(callback, epochs=2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"include": ["net.3.expnd"]}, ["in include 'net.3.expnd'", "did you mean 'net.3.expand'?"]),
        ({"exclude": ["layer*"]}, ["in exclude 'layer*'", "'net.0'"]),
        ({"ratios": {"net.9": 0.5}}, ["in ratios 'net.9'"]),
        ({"include": ["net.0"], "exclude": ["net.0"]}, ["leave no channel group to prune", "net.3.expand"]),
        ({"ratios": {"net.0": 0.5}, "exclude": ["net.0"]}, ["'net.0'", "ratios", "exclude"]),
    ],
)
def test_a_pattern_without_effect(arguments, words):
    refused(ConfigurationError, words, pruning(**arguments))


def test_inner_without_equal_blocks_is_a_warning():
    with pytest.warns(UserWarning, match=r"'net\.0' was chosen for inner, but .* it has no effect"):
        fit(pruning(inner="net.0"), epochs=2)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (OneShot(5, "epoch"), ["OneShot(at=5, unit='epoch') can never fire", "2 epochs (12 optimizer steps)"]),
        (OneShot(12, "step"), ["can never fire", "Train longer"]),
    ],
)
def test_a_schedule_that_can_never_fire(schedule, words):
    refused(ConfigurationError, words, pruning(schedule=schedule))


def test_a_fraction_of_a_fit_without_end():
    words = ["fractions of the fit", "no set end", 'unit="epoch"']
    refused(ConfigurationError, words, pruning(schedule="linear"), epochs=-1, max_time="00:00:01:00")


@pytest.mark.parametrize("of", ["channels", "params", "macs", "latency"])
def test_nothing_prunable_is_a_warning_and_training_goes_on(of):
    class Linear(SmallNet):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))

    module, callback = Linear(), pruning(of=of)
    before = deepcopy(module.state_dict())
    with pytest.warns(UserWarning, match=r"nothing in Linear can be pruned, training goes on .*net\.1\.weight"):
        fit(callback, module=module, epochs=2)
    assert module.trainer.global_step == 12
    assert not equal(module.state_dict(), before)
    assert callback.report.groups == ()
    assert callback.report.reached == 0


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn_scale", "taylor", "fpgm"])
def test_scores_that_are_not_numbers(criterion):
    class Broken(SmallNet):
        def on_train_epoch_end(self):
            with torch.no_grad():
                self.net[4].weight[3] = float("nan")
                self.net[5].weight[3] = float("nan")

    module = Broken()
    refused(PruneError, ["scores of channel group", "NaN"], pruning(criterion=criterion), module=module, trains=True)
    assert widths(module) == [12, 24, 24]


def test_a_lazy_module_without_a_size():
    class Lazy(SmallNet):
        def __init__(self):
            super().__init__()
            self.net[9] = nn.LazyLinear(3)

    module = Lazy()
    with pytest.raises(TraceError, match=r"'net\.9\.weight' of Lazy is lazy .* Run one batch"):
        fit(pruning(), module=module)
    assert isinstance(module.net[9], nn.LazyLinear)


def test_two_callbacks_that_decide():
    words = ["only one callback can decide", "there are 2", "ChannelPruning, "]
    refused(ConfigurationError, [*words, "ChannelPruning, ChannelPruning"], pruning(), pruning())
    refused(ConfigurationError, [*words, "ModelPruning"], pruning(), ModelPruning("l1_unstructured"))


def test_an_example_input_that_does_not_fit():
    module = small_net()
    module.example_input_array = torch.zeros(2, 5, 6, 6)
    words = ["forward", "SmallNet failed", "`example_input_array`", "set it to None"]
    refused(TraceError, words, pruning(), module=module)


def test_a_training_step_that_fails():
    class Failing(SmallNet):
        def training_step(self, batch, batch_idx):
            raise KeyError("image")

    words = ["training_step", "of Failing failed with KeyError: 'image'"]
    refused(TraceError, words, pruning(), module=Failing())


def test_a_report_before_any_fit():
    with pytest.raises(ConfigurationError, match="there is no report"):
        _ = pruning().report


def test_a_scripted_part_stays_whole(tmp_path):
    class Scripted(SmallNet):
        def __init__(self):
            super().__init__()
            self.scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)))

        def forward(self, x):
            return self.scripted(super().forward(x))

    callback = pruning()
    module, _ = fit(callback, module=Scripted())
    assert module.net[0].out_channels < 12
    assert module(torch.zeros(2, 2, 6, 6)).shape == (2, 3)

"""Everything that can be said in Python can be said in YAML, and what is printed as YAML reads back the same."""

from __future__ import annotations

import inspect
import warnings

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_prune import ChannelPruning, Norm, OneShot, PruningCallback, RandomReinit, Schedule, Taylor
from tests.contract.rows import ROWS, Row
from tests.fits import SmallNet

OBJECTS = {
    "criterion": Taylor(batches=2),
    "schedule": OneShot(3, "step"),
    "reinit": RandomReinit(),
    "min_channels": 0.5,
}
CASES = [*ROWS, Row("objects", OBJECTS), Row("norm", {"criterion": Norm(p=1.5, slots="all")})]


def plain(value):
    """How a value is written in YAML."""
    if not hasattr(value, "__dataclass_fields__"):
        return value
    names = inspect.signature(type(value).__init__).parameters
    fields = {name: getattr(value, "start" if name == "at" else name) for name in names if name != "self"}
    name = "RandomReinit" if isinstance(value, RandomReinit) else type(value).__name__
    return {"class_path": f"lightning_prune.{name}", "init_args": fields}


def command_line(*arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LightningCLI(SmallNet, args=list(arguments), run=False, save_config_callback=None)


def pruning_of(cli):
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, PruningCallback))


def settings(callback):
    return {name: getattr(callback, name) for name in inspect.signature(type(callback)).parameters}


@pytest.mark.parametrize("row", CASES, ids=lambda row: row.name)
def test_a_configuration_reads_back_the_same(row, tmp_path):
    arguments = {key: plain(value) for key, value in row.arguments.items()}
    entry = {"class_path": f"lightning_prune.{row.method.__name__}", "init_args": arguments}
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    written = tmp_path / "written.yaml"
    written.write_text(yaml.safe_dump({"trainer": {"callbacks": [entry], **quiet}}))
    first = command_line("--config", str(written))
    assert settings(pruning_of(first)) == settings(row.callback())
    printed = tmp_path / "printed.yaml"
    printed.write_text(first.parser.dump(first.config, skip_none=False))
    second = command_line("--config", str(printed))
    assert settings(pruning_of(second)) == settings(pruning_of(first))
    assert second.parser.dump(second.config) == first.parser.dump(first.config)


def test_the_callback_can_be_added_on_the_command_line(capsys):
    added = "--trainer.callbacks+=lightning_prune.ChannelPruning"
    options = ["--trainer.logger=False", added, "--trainer.callbacks.remove=0.7", "--trainer.callbacks.schedule=linear"]
    callback = pruning_of(command_line(*options, "--trainer.enable_checkpointing=False"))
    assert (callback.remove, callback.schedule) == (0.7, "linear")
    assert isinstance(callback._schedule, Schedule)


def test_print_config_shows_every_argument(capsys):
    with pytest.raises(SystemExit) as left:
        command_line("--trainer.callbacks=lightning_prune.ChannelPruning", "--print_config")
    assert left.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    shown = shown[0] if isinstance(shown, list) else shown
    assert list(shown["init_args"]) == list(inspect.signature(ChannelPruning).parameters)


@pytest.mark.parametrize(
    ("option", "value"), [("criterion", "l3"), ("schedule", "cubist"), ("of", "flops"), ("colour", 1)]
)
def test_a_wrong_option_is_refused_by_name(option, value, capsys):
    added = "--trainer.callbacks=lightning_prune.ChannelPruning"
    with pytest.raises(SystemExit):
        command_line(added, f"--trainer.callbacks.{option}={value}")
    assert option in capsys.readouterr().err

"""The command line, as a person would type it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from lightning_prune.cli import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.yaml"
SMALL = [
    "--model.init_args.width=8",
    "--model.init_args.blocks=1",
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=4",
    "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--seed_everything=3",
]


def said(capsys, words):
    """Exit status of a command, what it printed, and what it complained about."""
    try:
        status = main(words)
    except SystemExit as leaving:
        status = leaving.code
    out, err = capsys.readouterr()
    return status, out, err


def test_help_names_every_command(capsys):
    status, out, _ = said(capsys, [])
    assert status == 0
    for command in ("demo", "fit", "validate", "test", "predict", "inspect", "report", "export"):
        assert f"  {command}" in out


INSPECT = ["inspect", "lightning_prune.recipes.DigitsResNet", "--shape", "[2,1,8,8]"]


@pytest.mark.parametrize("command", ["inspect", "report", "export", "demo"])
def test_every_command_speaks_of_itself_and_gives_an_example(capsys, command):
    status, _, err = said(capsys, [command, "--hlep"])
    assert status == 2
    assert f"usage: lightning-prune {command} " in err
    assert f"lightning-prune {command} --help" in err
    status, out, _ = said(capsys, [command, "--help"])
    assert status == 0
    assert f"example: lightning-prune {command} " in out


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["fitt"], "did you mean 'fit'?"),
        (["inspect", "torchvision.models.resnet19", "--shape", "[1,3,32,32]"], "did you mean 'resnet18'?"),
        (["inspect", "torchvison.models.resnet18", "--shape", "[1,3,32,32]"], "cannot import 'torchvison.models'"),
        (["inspect", "torchvision.models.resnet18"], "--shape"),
        (["inspect", "torchvision.models.list_models", "--shape", "[1]"], "makes a list, not a torch module"),
        (["inspect", "resnet18", "--shape", "[1,3,32,32]"], "give all of it, such as my_package.resnet18"),
        (["inspect", "torchvision.models.__name__", "--shape", "[1]"], "is a str: name a class"),
        ([*INSPECT, "--init", '{"widht": 8}'], "unknown --init argument 'widht': did you mean 'width'?"),
        (["inspect", "torchvision.models.resnet18", "--init", '{"widht": 8}'], "argument 'widht' (resnet.py:"),
        ([*INSPECT, "--init", '{"width": -8}'], "could not be made: RuntimeError"),
        ([*INSPECT, "--tolerate", "5%"], "--tolerate says how to measure the sensitivity: add --sensitivity"),
        ([*INSPECT, "--data", "my_package.Data"], "--data says how to measure the sensitivity: add --sensitivity"),
        (["report", "nowhere"], "cannot read a pruning report from nowhere"),
        (["report", torch._C.__file__], "is no text. Give the report.json that a fit writes"),
    ],
)
def test_a_wrong_word_gets_help(capsys, words, hint):
    status, _, err = said(capsys, words)
    assert status == 2
    assert hint in err


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--trainer.callbacks.criterion=talor", "did you mean 'taylor'?"),
        ("--trainer.callbacks.criterian=l2", "did you mean 'criterion'?"),
        ("--trainer.callbacks.of=flops", "did you mean 'macs'?"),
        ("--trainer.callbacks.schedule=cubik", "did you mean 'cubic'?"),
        ("--trainer.max_epocs=3", "did you mean 'trainer.max_epochs'?"),
    ],
)
def test_a_mistyped_option_gets_help(capsys, option, hint):
    words = ["fit", "--config", str(EXAMPLE), "--trainer.callbacks=lightning_prune.ChannelPruning", option]
    status, _, err = said(capsys, words)
    assert status == 2
    assert hint in err


@pytest.mark.parametrize(
    ("callback", "hint"),
    [
        ("{remove: 50}", "remove must be a fraction in [0, 1), but is 50.0. Did you mean 0.5?"),
        ("{criterion: {class_path: lightning_prune.Norm, init_args: {p: -1}}}", "p must be above 0"),
    ],
)
def test_a_wrong_value_in_a_config_is_told_in_one_line(capsys, tmp_path, callback, hint):
    before = EXAMPLE.read_text()
    config = re.sub(r"init_args: \{remove.*", f"init_args: {callback}", before)
    assert config != before
    (tmp_path / "config.yaml").write_text(config)
    status, _, err = said(capsys, ["fit", "--config", str(tmp_path / "config.yaml")])
    assert status == 2
    assert err.strip().splitlines()[-1].startswith("lightning-prune: ")
    assert hint in err
    assert "Does not validate" not in err


def test_a_wrong_value_of_data_is_told_in_one_line(capsys):
    status, _, err = said(capsys, ["fit", "--config", str(EXAMPLE), "--data.init_args.batch_size=-3"])
    assert status == 2
    assert err.strip().splitlines()[-1].startswith("lightning-prune: batch_size=-3 is not a size")


def test_inspect_tells_how_much_can_go_at_most(capsys):
    from lightning_prune import shrink, trace
    from lightning_prune.recipes import DigitsResNet

    model, images = DigitsResNet(width=8, blocks=1), torch.randn(2, 1, 8, 8)
    _, out, _ = said(capsys, [*INSPECT, "--init", '{"width": 8, "blocks": 1}'])
    told = float(re.search(r"parameters, of which at most ([\d.]+)% can go", out).group(1))
    graph, before = trace(model, images), sum(p.numel() for p in model.parameters())
    shrink(model, graph, {name: torch.tensor([0]) for name in graph.groups})
    share = 100 * (1 - sum(p.numel() for p in model.parameters()) / before)
    assert 0 <= share - told < 0.1
    assert re.search(r"MACs for one sample, of which at most 9\d\.\d% can go", out)


def test_inspect_makes_what_an_argument_names_by_its_class(capsys):
    layers = '{"module": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 8, "out_features": 3}}}'
    status, out, _ = said(capsys, ["inspect", "tests.unit.test_cli.Around", "--init", layers, "--shape", "[2,5]"])
    assert status == 0
    assert re.search(r"first +8 ", out)


def test_inspect_says_what_is_wrong_with_a_class_in_an_argument(capsys):
    layers = '{"module": {"class_path": "torch.nn.Linaer"}}'
    status, _, err = said(capsys, ["inspect", "tests.unit.test_cli.Around", "--init", layers, "--shape", "[2,5]"])
    assert status != 0
    assert "did you mean 'Linear'?" in err


def test_objects_in_arguments_are_made_for_a_checkpoint_too(tmp_path, capsys):
    module, trainer = AroundLoaded(nn.Linear(8, 3)), L.Trainer(logger=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    layers = '{"module": {"class_path": "torch.nn.Linear", "init_args": {"in_features": 8, "out_features": 3}}}'
    words = ["inspect", "tests.unit.test_cli.AroundLoaded", "--init", layers, "--shape", "[2,5]"]
    status, out, _ = said(capsys, [*words, "--checkpoint", str(tmp_path / "some.ckpt")])
    assert status == 0
    assert re.search(r"first +8 ", out)


def test_inspect_prints_groups_refusals_and_costs(capsys):
    status, out, _ = said(
        capsys, ["inspect", "lightning_prune.recipes.DigitsResNet", "--init", '{"width": 8}', "--shape", "[2,1,8,8]"]
    )
    assert status == 0
    assert re.search(r"net\.0 +8 ", out)
    assert "MACs for one sample" in out
    assert "net.11.weight (dim 0): is an output of the network" in out


SENSITIVITY = ["inspect", "lightning_prune.recipes.DigitsResNet", "--sensitivity", "--batches", "1"]
DIGITS = ["--data", "lightning_prune.datamodules.DigitsDataModule"]
TINY = ["--init", '{"width": 4, "blocks": 1}']


def pasted(out):
    """What the last line makes where it is pasted into a script."""
    import lightning_prune

    return eval(out.strip().splitlines()[-1], vars(lightning_prune))


def test_inspect_measures_the_sensitivity_of_a_checkpoint(capsys, tmp_path):
    from lightning_prune.recipes import DigitsResNet

    torch.manual_seed(0)
    model = DigitsResNet(width=4, blocks=1)
    with torch.no_grad():
        model.net[-1].bias[3] = 50.0  # one class of ten is right about a tenth of the time
    saved = {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.6.0", "hyper_parameters": {}}
    torch.save(saved, tmp_path / "net.ckpt")
    words = [
        *SENSITIVITY,
        *TINY,
        *DIGITS,
        "--data_init",
        '{"batch_size": 50}',
        "--checkpoint",
        str(tmp_path / "net.ckpt"),
    ]
    options = ["--shares", "[0.5]", "--tolerate", "1%", "--save", str(tmp_path / "out")]
    status, out, err = said(capsys, [*words, *options])
    assert status == 0, err
    assert float(re.search(r"([\d.]+) with nothing off", out).group(1)) > 30
    assert "without --checkpoint" not in err
    ratios = pasted(out).ratios
    assert re.search(r"^net\.0 +4 +[\d.]+$", out, re.MULTILINE)
    assert set(ratios) >= {"net.0", "net.5.conv1"}
    assert set(ratios.values()) <= {0.0, 0.5}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "sensitivity.csv", "sensitivity.png", "sensitivity.txt"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (
            ["inspect", "torchvision.models.resnet18", "--shape", "[2,3,32,32]", "--sensitivity"],
            "is no LightningModule",
        ),
        ([*SENSITIVITY, *TINY], "with the Lightning Trainer. It needs a validation_step"),
        (
            [*SENSITIVITY, *TINY, "--data", "lightning_prune.datamodules.DigitsDataModul"],
            "did you mean 'DigitsDataModule'",
        ),
        ([*SENSITIVITY, *TINY, "--data", "lightning_prune.OneShot"], "makes a OneShot, not a LightningDataModule"),
        ([*SENSITIVITY, *TINY, *DIGITS, "--tolerate", "much"], "is a rise of the loss such as 0.05 or 5%"),
        ([*SENSITIVITY, *TINY, *DIGITS, "--monitor", "val_los"], "did you mean 'val_loss'"),
        ([*SENSITIVITY, *TINY, *DIGITS, "--batches", "0"], "at least 1"),
        ([*SENSITIVITY, *TINY, "--checkpoint", "none.ckpt"], "none.ckpt"),
    ],
)
def test_what_cannot_be_measured_gets_help(capsys, words, hint):
    status, _, err = said(capsys, words)
    assert status == 2
    assert hint in err


def test_inspect_warns_of_random_weights_and_takes_one_pattern_and_gives_a_whole_line(capsys):
    options = ["--patterns", "net.3.*", "--shares", "[0.5]", "--tolerate", "100%", "--criterion", "l1"]
    status, out, err = said(capsys, [*SENSITIVITY, *TINY, *DIGITS, *options])
    assert status == 0, err
    assert "without --checkpoint, 'lightning_prune.recipes.DigitsResNet' is measured with the weights" in err
    callback = pasted(out)
    assert (callback.criterion, callback.norms, callback.inner) == ("l1", "exact", None)
    assert callback.include == ["net.3.*"]
    assert callback.ratios == {"net.3.*": 0.5}


def test_print_config_shows_every_default(capsys):
    status, out, _ = said(capsys, ["fit", "--config", str(EXAMPLE), "--print_config"])
    assert status == 0
    assert "criterion: l2" in out
    assert "min_channels: 1" in out


USERS_OWN_SCRIPT = """
import sys
from lightning.pytorch.cli import LightningCLI
from lightning_prune.datamodules import DigitsDataModule
from lightning_prune.recipes import DigitsResNet

if __name__ == "__main__":
    cli = LightningCLI(DigitsResNet, DigitsDataModule, run=False, save_config_callback=None)
    cli.trainer.fit(cli.model, cli.datamodule)
"""


@pytest.mark.recipe
def test_python_yaml_and_a_users_own_cli_give_the_same_widths(tmp_path, monkeypatch, capsys):
    import lightning as L

    from lightning_prune import ChannelPruning
    from lightning_prune.datamodules import DigitsDataModule
    from lightning_prune.recipes import DigitsResNet

    def widths_of(folder):
        report = json.loads((folder / "report.json").read_text())
        return {row["name"]: row["after"] for row in report["groups"]}

    L.seed_everything(3)
    model, data = DigitsResNet(width=8, blocks=1), DigitsDataModule()
    callback = ChannelPruning(remove=0.5, of="macs", directory=str(tmp_path / "python"))
    trainer = L.Trainer(
        max_epochs=2, limit_train_batches=4, limit_val_batches=1, accelerator="cpu", logger=False, callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model, data)
    in_python = widths_of(tmp_path / "python")

    monkeypatch.chdir(tmp_path)
    config = EXAMPLE.read_text().replace("of: macs}", f"of: macs, directory: {tmp_path / 'yaml'}}}")
    (tmp_path / "config.yaml").write_text(config)
    status, _, err = said(capsys, ["fit", "--config", str(tmp_path / "config.yaml"), *SMALL])
    assert status == 0, err

    own = config.replace("class_path: lightning_prune.recipes.DigitsResNet", "width: 8\n  blocks: 1")
    own = own.replace("class_path: lightning_prune.datamodules.DigitsDataModule", "batch_size: 64")
    (tmp_path / "own.yaml").write_text(own.replace(str(tmp_path / "yaml"), str(tmp_path / "own")))
    (tmp_path / "own.py").write_text(USERS_OWN_SCRIPT)
    options = [option for option in SMALL if not option.startswith("--model")]
    run = subprocess.run(
        [sys.executable, "own.py", "--config", "own.yaml", *options], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert widths_of(tmp_path / "yaml") == in_python
    assert widths_of(tmp_path / "own") == in_python
    before = {row["name"]: row["before"] for row in json.loads((tmp_path / "own/report.json").read_text())["groups"]}
    assert sum(in_python.values()) < sum(before.values())


def test_a_pruned_checkpoint_is_loaded_without_a_callback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = EXAMPLE.read_text().replace("of: macs}", f"of: macs, directory: {tmp_path / 'pruned'}}}")
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "plain.yaml").write_text(config[: config.index("  callbacks:")])
    assert said(capsys, ["fit", "--config", "config.yaml", *SMALL])[0] == 0
    plain = ["--config", "plain.yaml", *SMALL, "--ckpt_path", "pruned/pruned.ckpt"]
    status, out, err = said(capsys, ["test", *plain])
    assert (status, "test_accuracy" in out or "test_acc" in out) == (0, True), err
    status, _, err = said(capsys, ["fit", *plain, "--trainer.default_root_dir=more"])  # which has come to its end
    assert status == 0, err


@pytest.mark.recipe
def test_the_demo_does_the_main_job(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, err = said(capsys, ["demo", "--epochs", "4", "--out", "made"])
    assert status == 0, err
    assert "predicts the same on all 360 test images" in out
    assert "test accuracy: dense" in out
    made = tmp_path / "made"
    assert {"pruned.ckpt", "report.csv", "report.json", "report.txt", "widths.png"} <= {p.name for p in made.iterdir()}
    report = json.loads((made / "report.json").read_text())
    assert report["reached"] >= 0.6
    assert report["after"]["macs"] < 0.4 * report["before"]["macs"]

    status, out, _ = said(capsys, ["report", "made", "--save", "again"])
    assert status == 0
    assert (made / "report.txt").read_text().strip() == out.strip()
    assert (tmp_path / "again" / "report.csv").read_text() == (made / "report.csv").read_text()

    words = ["export", "lightning_prune.recipes.DigitsResNet", "made/pruned.ckpt", "--shape", "[2,1,8,8]"]
    status, out, err = said(capsys, [*words, "--format", "pt2", "--out", "net.pt2"])
    assert status == 0, err
    from lightning_prune import load_pruned
    from lightning_prune.recipes import DigitsResNet

    images = torch.rand(2, 1, 8, 8)
    network = load_pruned("made/pruned.ckpt", DigitsResNet).eval()
    with torch.no_grad():
        assert torch.equal(torch.export.load("net.pt2").module()(images), network(images))


class Around(nn.Module):
    """A module that is given another one."""

    def __init__(self, module):
        super().__init__()
        self.first, self.module = nn.Linear(5, 8), module

    def forward(self, x):
        return self.module(self.first(x))


class AroundLoaded(Around, L.LightningModule):
    """The same, of which a checkpoint can be written."""

"""A training process that is killed again and again ends where one ends that is left alone, to the last bit.

What Lightning restores by itself limits what can be asked:

* It saves no state of random generators, so the network has no dropout.
* A shuffled loader goes on in the middle of an epoch where it was only if its order hangs on the epoch alone and it
  knows how many batches it has given (``tests.crash.fit.Shuffled``, ``tests.fits.Resumable``).
* The mean of a metric over an epoch is taken over the batches since the resume, so the loss is logged by step.
* Metrics of a step or an epoch are logged after the checkpoint that is written at its end: a kill in between loses
  them, ours with all others.
* From a checkpoint of the last batch of an epoch on, its validation is left out, so there are none of that batch.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_prune import ConfigurationError, load_pruned
from tests.crash.fit import BETWEEN_CHECKPOINTS, EPOCHS, WAYS
from tests.fits import BATCHES, SmallNet, equal, fit, loader, pruning, small_net, surface, trainer

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("LIGHTNING_PRUNE_KILLS", "6"))
SEED = int(os.environ.get("LIGHTNING_PRUNE_KILLS_SEED", "0"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the uninterrupted and the killed processes left."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork and SIGKILL")
    base = tmp_path_factory.mktemp("crash")
    temporary = base / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "tests.crash.killer", str(base), str(KILLS), str(SEED), *WAYS]
    environment = {**os.environ, "TMPDIR": str(temporary)}  # where Lightning leaves what a kill keeps it from moving
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120 + 20 * KILLS)
    planned = {path.parent.name: path.read_text() for path in base.glob("killed/*/moments")}
    assert done.returncode == 0, f"killed at {planned}: {done.stderr[-5000:]}"
    return base


def results(folder, way):
    return [torch.load(folder / run / way / "result.pt", weights_only=True) for run in ("whole", "killed")]


def logged(folder):
    """What a journal says of each step and metric in the end: rows of steps that were run again replace the earlier."""
    metrics = {}
    for line in (folder / "journal").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        metrics.update({(row["step"], name): value for name, value in row["metrics"].items()})
    return metrics


def test_every_kill_hit_a_living_process(folder):
    assert sum(int((folder / "killed" / way / "kills").read_text()) for way in WAYS) == KILLS


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", ["weights", "optimizer", "schedule", "record", "history", "widths", "pruned"])
def test_a_killed_and_resumed_fit_ends_like_one_that_was_left_alone(folder, way, what):
    whole, killed = results(folder, way)
    assert equal(killed[what], whole[what])


# What Lightning logs together, so loses together.
LOGGED_WITH = {
    "train_loss": ["train_loss", "epoch"],
    "witness": ["witness", *(f"prune/{name}" for name in ("removed", "channels", "parameters", "macs"))],
}


@pytest.mark.parametrize("way", WAYS)
def test_metrics_are_those_of_the_fit_that_was_left_alone(folder, way):
    whole, killed = (logged(folder / run / way) for run in ("whole", "killed"))
    assert len({step for step, name in whole if name == "train_loss"}) == EPOCHS * BATCHES
    lost = {key for key in whole.keys() - killed.keys() if key[1] in ("train_loss", "witness")}
    assert all((step + 1) % (BETWEEN_CHECKPOINTS if name == "train_loss" else BATCHES) == 0 for step, name in lost)
    gone = {(step, kin) for step, name in lost for kin in LOGGED_WITH[name]} - killed.keys()
    assert killed == {key: value for key, value in whole.items() if key not in gone}


@pytest.mark.parametrize("way", WAYS)
def test_the_fit_has_pruned(folder, way):
    whole, _ = results(folder, way)
    assert len(whole["history"]) == 5
    assert all(after < before for _, before, after in whole["widths"])
    assert whole["pruned"]


def test_half_written_checkpoints_are_refused_and_lightning_leaves_none(folder):
    """What each process does with one that it finds is in ``tests.crash.fit.refused``."""
    names = [line.split(":")[0] for path in folder.glob("killed/*/refused") for line in path.read_text().splitlines()]
    assert names
    assert not [name for name in names if name.endswith("end")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The bytes of a complete checkpoint."""
    path = tmp_path_factory.mktemp("complete") / "complete.ckpt"
    _, used = fit(pruning(), epochs=2)
    used.save_checkpoint(path, weights_only=False)
    return path.read_bytes()


LENGTHS = {"nothing": 0, "three bytes": 3, "a little": 100, "half": 0.5, "all but a little": -200, "all but one": -1}


@pytest.mark.parametrize("length", LENGTHS)
def test_a_file_that_ends_too_early_is_refused_wherever_it_ends(checkpoint, tmp_path, length):
    end = LENGTHS[length]
    path = tmp_path / "half.ckpt"
    path.write_bytes(checkpoint[: int(end * len(checkpoint)) if isinstance(end, float) else end])
    module = small_net()
    before, hung = copy.deepcopy(module.state_dict()), surface(module)
    for model in (SmallNet, module):
        with pytest.raises(ConfigurationError, match=r"half\.ckpt is damaged: .*Load an earlier checkpoint"):
            load_pruned(path, model)
    used = trainer(pruning())
    with pytest.raises(Exception):  # noqa: B017, PT011 - torch raises what it comes upon, before anything of ours runs
        used.fit(module, loader(), ckpt_path=path)
    assert used.global_step == 0
    assert equal(module.state_dict(), before)
    assert surface(module) == hung


def test_other_faults_of_a_file_keep_their_names(tmp_path, checkpoint):
    with pytest.raises(ConfigurationError, match="No such file"):
        load_pruned(tmp_path / "nowhere.ckpt", small_net())
    with pytest.raises(ConfigurationError, match="Is a directory"):
        load_pruned(tmp_path, small_net())
    torch.save({"state_dict": {}, "where": tmp_path}, tmp_path / "unsafe.ckpt")
    for model in (SmallNet, small_net()):
        with pytest.raises(ConfigurationError, match=r"unsafe\.ckpt holds more than tensors") as refusal:
            load_pruned(tmp_path / "unsafe.ckpt", model)
        assert "Weights only load failed" in str(refusal.value.__cause__)

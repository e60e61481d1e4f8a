"""Strategies that shard the network or train it in processes of their own: masks hold, or the fit is refused in words.

All fits run in one process of its own, which starts more: groups of processes leave traces in the one that joins them.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_prune import load_pruned
from tests.fits import SmallNet, equal, fit, loader, pruning, small_net, surface, trainer, widths

pytestmark = pytest.mark.ddp
ROOT = Path(__file__).parents[2]
FULL = [12, 24, 24]


class Described(SmallNet):
    """Has what a strategy that shards the network insists on."""

    def configure_model(self):
        pass


class Sharded(FSDPStrategy):
    """A strategy of the user's own; Lightning lets it run on the CPU."""


class Offloaded(DeepSpeedStrategy):
    """A strategy of the user's own, which starts without DeepSpeed or a GPU."""

    def __init__(self):
        DDPStrategy.__init__(self)

    setup_environment = DDPStrategy.setup_environment
    setup_distributed = DDPStrategy.setup_distributed


SHARDING = {
    "FSDP": Sharded,
    "DeepSpeed": Offloaded,
    "ModelParallel": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1),
}
NAMES = {"FSDP": "Sharded", "DeepSpeed": "Offloaded", "ModelParallel": "ModelParallelStrategy"}
LAUNCHED = [("ddp_fork", "rounds"), ("ddp_notebook", "end")]


def attempt(shrink, strategy, devices):
    """Fit; returns what it was refused with, and whether the module is what it was."""
    module = Described()
    before, hung = copy.deepcopy(module.state_dict()), surface(module)
    try:
        fit(pruning(shrink=shrink), module=module, strategy=strategy, devices=devices, epochs=2)
    except Exception as error:
        return {"words": str(error), "untouched": equal(module.state_dict(), before) and surface(module) == hung}
    return {"words": "", "untouched": False}


def masked_in_two_processes(folder):
    """What is in the hands of the main process after a fit that forked two others, and after one fit more."""
    module, callback = small_net(), pruning(shrink="never", scope="group", directory=str(folder))
    _, used = fit(callback, module=module, strategy="ddp_fork", devices=2, epochs=2)
    found = {"weights": copy.deepcopy(module.state_dict()), "widths": widths(module)}
    found["metrics"] = {k: float(v) for k, v in used.callback_metrics.items() if k.startswith("prune/")}
    again = small_net(seed=5)
    later = trainer(pruning(shrink="end", scope="group"), epochs=3)
    later.fit(again, loader(), ckpt_path=folder / "pruned.ckpt")
    return {**found, "shrunk": widths(again)}


def main(folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # First what forks: a process that has trained itself has threads, which a fork does not survive.
    found = {f"{strategy} {shrink}": attempt(shrink, strategy, 2) for strategy, shrink in LAUNCHED}
    found["masked"] = masked_in_two_processes(folder)
    for name, make in SHARDING.items():
        for shrink in ("rounds", "never"):
            found[f"{name} {shrink}"] = attempt(shrink, make(), 1)
    torch.save(found, folder / "found.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strategies")
    command = [sys.executable, "-m", "tests.unit.test_strategies", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("shrink", ["rounds", "never"])
@pytest.mark.parametrize("name", SHARDING)
def test_a_strategy_that_shards_the_network_is_refused(found, name, shrink):
    result = found[f"{name} {shrink}"]
    assert f"{NAMES[name]} shards the parameters" in result["words"]
    assert "Prune with strategy='ddp' or on one device" in result["words"]
    assert result["untouched"]


@pytest.mark.parametrize(("strategy", "shrink"), LAUNCHED)
def test_shrinking_in_processes_of_the_strategys_own_is_refused(found, strategy, shrink):
    result = found[f"{strategy} {shrink}"]
    assert "DDPStrategy(start_method='fork') trains in processes of its own" in result["words"]
    assert "Use strategy='ddp' in a script, one device, or shrink='never'." in result["words"]
    assert result["untouched"]


def test_masks_made_in_other_processes_arrive_in_the_main_one(found, folder):
    result = found["masked"]
    assert result["widths"] == FULL
    assert int((result["weights"]["net.9.weight"] == 0).all(dim=0).sum()) == 12
    assert (result["metrics"]["prune/removed"], result["metrics"]["prune/channels"]) == (0.5, 30)
    saved = load_pruned(folder / "pruned.ckpt", SmallNet)
    assert equal(saved.state_dict(), result["weights"])
    assert (folder / "report.json").exists()


def test_what_was_masked_there_can_be_shrunk_on_one_device(found):
    assert found["masked"]["shrunk"] == [6, 12, 12]


def test_the_callback_can_be_sent_to_another_process():
    callback = pruning(shrink="never", scope="group")
    sent = pickle.loads(pickle.dumps(callback))
    module, _ = fit(sent, epochs=2)
    assert equal(module.state_dict(), fit(callback, epochs=2)[0].state_dict())


if __name__ == "__main__":
    main(Path(sys.argv[1]))

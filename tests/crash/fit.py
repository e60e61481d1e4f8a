"""A fit that says what it is about to do, so that it can be killed right then, and goes on from its last checkpoint.

``python -m tests.crash.fit FOLDER WAY`` trains to the end, or, where ``FOLDER`` holds checkpoints, the rest of the way.
"""

from __future__ import annotations

import copy
import io
import json
import sys
import time
import warnings
import zipfile
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler

from lightning_prune import ChannelPruning, Linear, load_pruned
from tests.fits import BATCH_SIZE, BATCHES, Resumable, SmallNet, equal, images, loader, trainer

EPOCHS = 5
BETWEEN_CHECKPOINTS = BATCHES + 1  # never the last batch of an epoch: from there Lightning skips its validation
FIVE_ROUNDS = Linear(3, 27, 6, "step")
WAYS = {
    "shrunk": {"remove": 0.6, "of": "params", "criterion": "taylor", "schedule": FIVE_ROUNDS, "recalibrate": 1},
    "masked": {"remove": 0.6, "of": "channels", "criterion": "random", "schedule": FIVE_ROUNDS, "shrink": "end"},
}


class Net(SmallNet):
    """Logs every step by itself, since in a resumed epoch Lightning takes means over the rest of it only.

    And a number that never changes, once an epoch: where Lightning loses that, it loses all metrics of the epoch.
    """

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=False)
        self.log("witness", 1.0, on_step=False, on_epoch=True)
        return loss


class Shuffled(Sampler):
    """Another order in each epoch, which Lightning restores because it tells the sampler the epoch."""

    def __init__(self, count):
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Journal(Logger):
    """Appends every row to a file at once; a line that a kill has cut off is no row."""

    name, version = "journal", 0

    def __init__(self, path):
        super().__init__()
        self.path = path

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        with open(self.path, "a") as file:
            file.write("\n" + json.dumps({"step": step, "metrics": metrics}))


class Written(TorchCheckpointIO):
    """Says when it writes.

    Files of an epoch's end are written by Lightning: to a temporary file, then moved. Those in the middle of an epoch
    are written in place, as a plain ``torch.save`` would, and as Lightning's own do where the folder for temporary
    files lies on another file system, so that moving means copying.
    """

    def __init__(self, announce):
        self.announce = announce

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        name = Path(path).stem
        self.announce(f"save {name}")
        if name.endswith("end"):
            super().save_checkpoint(checkpoint, path)
        else:
            content = io.BytesIO()
            torch.save(checkpoint, content)
            half = len(content.getvalue()) // 2
            with open(path, "wb", buffering=0) as file:
                file.write(content.getvalue()[:half])
                self.announce(f"half {name}")
                file.write(content.getvalue()[half:])
        self.announce(f"saved {name}")


class Pruning(ChannelPruning):
    """Says when a round begins, and when it has pruned but not yet taken note of it."""

    def select(self, network, level):
        self.announce(f"round {len(self._record['rounds'])}")
        return super().select(network, level)

    def _reinitialise(self, network):
        super()._reinitialise(network)
        self.announce(f"pruned {len(self._record['rounds'])}")


class Batches(L.Callback):
    """Says when a batch begins."""

    def __init__(self, announce):
        self.announce = announce

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.announce(f"batch {trainer.current_epoch * BATCHES + batch_idx}")


def go_on(folder, way, announce):
    """Resume from the newest checkpoint that can be read, else start."""
    for path in sorted((folder / "checkpoints").glob("step=*.ckpt"), key=age, reverse=True):
        if complete(path):
            train(folder, way, announce, fresh_net(seed=99), path)
            return
        refused(folder, way, path)
    train(folder, way, announce, fresh_net(seed=0), None)


def age(path):
    """Steps until a checkpoint; that of an epoch's end comes after one of the same step."""
    step, _, end = path.stem.removeprefix("step=").partition("-")
    return int(step), end


def complete(path):
    """Whether a file was written to its end, by a judge that does not ask torch."""
    return zipfile.is_zipfile(path)


def refused(folder, way, path):
    """Nothing takes a half-written file for a checkpoint, or is changed by the attempt."""
    module = fresh_net(seed=0)
    before = copy.deepcopy(module.state_dict())
    used, _ = fitting(folder / "nowhere", way, print)
    attempts = [lambda: used.fit(module, shuffled(), loader(2, seed=7), ckpt_path=path)]
    attempts += [partial(load_pruned, path, model) for model in (Net, module)]
    said = [error_of(attempt) for attempt in attempts]
    assert None not in said, f"{path} was loaded: {said}"
    assert all("is damaged" in words for words in said[1:]), said
    assert equal(module.state_dict(), before)
    with open(folder / "refused", "a") as file:
        file.write(f"{path.stem}: {said}\n")


def error_of(attempt):
    """What an attempt raises, None if it succeeds."""
    try:
        attempt()
    except Exception as error:
        return repr(error)
    return None


def fresh_net(seed):
    torch.manual_seed(seed)
    return Net()


def shuffled():
    return Resumable(images(), sampler=Shuffled(BATCHES * BATCH_SIZE), batch_size=BATCH_SIZE)


def fitting(folder, way, announce):
    """A Trainer with everything that this fit needs, and the callback that prunes."""
    pruning = Pruning(**WAYS[way])
    pruning.announce = announce
    kept = {"dirpath": folder / "checkpoints", "save_top_k": -1, "enable_version_counter": False}
    used = trainer(
        Batches(announce),
        pruning,
        ModelCheckpoint(filename="{step}", every_n_train_steps=BETWEEN_CHECKPOINTS, **kept),
        ModelCheckpoint(filename="{step}-end", save_on_train_epoch_end=True, **kept),
        epochs=EPOCHS,
        logger=Journal(folder / "journal"),
        log_every_n_steps=1,
        enable_checkpointing=True,
        plugins=[Written(announce)],
    )
    return used, pruning


def train(folder, way, announce, module, path):
    """Train to the end and write down what came of it."""
    used, pruning = fitting(folder, way, announce)
    used.fit(module, shuffled(), loader(2, seed=7), ckpt_path=path)
    announce("end")
    result = {
        "weights": module.state_dict(),
        "optimizer": used.optimizers[0].state_dict(),
        "schedule": used.lr_scheduler_configs[0].scheduler.state_dict(),
        "record": {key: value for key, value in pruning._record.items() if key != "before"},  # holds a measured latency
        "history": [list(entry) for entry in pruning.report.history],
        "widths": [[group.name, group.before, group.after] for group in pruning.report.groups],
        "pruned": (folder / "checkpoints" / "pruned.ckpt").is_file(),
    }
    torch.save(result, folder / "result.pt")


def events_of_an_uninterrupted_fit(folder, way):
    """Train to the end, and write down every announcement and when it was made."""
    events = []
    go_on(folder, way, lambda event: events.append([event, time.monotonic()]))
    (folder / "events").write_text(json.dumps(events))


def prepare(folder):
    """What every process of the test does first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


if __name__ == "__main__":
    for way in sys.argv[2:]:
        prepare(Path(sys.argv[1]) / way)
        events_of_an_uninterrupted_fit(Path(sys.argv[1]) / way, way)

"""A fit with three shrinks that is stopped and resumed ends like one that is not, whatever else the Trainer has to do.

``test_contract`` shows this for every way of pruning; this file for one of them and every way of training. Checkpoints
are written between optimizer steps, since Lightning saves no gradients gathered so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

from lightning_prune import ChannelPruning, Linear
from lightning_prune.checkpoint import KEY
from tests.fits import BATCHES, Rows, SmallNet, equal, loader, pruning, small_net, trainer, widths

EPOCHS = 4
SHRINKS = Linear(0.6, 3.6, 1.5, "epoch")  # none at the start of an epoch, and none between two accumulations


class ByStep(SmallNet):
    """Logs no means over epochs, which Lightning takes over the rest of a resumed epoch only."""

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=False)
        return loss


class OneCycle(ByStep):
    """Counts its steps itself: asked for ``estimated_stepping_batches``, Lightning forgets where the loader was."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3)
        schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=EPOCHS * BATCHES)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class CosineByEpoch(ByStep):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
        return [optimizer], [CosineAnnealingLR(optimizer, T_max=EPOCHS)]


class TwoOptimizers(ByStep):
    """One for the body and one, with a schedule of its own, for the head; both stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            schedule.step()

    def configure_optimizers(self):
        body = torch.optim.SGD(self.net[:9].parameters(), lr=0.05, momentum=0.9)
        head = torch.optim.Adam(self.net[9].parameters(), lr=0.01, amsgrad=True)
        return [body, head], [CosineAnnealingLR(body, T_max=30), StepLR(head, 5)]


class Compiled(ByStep):
    def __init__(self):
        super().__init__()
        self.net[3].compile(backend="eager")  # a part, since dynamo takes its time after each shrink


@dataclass(frozen=True)
class Way:
    """A way of training, stopped in the middle of the second epoch and at the end of one, each after some shrink.

    Args:
        module: Class of the network.
        company: Makes the other callbacks.
        trainer: Arguments of the Trainer.
        steps: What ``trainer.global_step`` counts in an epoch.
        rows: What loggers count in an epoch.
        end: The epoch after which the fit is stopped.
        pruning: Arguments of the callback that prunes.
    """

    module: type[SmallNet] = ByStep
    company: Callable[[], list[Any]] = list
    trainer: dict[str, Any] = field(default_factory=dict)
    steps: int = BATCHES
    rows: int = BATCHES
    end: int = 1
    pruning: dict[str, Any] = field(default_factory=dict)


WAYS = {
    "sgd and one cycle": Way(OneCycle, company=lambda: [LearningRateMonitor("step")]),
    "adamw and cosine": Way(CosineByEpoch, trainer={"gradient_clip_val": 0.1}, pruning={"criterion": "taylor"}),
    "two optimizers": Way(TwoOptimizers, steps=2 * BATCHES),
    "accumulation": Way(trainer={"accumulate_grad_batches": 3}, steps=BATCHES // 3, rows=BATCHES // 3),
    "bf16-mixed": Way(trainer={"precision": "bf16-mixed"}, pruning={"criterion": "taylor"}),
    "ema": Way(company=lambda: [EMAWeightAveraging(decay=0.7)]),
    # In the middle of an epoch of averaging, Lightning's own state of SWA is not restored: its callback sets itself up
    # at the start of an epoch. So the averaging begins with the third, and that is where the fit is stopped.
    "swa": Way(CosineByEpoch, company=lambda: [StochasticWeightAveraging(0.02, 3, annealing_epochs=2)], end=2),
    "compiled": Way(Compiled),
}


class Stopped:
    """A fit to the end, and the checkpoints of where it might have been stopped."""

    def __init__(self, way, folder):
        self.way, self.folder = way, folder
        self.module, self.callback, self.logger, self.trainer = fit(way, folder, seed=0)
        self.trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)

    def checkpoint(self, where):
        """The file of where the fit is stopped, and the number of the first row after it."""
        if where == "middle":
            return self.folder / f"step={self.way.steps * 3 // 2}.ckpt", self.way.rows * 3 // 2
        return self.folder / f"epoch={self.way.end}.ckpt", self.way.rows * (self.way.end + 1)


def fit(way, folder, seed, **arguments):
    """One fit of a new module."""
    callback, logger, module = three_shrinks(**way.pruning), Rows(), new(way.module, seed)
    kept = {"dirpath": folder, "save_top_k": -1, "enable_version_counter": False}
    used = trainer(
        callback,
        *way.company(),
        ModelCheckpoint(filename="{epoch}", **kept),
        ModelCheckpoint(filename="{step}", every_n_train_steps=way.steps * 3 // 2, **kept),
        epochs=EPOCHS,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=True,
        **way.trainer,
    )
    used.fit(module, loader(), loader(2, seed=7), **arguments)
    return module, callback, logger, used


def new(kind, seed):
    torch.manual_seed(seed)
    return kind()


def three_shrinks(**arguments):
    return ChannelPruning(**{"remove": 0.6, "of": "channels", "criterion": "l2", "schedule": SHRINKS, **arguments})


@pytest.fixture(scope="module", params=WAYS)
def stopped(request, tmp_path_factory):
    return Stopped(WAYS[request.param], tmp_path_factory.mktemp("fit"))


@pytest.mark.parametrize("where", ["middle", "end"])
def test_a_resumed_fit_ends_like_one_that_was_not_stopped(stopped, where, tmp_path):
    path, first = stopped.checkpoint(where)
    start = torch.load(path, weights_only=True)
    module, callback, logger, used = fit(stopped.way, tmp_path, seed=99, ckpt_path=path)
    assert 0 < len(start[KEY]["rounds"]) < len(stopped.callback.report.history) == 3
    assert equal(module.state_dict(), stopped.module.state_dict())
    assert callback.report.history == stopped.callback.report.history
    assert callback.report.groups == stopped.callback.report.groups
    rows = [row for row in stopped.logger.rows if row[0] >= first]
    assert len(rows) > stopped.way.rows
    assert [row for row in logger.rows if row[0] >= first] == rows
    used.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    differing = [name for name, one, other in saved(stopped.folder, tmp_path) if not equal(one, other)]
    assert differing == []


def saved(first, second):
    """What the last checkpoints in two folders hold, but for the names of the files that were written on the way."""
    files = [torch.load(folder / "last.ckpt", weights_only=True) for folder in (first, second)]
    for file in files:
        file["callbacks"] = {name: state for name, state in file["callbacks"].items() if "ModelCheckpoint" not in name}
    assert files[0].keys() == files[1].keys()
    return [(name, value, files[1][name]) for name, value in files[0].items()]


@pytest.mark.parametrize("shrink", ["rounds", "end", "never"])
def test_a_fit_resumed_from_its_very_end_does_what_is_due_at_the_end(shrink, tmp_path):
    def halving():
        return pruning(shrink=shrink, scope="group")

    whole, done = small_net(), halving()
    keep = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1)
    trainer(done, keep, enable_checkpointing=True).fit(whole, loader())
    module, callback = small_net(seed=99), halving()
    (tmp_path / "kept" / "pruned.ckpt").rename(tmp_path / "pruned.ckpt")
    keep = ModelCheckpoint(tmp_path / "kept")
    trainer(callback, keep, enable_checkpointing=True).fit(
        module, loader(), ckpt_path=tmp_path / "kept" / "epoch=2.ckpt"
    )
    assert widths(module) == widths(whole)
    assert equal(module.state_dict(), whole.state_dict())
    assert callback.report.groups == done.report.groups
    assert callback.report.history == done.report.history
    again, first = (torch.load(folder / "pruned.ckpt", weights_only=True) for folder in (tmp_path / "kept", tmp_path))
    assert equal(again["state_dict"], first["state_dict"])
    assert equal(again[KEY], first[KEY])

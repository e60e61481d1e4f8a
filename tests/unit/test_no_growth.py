"""Two hundred rounds in one process leave memory flat: nothing of an earlier round is kept."""

from __future__ import annotations

import gc
import sys

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_prune import ChannelPruning, Linear, shrink, trace
from lightning_prune.callbacks.network import Network
from lightning_prune.graph.analysis import Analysis
from lightning_prune.graph.channels import ChannelGraph
from lightning_prune.graph.tracer import named_leaves
from lightning_prune.masks import Masks
from lightning_prune.surgery import resized
from lightning_prune.surgery.attributes import integer_settings, write_settings
from lightning_prune.surgery.resize import Cut, resize, resize_optimizers
from lightning_prune.surgery.transaction import Transaction
from tests.fits import optimizer_hooks, surface, trainer

EARLY, ROUNDS = 50, 200
SHRINKS = 90
"""Rounds of the fit that traces again after each."""
OURS = (Analysis, ChannelGraph, Masks, Network, Transaction)
BLOCKS_PER_ROUND = 120
"""Blocks of memory that a round may leave: numbers for the record, the log that pytest keeps, and what is remembered of
widths that were seen for the first time; a graph has thousands."""
BYTES_PER_ROUND = 16
"""Memory of tensors that a round may leave: where the channel is that it masked."""


class Census:
    """What is alive in this process, and what hangs on a module and its optimizers."""

    def __init__(self, module, *optimizers):
        gc.collect()
        self.surface = surface(module), optimizer_hooks(optimizers)
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
        self.tensors, self.bytes = len(tensors), sum(storages.values())
        del tensors, storages
        self.ours = {kind.__name__: sum(type(thing) is kind for thing in gc.get_objects()) for kind in OURS}
        self.blocks = sys.getallocatedblocks()


def assert_flat(early, late, rounds=ROUNDS - EARLY):
    assert late.ours == early.ours
    assert late.surface == early.surface
    assert late.tensors <= early.tensors
    assert late.bytes - early.bytes <= BYTES_PER_ROUND * rounds
    assert late.blocks - early.blocks <= BLOCKS_PER_ROUND * rounds


def conv_net():
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))


def step(model, optimizer, images):
    optimizer.zero_grad()
    model(images).square().mean().backward()
    optimizer.step()


def mask_and_unmask(model, graph, optimizer, images):
    """A step under masks, as the callback makes it; then nothing is masked."""
    masks, tensors = Masks(graph), named_leaves(model)
    masks.set({name: torch.rand(width) < 0.5 for name, width in graph.widths.items()})
    handle = optimizer.register_step_post_hook(lambda *_: masks.apply(tensors))
    masks.apply(tensors)
    masks.apply_optimizer_state(tensors, [optimizer])
    step(model, optimizer, images)
    masks.apply_gradients(tensors)
    masks.set({name: torch.ones(width, dtype=torch.bool) for name, width in graph.widths.items()})
    handle.remove()


def cut_for_a_moment(model, graph, images):
    with resized(model, graph, {name: torch.arange(width // 2) for name, width in graph.widths.items()}):
        model(images)


def shrink_and_widen(model, graph, optimizer, images):
    """Remove the last channel of each group, train, and put a copy of the first in its place."""
    before = integer_settings(model)
    shrunk = shrink(model, graph, {name: torch.arange(width - 1) for name, width in graph.widths.items()}, [optimizer])
    step(model, optimizer, images)
    tensors, wider = named_leaves(model), {}
    for group in graph.groups.values():
        order = torch.tensor([*range(group.width - 1), 0])
        for slot in group.slots:
            wider.setdefault(slot.tensor, []).append(Cut(slot.dim, slot.index[order].flatten()))
    old = resize(tensors, wider)
    resize_optimizers([optimizer], tensors, wider, old)
    write_settings(model, {setting: before[setting] for setting in shrunk.settings})


def test_masks_trial_cuts_shrinks_and_widenings():
    model, images = conv_net(), torch.randn(4, 2, 4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer, images)
    shapes = [tensor.shape for tensor in model.state_dict().values()]
    for number in range(1, ROUNDS + 1):
        graph = trace(model, images)
        mask_and_unmask(model, graph, optimizer, images)
        cut_for_a_moment(model, graph, images)
        shrink_and_widen(model, graph, optimizer, images)
        assert [tensor.shape for tensor in model.state_dict().values()] == shapes
        if number == EARLY:
            early = Census(model, optimizer)
    assert_flat(early, Census(model, optimizer))


class Wide(L.LightningModule):
    """A classifier with enough channels to lose one in each round."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 250), nn.ReLU(), nn.Linear(250, 3))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Counts(L.Callback):
    """Takes a census after some steps."""

    def __init__(self, *steps):
        self.seen = dict.fromkeys(steps)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.seen:
            self.seen[trainer.global_step] = Census(pl_module, *trainer.optimizers)


@pytest.mark.parametrize(("shrink", "rounds"), [("rounds", SHRINKS), ("never", ROUNDS)])
def test_a_fit_of_one_round_in_each_step(shrink, rounds):
    data = DataLoader([(torch.randn(8, 4), torch.arange(8) % 3) for _ in range(EARLY - 10)], batch_size=None)
    schedule = Linear(0, rounds - 1, 1, "step")
    pruning = ChannelPruning("random", remove=rounds / 250, of="channels", schedule=schedule, shrink=shrink)
    counts = Counts(EARLY, rounds)
    trainer(pruning, counts, max_steps=rounds, epochs=-1).fit(Wide(), data)
    assert len(pruning.report.history) == rounds
    assert_flat(counts.seen[EARLY], counts.seen[rounds], rounds - EARLY)

"""Training after a shrink is training a small network that was given the same weights and optimizer state."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_prune import OneShot
from tests.fits import BATCHES, OPTIMIZERS, SmallNet, equal, fit, loader, pruning, small_net, trainer, widths

AFTER = BATCHES + 2  # optimizer steps before the shrink
EPOCHS = 3


def halves(module, optimizer):
    """The tensors of a network whose every group has lost the odd channels, and the optimizer state, by plain indexing.

    Returns:
        State dict, and optimizer state by position of the parameter.
    """
    cut = {  # tensor: dimensions of which every second position stays
        "net.0": (0,), "net.1": (0,), "net.3.expand": (0, 1), "net.3.depthwise": (0,), "net.3.norm": (0,),
        "net.3.project": (0, 1), "net.4": (0, 1), "net.5": (0,), "net.9.weight": (1,), "net.9.bias": (),
    }  # fmt: skip

    def sliced(name, value):
        dims = cut.get(name, cut.get(name.rpartition(".")[0]))
        for dim in dims if value.dim() else ():
            if dim < value.dim():
                value = value.index_select(dim, torch.arange(0, value.shape[dim], 2))
        return value.clone()

    state = {name: sliced(name, value) for name, value in module.state_dict().items()}
    names = [name for name, _ in module.named_parameters()]
    slots = optimizer.state_dict()["state"]
    return state, {i: {k: sliced(names[i], v) for k, v in slot.items()} for i, slot in slots.items()}


class Fork(L.Callback):
    """Takes down, right before the shrink, what the small network should start from."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == AFTER:
            self.weights, self.slots = halves(pl_module, trainer.optimizers[0])
            self.groups = copy.deepcopy(trainer.optimizers[0].state_dict()["param_groups"])
            self.schedule = copy.deepcopy(trainer.lr_scheduler_configs[0].scheduler.state_dict())


class Begin(L.Callback):
    """Puts that into the small network before its first step, and its training to where the other one was."""

    def __init__(self, fork):
        self.fork = fork

    def on_train_start(self, trainer, pl_module):
        state = {"state": copy.deepcopy(self.fork.slots), "param_groups": copy.deepcopy(self.fork.groups)}
        trainer.optimizers[0].load_state_dict(state)
        trainer.lr_scheduler_configs[0].scheduler.load_state_dict(self.fork.schedule)


def rest():
    """The batches after the shrink."""
    return DataLoader([batch for _ in range(EPOCHS) for batch in loader()][AFTER:], batch_size=None)


def odd_ones_go(network, level):
    return {name: torch.arange(group.width) % 2 == 0 for name, group in network.graph.groups.items()}


@pytest.mark.parametrize(("optimizer", "clip"), [*((name, None) for name in OPTIMIZERS), ("sgd", 0.5), ("adam", 0.5)])
def test_a_fresh_small_network_trains_the_same(optimizer, clip):
    callback, fork = pruning(schedule=OneShot(AFTER, "step")), Fork()
    callback.select = odd_ones_go
    pruned, used = fit(fork, callback, module=small_net(optimizer=optimizer), epochs=EPOCHS, gradient_clip_val=clip)
    assert widths(pruned) == [6, 12, 12]

    fresh = SmallNet(width=6, optimizer=optimizer)
    fresh.load_state_dict(fork.weights)
    again = trainer(Begin(fork), epochs=1, gradient_clip_val=clip)
    again.fit(fresh, rest())

    assert equal(fresh.state_dict(), pruned.state_dict())
    assert equal(again.optimizers[0].state_dict(), used.optimizers[0].state_dict())


def test_the_comparison_can_fail():
    """Without the sliced optimizer state the small network trains differently."""
    callback, fork = pruning(schedule=OneShot(AFTER, "step")), Fork()
    callback.select = odd_ones_go
    pruned, _ = fit(fork, callback, epochs=EPOCHS)
    fresh = SmallNet(width=6)
    fresh.load_state_dict(fork.weights)
    fit(module=fresh, data=rest(), epochs=1)
    assert not equal(fresh.state_dict(), pruned.state_dict())

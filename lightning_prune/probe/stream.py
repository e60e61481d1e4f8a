"""Gradients of one training batch after another, while the weights change in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count, cycle, islice
from typing import Any

import torch
from torch import Tensor

from lightning_prune.probe.backward import LocalBackward
from lightning_prune.probe.data import NoBatchError, fresh_batches
from lightning_prune.probe.probe import Probe
from lightning_prune.probe.runs import SEED

_WHOLE_EPOCH = 2**62
_READ_AT_ONCE = 8
"""Batches held at a time: a sandbox for each would take as long as the gradients of a small network."""


def gradient_stream(probe: Probe) -> Iterator[dict[str, Tensor]]:
    """Gradients as of :meth:`Probe.gradients`, without end and each with the weights as they are when it is asked for.

    Batches are read a few at a time, epoch after epoch in another order; the last observed ones take turns where the
    training data cannot be read anew.

    Args:
        probe: Runs the network.

    Raises:
        PruneError: If the training step gives no loss.
        TraceError: If there is no batch or the user's code fails.
    """
    backward = LocalBackward(probe._module.parameters()) if probe._is_distributed() else nullcontext()
    for number, batch in enumerate(_batches(probe)):
        yield probe._gradients_of(batch, SEED + number, backward)


def _batches(probe: Probe) -> Iterator[Any]:
    try:
        probe._fresh(1)
    except NoBatchError:
        yield from cycle(probe.batches(len(probe._observed) or 1))
    trainer = probe._trainer
    assert trainer is not None
    for epoch in count():
        seed = SEED + trainer.global_rank + epoch * trainer.world_size
        reading = fresh_batches(trainer, probe._module, _WHOLE_EPOCH, seed)
        for number in count():
            with probe._sandbox("reading the training data", True, seed=seed + number), torch.no_grad():
                batches = list(islice(reading, _READ_AT_ONCE))
            yield from batches
            if len(batches) < _READ_AT_ONCE:
                break

"""The optimizers of a fit, whoever holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lightning import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch.optim import Optimizer


def optimizers_of(trainer: Trainer | None, pl_module: LightningModule) -> Iterator[Optimizer]:
    """Each optimizer of a fit once: those of the Trainer, those that modules hold, and those that these work through.

    Lightning knows only the first, but what refines the steps of another optimizer holds that as an attribute, and with
    manual optimization a module may step one that it keeps to itself.

    Args:
        trainer: The Trainer in use, if any.
        pl_module: The user's module.
    """
    seen: set[int] = set()
    pending: list[object] = [*(trainer.optimizers if trainer is not None else ()), *pl_module.modules()]
    while pending:
        holder = pending.pop(0)
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        if isinstance(holder, Optimizer):
            yield holder
        pending += [found for value in vars(holder).values() for found in _optimizers_in(value)]


def _optimizers_in(value: object) -> list[Optimizer]:
    if isinstance(value, Mapping):
        value = list(value.values())
    items = value if isinstance(value, (list, tuple)) else [value]
    plain = [item.optimizer if isinstance(item, LightningOptimizer) else item for item in items]
    return [item for item in plain if isinstance(item, Optimizer)]

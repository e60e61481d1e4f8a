"""Rewinding: optimizers and learning rate schedules go back to where they were at an earlier step."""

from __future__ import annotations

import copy
from typing import Any

from lightning import Trainer
from torch import nn
from torch.optim import Optimizer


def taken_down(trainer: Trainer, module: nn.Module) -> dict[str, Any]:
    """What optimizers and schedules are now, in plain types; the state of parameters by their names.

    Args:
        trainer: The Trainer.
        module: Its module.
    """
    return {
        "step": trainer.global_step,
        "optimizers": [_state_by_name(optimizer, module) for optimizer in trainer.optimizers],
        "schedules": [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
    }


def rewind(trainer: Trainer, module: nn.Module, snapshot: dict[str, Any]) -> None:
    """Put optimizers and schedules back to what :func:`taken_down` found."""
    for optimizer, saved in zip(trainer.optimizers, snapshot["optimizers"], strict=True):
        present = optimizer.state_dict()
        indices = _indices(optimizer, module)
        groups = zip(saved["groups"], present["param_groups"], strict=True)
        optimizer.load_state_dict(
            {
                "state": {indices[name]: copy.deepcopy(state) for name, state in saved["state"].items()},
                "param_groups": [{**copy.deepcopy(old), "params": now["params"]} for old, now in groups],
            }
        )
    for config, state in zip(trainer.lr_scheduler_configs, snapshot["schedules"], strict=True):
        config.scheduler.load_state_dict(copy.deepcopy(state))


def _indices(optimizer: Optimizer, module: nn.Module) -> dict[str, int]:
    """Place of each parameter among those of an optimizer, by its name."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {names[id(parameter)]: place for place, parameter in enumerate(held) if id(parameter) in names}


def _state_by_name(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    saved = copy.deepcopy(optimizer.state_dict())
    indices = _indices(optimizer, module)
    return {
        "state": {name: saved["state"][place] for name, place in indices.items() if place in saved["state"]},
        "groups": [{key: value for key, value in g.items() if key != "params"} for g in saved["param_groups"]],
    }

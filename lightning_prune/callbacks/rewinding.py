"""Rewinding: optimizers and learning rate schedules go back to where they were at an earlier step, after each part."""

from __future__ import annotations

import copy
from typing import Any

from lightning import Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_prune.choices import check_at_least
from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import Geometric, Position


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


def equal_parts(rounds: int) -> Geometric:
    """A schedule with rounds between equal parts of the fit.

    Raises:
        ConfigurationError: If there is no round.
    """
    check_at_least(1, whole=True, rounds=rounds)
    part = 1 / (rounds + 1)
    return Geometric(part, rounds * part, part, "fraction")


def check_parts(rounds: int, rewind_to: int, taken_down: bool, length: Position) -> None:
    """Refuse parts of a fit that have not one step each, or a first part that ends before the step to rewind to.

    Args:
        rounds: Number of rounds.
        rewind_to: The step to rewind to.
        taken_down: Whether that step is behind us.
        length: Length of the fit; nothing is refused where its steps are not known.

    Raises:
        ConfigurationError: If they do.
    """
    steps, part = length.step, length.step / (rounds + 1)
    if part < 1:
        raise ConfigurationError(
            f"{rounds} rounds divide the {steps:g} optimizer steps of this fit into {rounds + 1} parts, which is less "
            f"than one step each. Train longer or have fewer rounds."
        )
    if not taken_down and rewind_to - 1 >= part:
        raise ConfigurationError(
            f"the first round is at step {part:g} of the {steps:g} of this fit, before step {rewind_to} that it should "
            f"rewind to. Train longer, have fewer rounds, or give rewind_to an earlier step."
        )

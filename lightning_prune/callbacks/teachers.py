"""Teachers that come from files, or from an earlier state of the network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning import LightningModule
from torch import Tensor

from lightning_prune.checkpoint import load_pruned, resize_to
from lightning_prune.errors import ConfigurationError


def load_teacher(path: str, student: LightningModule) -> LightningModule:
    """The teacher in a checkpoint of the student's class.

    Args:
        path: The file, of a network that was pruned or not.
        student: The network that is to learn.

    Raises:
        ConfigurationError: If there is no such file, or it does not say how to make the teacher.
    """
    if not Path(path).is_file():
        raise ConfigurationError(f'there is no checkpoint {path!r} to load a teacher from, nor is it "start" or "ema".')
    kind = type(student)
    try:
        return load_pruned(path, kind)
    except TypeError as error:
        raise ConfigurationError(
            f"the teacher in {path!r} cannot be made anew, because its file lacks arguments of {kind.__name__} "
            f"({error}). Load it with load_pruned into an instance, and give that as the teacher."
        ) from error


def rebuilt(network: LightningModule, state: Mapping[str, Tensor] | None) -> LightningModule | None:
    """A network with a state that a checkpoint holds, whatever its widths; None without one.

    Args:
        network: A network of the same structure, which is changed.
        state: Its state dict.
    """
    if state is None:
        return None
    present = network.state_dict()
    if any(value.shape != present[name].shape for name, value in state.items()):
        resize_to(network, state, {})
    network.load_state_dict(state)
    return network

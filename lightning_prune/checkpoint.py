"""What goes into a checkpoint, and how a network of another width takes it in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn

from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.tracer import named_leaves
from lightning_prune.surgery.attributes import Setting, write_settings
from lightning_prune.surgery.resize import replace

KEY = "lightning_prune"
"""Where the record of pruning lies in a checkpoint."""
VERSION = 1

Module = TypeVar("Module", bound=LightningModule)


def plain_settings(settings: Mapping[Setting, int]) -> list[list[Any]]:
    """Settings in types that every checkpoint reader accepts."""
    return [[s.module, s.attribute, s.element, value] for s, value in settings.items()]


def settings_of(record: Mapping[str, Any]) -> dict[Setting, int]:
    """Inverse of :func:`plain_settings` on a record."""
    return {Setting(module, name, element): value for module, name, element, value in record.get("settings", [])}


def resize_to(model: nn.Module, state_dict: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Give a network the shapes of a state dict, wider or narrower, before that is loaded.

    Args:
        model: A network of the same structure.
        state_dict: The state to be loaded.
        record: The record saved beside it; may be empty.

    Raises:
        ConfigurationError: If the record is of another version or does not belong to this network.
    """
    version = record.get("version", VERSION)
    if version != VERSION:
        raise ConfigurationError(
            f"the checkpoint was pruned by a version of lightning-prune whose record is version {version}; this one "
            f"reads version {VERSION}. Load it with the version that wrote it, and export its state_dict."
        )
    modules = dict(model.named_modules())
    settings = settings_of(record)
    unknown = [s for s in settings if s.module not in modules or s.attribute not in vars(modules[s.module])]
    if unknown:
        raise ConfigurationError(
            f"the checkpoint was pruned from another network: this one has no {unknown[0].module}."
            f"{unknown[0].attribute}. Load it into the class that it was trained as."
        )
    for name, tensor in named_leaves(model).items():
        saved = state_dict.get(name)
        if saved is not None and saved.dim() == tensor.dim() and saved.shape != tensor.shape:
            replace(tensor, torch.empty(saved.shape, dtype=tensor.dtype, device=tensor.device))
    write_settings(model, settings)


class OnLoad:
    """Stands in for a module's ``on_load_checkpoint``: fits the widths before the weights are loaded.

    A class rather than a closure, so that a module which carries it can be pickled and copied.

    Args:
        module: The module.
        original: Its own hook.
        record: The record of the running fit; takes over the one from the checkpoint.
        copies: Other modules that must keep the module's shapes.
    """

    def __init__(self, module: LightningModule, record: dict[str, Any], copies: Iterable[LightningModule]) -> None:
        """See the class."""
        self.module = module
        self.original = module.on_load_checkpoint
        self.record = record
        self.copies = list(copies)

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Resize, then do what the module itself does."""
        if KEY in checkpoint:
            for module in (self.module, *self.copies):
                resize_to(module, checkpoint["state_dict"], checkpoint[KEY])
            self.record.clear()
            self.record.update(checkpoint[KEY])
        self.original(checkpoint)


class OnSave:
    """Stands in for a module's ``on_save_checkpoint``: adds the record, also to files of weights only.

    Args:
        module: The module.
        record: The record of the running fit.
    """

    def __init__(self, module: LightningModule, record: dict[str, Any]) -> None:
        """See the class."""
        self.original = module.on_save_checkpoint
        self.record = record

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Do what the module itself does, then add the record."""
        self.original(checkpoint)
        if self.record:
            checkpoint[KEY] = dict(self.record)


def load_pruned(path: str | Path, model: type[Module] | Module, **kwargs: Any) -> Module:
    """Load a checkpoint of a pruned network, without Trainer or callback.

    Args:
        path: The checkpoint file.
        model: The LightningModule class, built from the saved hyperparameters as ``load_from_checkpoint`` does, or an
            instance of any width.
        **kwargs: Passed to ``load_from_checkpoint``; for an instance only ``map_location`` and ``strict`` count.

    Returns:
        The loaded module, of the very class that was given.

    Raises:
        ConfigurationError: If the file was pruned from another network or by an incompatible version.

    Example:
        >>> import lightning as L, tempfile, torch
        >>> class Net(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(4, 8)
        >>> small = Net()
        >>> _ = small.net.weight.data.set_(torch.ones(3, 4)), small.net.bias.data.set_(torch.ones(3))
        >>> with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
        ...     torch.save({"state_dict": small.state_dict()}, file.name)
        ...     load_pruned(file.name, Net()).net.weight.shape
        torch.Size([3, 4])
    """
    if isinstance(model, LightningModule):
        checkpoint = torch.load(path, map_location=kwargs.get("map_location", "cpu"), weights_only=True)
        resize_to(model, checkpoint["state_dict"], checkpoint.get(KEY, {}))
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"], strict=kwargs.get("strict", True))
        return model
    given: type[LightningModule] = model

    class Resized(given):  # type: ignore[misc, valid-type]
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            resize_to(self, checkpoint["state_dict"], checkpoint.get(KEY, {}))
            super().on_load_checkpoint(checkpoint)

    Resized.__name__, Resized.__qualname__, Resized.__module__ = given.__name__, given.__qualname__, given.__module__
    loaded = Resized.load_from_checkpoint(path, **kwargs)
    loaded.__class__ = given
    return cast(Module, loaded)

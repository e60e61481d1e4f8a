"""What goes into a checkpoint, and how a network of another width takes it in."""

from __future__ import annotations

import copy
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_prune.compiled import uncompiled_name
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.tracer import named_leaves
from lightning_prune.graph.unregistered import loose_tensors
from lightning_prune.surgery.attributes import integer_settings, write_settings
from lightning_prune.surgery.constructors import Descriptions
from lightning_prune.surgery.resize import replace
from lightning_prune.surgery.symbols import Setting

KEY = "lightning_prune"
"""Where the record of pruning lies in a checkpoint."""
VERSION = 1

Module = TypeVar("Module", bound=nn.Module)

_LEFT_BEHIND: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
_LASTING = ("settings", "cut", "dims")


def leave_behind(module: nn.Module, record: Mapping[str, Any]) -> None:
    """Take down what later prunings of a module must know of those before, whichever callbacks do them.

    Args:
        module: The module.
        record: A record, or as much of it as there is.
    """
    _LEFT_BEHIND[module] = {key: copy.deepcopy(record[key]) for key in _LASTING if key in record}


def left_behind(module: nn.Module) -> Mapping[str, Any]:
    """The part of a record that earlier prunings of a module have left; empty if there were none."""
    return _LEFT_BEHIND.get(module, {})


def plain_settings(settings: Mapping[Setting, int], originals: Mapping[Setting, int]) -> list[list[Any]]:
    """Changed settings, with their present and their original values, in types that every checkpoint reader accepts."""
    return [[s.module, s.attribute, s.element, value, originals[s]] for s, value in settings.items()]


def settings_of(record: Mapping[str, Any]) -> dict[Setting, int]:
    """The present values in a record of :func:`plain_settings`."""
    return {Setting(*entry[:3]): entry[3] for entry in record.get("settings", ())}


def original_settings_of(record: Mapping[str, Any]) -> dict[Setting, int]:
    """The original values in a record of :func:`plain_settings`."""
    return {Setting(*entry[:3]): entry[4] for entry in record.get("settings", ())}


def refuse_foreign(model: nn.Module, state_dict: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that this network cannot take in, before anything is changed.

    Args:
        model: The network.
        state_dict: The state to be loaded.
        record: The record saved beside it; nothing is refused where it is empty.

    Raises:
        ConfigurationError: If the record is of another version or does not belong to this network.
    """
    if not record:
        return
    if record.get("version") != VERSION:
        raise ConfigurationError(
            f"the checkpoint was pruned by a version of lightning-prune whose record is version "
            f"{record.get('version')}; this one reads version {VERSION}. Load it with the version that wrote it, and "
            f"export its state_dict."
        )
    if stranger := next(_strangers(model, state_dict, record), None):
        raise ConfigurationError(
            f"the checkpoint was pruned from another network than this {type(model).__name__}: {stranger}. Load it "
            f"into the class that it was trained as, made with the same arguments."
        )


def _strangers(model: nn.Module, state_dict: Mapping[str, Tensor], record: Mapping[str, Any]) -> Iterator[str]:
    """What in a checkpoint does not fit the network, whatever its widths."""
    settings, tensors = integer_settings(model), named_leaves(model)
    known = {*tensors, *record.get("unsaved", ())}
    yield from (f"this one has no {name}" for name in record.get("cut", ()) if name not in known)
    missing = (setting for setting in settings_of(record) if setting not in settings)
    yield from (f"this one has no number {setting.module}.{setting.attribute}" for setting in missing)
    for name, tensor in tensors.items():
        saved = state_dict.get(name)
        if saved is not None and saved.dim() != tensor.dim():
            yield f"{name} has {tensor.dim()} dimensions here and {saved.dim()} in the file"
        elif saved is not None and "dims" in record and not _reshapes_itself(model):
            sizes = enumerate(zip(tensor.shape, saved.shape, strict=True))
            differ = {dim for dim, (here, there) in sizes if here != there}
            if differ - set(record["dims"].get(name, ())):
                yield f"{name} has shape {list(tensor.shape)} here and {list(saved.shape)} in the file, not by pruning"


def _reshapes_itself(model: nn.Module) -> bool:
    """Whether the module's class has a hook of its own that may make of a checkpoint what the module can load."""
    hook = getattr(type(model), "on_load_checkpoint", None)
    return getattr(hook, "preceded", hook) not in (None, LightningModule.on_load_checkpoint)


def resize_to(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    record: Mapping[str, Any],
    undo: Mapping[Setting, int] | None = None,
) -> None:
    """Give a network the shapes of a state dict, wider or narrower, before that is loaded.

    Args:
        model: A network of the same structure.
        state_dict: The state to be loaded.
        record: The record saved beside it. Without one, what modules remember of their sizes is derived from the new
            shapes, as far as these tell.
        undo: Settings that an earlier pruning of ``model`` changed, with their original values.
    """
    descriptions = Descriptions(model) if not record else None
    unsaved: Mapping[str, Tensor] = record.get("unsaved", {})
    for name, tensor in {**named_leaves(model), **loose_tensors(model)}.items():
        saved = state_dict.get(name, unsaved.get(name))
        if saved is not None and saved.dim() == tensor.dim() and saved.shape != tensor.shape:
            replace(tensor, torch.empty(saved.shape, dtype=tensor.dtype, device=tensor.device))
        if name in unsaved:
            with torch.no_grad():
                tensor.copy_(unsaved[name])
    known = integer_settings(model)
    derived = descriptions.settings({}, guessing=True) if descriptions is not None else {}
    values = {**(undo or {}), **derived, **settings_of(record)}
    write_settings(model, {setting: value for setting, value in values.items() if setting in known})


class _Hook:
    """Stands in for a hook of a module.

    A copy of the module, be it by ``copy.deepcopy`` or by pickling, gets the module's own hook back.

    Args:
        module: The module.
        name: Name of the hook.
        record: The record of the running fit.
    """

    def __init__(self, module: LightningModule, name: str, record: dict[str, Any]) -> None:
        """See the class."""
        self.module = module
        self.was_set = name in vars(module)
        self.original: Callable[[dict[str, Any]], None] = getattr(module, name)
        self.record = record

    def __reduce__(self) -> tuple[Any, ...]:
        """What a copy of the module holds instead: the original hook, bound to the copy."""
        return copy.copy, (self.original,)


class OnLoad(_Hook):
    """Stands in for a module's ``on_load_checkpoint``: fits the widths before the weights are loaded.

    Args:
        module: The module.
        record: The record of the running fit; takes over the one from the checkpoint.
        copies: Finds other modules that must keep the module's shapes, once all callbacks are set up.
    """

    def __init__(
        self,
        module: LightningModule,
        record: dict[str, Any],
        copies: Callable[[LightningModule], Sequence[LightningModule]],
    ) -> None:
        """See the class."""
        super().__init__(module, "on_load_checkpoint", record)
        self.copies = copies

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Resize, then do what the module itself does."""
        found = checkpoint.get(KEY, {})
        undo = {**original_settings_of(left_behind(self.module)), **original_settings_of(self.record)}
        if not found and not self.record and not left_behind(self.module):
            return self.original(checkpoint)
        refuse_foreign(self.module, checkpoint["state_dict"], found)
        self._resize(checkpoint, found, undo)
        self.original(checkpoint)
        self._resize(checkpoint, found, undo)  # once more: the hook may have renamed what is to be loaded
        leave_behind(self.module, found)
        self.record.clear()
        self.record.update(copy.deepcopy(found))
        return None

    def _resize(self, checkpoint: Mapping[str, Any], found: Mapping[str, Any], undo: Mapping[Setting, int]) -> None:
        for module in (self.module, *self.copies(self.module)):
            resize_to(module, checkpoint["state_dict"], found, undo)


class OnSave(_Hook):
    """Stands in for a module's ``on_save_checkpoint``: adds the record, also to files of weights only.

    Args:
        module: The module.
        record: The record of the running fit.
    """

    def __init__(self, module: LightningModule, record: dict[str, Any]) -> None:
        """See the class."""
        super().__init__(module, "on_save_checkpoint", record)

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        """Do what the module itself does, then add the record."""
        self.original(checkpoint)
        put_record(checkpoint, self.record)


def put_record(checkpoint: dict[str, Any], record: Mapping[str, Any]) -> None:
    """Add a record to a checkpoint, as it is now; checkpoints may be written later by another thread."""
    if record:
        checkpoint[KEY] = copy.deepcopy(dict(record))


def wrap_hooks(
    module: LightningModule, record: dict[str, Any], copies: Callable[[LightningModule], Sequence[LightningModule]]
) -> None:
    """Have a module's checkpoints carry the record, and its loading fit the widths."""
    unwrap_hooks(module)
    module.on_load_checkpoint = OnLoad(module, record, copies)  # type: ignore[method-assign]
    module.on_save_checkpoint = OnSave(module, record)  # type: ignore[method-assign]


def unwrap_hooks(module: LightningModule) -> None:
    """Leave a module as it was before :func:`wrap_hooks`."""
    for name in ("on_load_checkpoint", "on_save_checkpoint"):
        hook = vars(module).get(name)
        if isinstance(hook, _Hook):
            del vars(module)[name]
            if hook.was_set:
                vars(module)[name] = hook.original


def load_pruned(path: str | Path, model: type[Module] | Module, **kwargs: Any) -> Module:
    """Load a checkpoint of a pruned network, without Trainer or callback.

    Args:
        path: The checkpoint file.
        model: The LightningModule class, built from the saved hyperparameters as ``load_from_checkpoint`` does, or an
            instance of any width; also of a plain module, for a file that has its names.
        **kwargs: For a class, whatever ``load_from_checkpoint`` takes: ``map_location``, ``strict``, ``weights_only``,
            other values for hyperparameters. For an instance the first three.

    Returns:
        The loaded module, of the very class that was given; a given instance is that instance.

    Raises:
        ConfigurationError: If there is no such file, it is damaged or no checkpoint, was pruned from another network or
            by an incompatible version, an argument is not known or missing, or the class is none of a LightningModule.
            A given instance is then as it was.

    Example:
        >>> import lightning as L, tempfile, torch
        >>> class Net(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(4, 8)
        >>> small = Net()
        >>> small.net = torch.nn.Linear(4, 3)
        >>> with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
        ...     torch.save({"state_dict": small.state_dict()}, file.name)
        ...     load_pruned(file.name, Net()).net
        Linear(in_features=4, out_features=3, bias=True)
    """
    safely = kwargs.get("weights_only") is not False
    if isinstance(model, nn.Module):
        if unknown := kwargs.keys() - {"map_location", "strict", "weights_only"}:
            raise ConfigurationError(
                f"{', '.join(sorted(unknown))} cannot be given when loading into an instance, which has its arguments "
                f"already. Give its class to have it made anew."
            )
        checkpoint = _read(path, map_location=kwargs.get("map_location", "cpu"), weights_only=safely)
        strict = kwargs.get("strict")
        return _load_into(model, checkpoint, getattr(model, "strict_loading", True) if strict is None else strict)
    if not (isinstance(model, type) and issubclass(model, LightningModule)):
        raise ConfigurationError(
            f"{model!r} is not a LightningModule class, which alone can be made from the hyperparameters in a file. "
            f"Give an instance of it."
        )
    # Read here for its record alone; mapped, so that a large file is not read twice.
    checkpoint = _read(path, map_location="cpu", weights_only=safely, mmap=True)
    if "pytorch-lightning_version" not in checkpoint:
        raise ConfigurationError(
            f"{path} holds weights only, and no hyperparameters to make a {model.__name__} with: give an instance."
        )
    try:
        with _resizing_load(model, checkpoint.get(KEY, {})):
            return model.load_from_checkpoint(path, **kwargs)
    except TypeError as error:
        if missing := _missing_arguments(model, error):
            given = ", ".join(f"{name}=..." for name in missing)
            raise ConfigurationError(
                f"{path} does not hold {', '.join(missing)}, which {model.__name__} is made with, as it was not saved "
                f"as a hyperparameter. Give it, as in load_pruned(path, {model.__name__}, {given}) or with --init on "
                f"the command line, or load into an instance."
            ) from error
        raise


def _missing_arguments(kind: type[nn.Module], error: TypeError) -> list[str]:
    """Names of the arguments without which an instance of the class, and nothing inside it, could not be made."""
    told = f"{kind.__init__.__qualname__}() missing "
    return re.findall(r"'(\w+)'", str(error)) if str(error).startswith(told) else []


def _refuse_other_files(path: str | Path) -> None:
    """Refuse what cannot be opened, and what torch never wrote."""
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except OSError as error:
        raise ConfigurationError(
            f"cannot read a checkpoint from {path}: {error.strerror}. Give the path of the file, such as the "
            f"pruned.ckpt that a fit writes into the callback's directory, or beside its checkpoints."
        ) from error
    # As torch.save begins its files, those without zip too. What is shorter may have been cut short by a crash.
    if not (b"PK".startswith(start) or start.startswith((b"PK", b"\x80"))):
        raise ConfigurationError(f"{path} is no checkpoint: it was not written by torch.save. Give a checkpoint file.")


def _read(path: str | Path, **how: Any) -> dict[str, Any]:
    """Read a checkpoint file whole, or say that it is not whole."""
    _refuse_other_files(path)
    try:
        checkpoint = torch.load(path, **how)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        with open(path, "rb") as file:
            # The table of contents comes last: a file that has one was written to its end, and the fault is another.
            whole = zipfile.is_zipfile(file)
        if whole and isinstance(error, pickle.UnpicklingError) and how.get("weights_only"):
            raise ConfigurationError(
                f"{path} holds more than tensors and plain values, such as a network that was saved as a "
                f"hyperparameter. To read that runs code of the file: give weights_only=False if you trust it."
            ) from error
        if whole:
            raise
        raise ConfigurationError(
            f"the checkpoint {path} is damaged: it ends before its table of contents, as a file does whose writing was "
            f"cut short. Load an earlier checkpoint."
        ) from error
    if isinstance(checkpoint, dict) and "state_dict" in checkpoint:
        return checkpoint
    if isinstance(checkpoint, dict) and checkpoint and all(isinstance(v, Tensor) for v in checkpoint.values()):
        return {"state_dict": checkpoint}
    raise ConfigurationError(f"{path} is neither a checkpoint of a LightningModule nor a state_dict.")


def _load_into(model: Module, checkpoint: dict[str, Any], strict: bool) -> Module:
    record = checkpoint.get(KEY, {})
    if isinstance(model, LightningModule) and is_overridden("configure_model", model):
        model.configure_model()
    if not record:
        checkpoint["state_dict"] = _named_as_in(model, checkpoint["state_dict"])
    _refuse_other_names(model, checkpoint["state_dict"])
    refuse_foreign(model, checkpoint["state_dict"], record)
    resize_to(model, checkpoint["state_dict"], record, original_settings_of(left_behind(model)))
    leave_behind(model, record)
    if isinstance(model, LightningModule):
        model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"], strict=strict)
    return model


def _refuse_other_names(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse a file that has nothing in common with a plain module, as that of the module around it."""
    if not isinstance(model, LightningModule) and state_dict and not state_dict.keys() & model.state_dict().keys():
        raise ConfigurationError(
            f"the file has none of the names of this {type(model).__name__}, but names such as "
            f"{next(iter(state_dict))!r}. If it is the checkpoint of a LightningModule, load it into that, and take "
            f"{type(model).__name__} out of it."
        )


def _named_as_in(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the model's own names, whichever of the two has parts that are compiled."""
    own = {uncompiled_name(name): name for name in model.state_dict()}
    return {own.get(uncompiled_name(name), name): value for name, value in state_dict.items()}


@contextmanager
def _resizing_load(kind: type[LightningModule], record: Mapping[str, Any]) -> Iterator[None]:
    """Let instances of a class (or of its subclasses, which a checkpoint may name) take in any width for a while."""

    def fit(module: LightningModule, state_dict: Mapping[str, Tensor]) -> None:
        refuse_foreign(module, state_dict, record)
        resize_to(module, state_dict, record)
        leave_behind(module, record)

    # The first, so that the user's own hook sees what will be loaded fit; the second for subclasses that override it.
    with (
        _preceded(kind, "on_load_checkpoint", lambda module, checkpoint: fit(module, checkpoint["state_dict"])),
        _preceded(kind, "load_state_dict", fit),
    ):
        yield


@contextmanager
def _preceded(kind: type[LightningModule], name: str, act: Callable[[LightningModule, Any], None]) -> Iterator[None]:
    """Do something before a method of a class runs, given its first argument."""
    own, original = vars(kind).get(name), getattr(kind, name)

    def method(self: LightningModule, *args: Any, **kwargs: Any) -> Any:
        act(self, args[0] if args else next(iter(kwargs.values())))
        return original(self, *args, **kwargs)

    method.preceded = original  # type: ignore[attr-defined]
    setattr(kind, name, method)
    try:
        yield
    finally:
        if own is None:
            delattr(kind, name)
        else:
            setattr(kind, name, own)

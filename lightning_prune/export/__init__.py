"""A pruned network in forms that need no library of ours to load."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.choices import unknown_name
from lightning_prune.compiled import uncompiled_name
from lightning_prune.errors import ConfigurationError
from lightning_prune.export.calls import at_rest, call_of, reason, refuse_valueless, uncompiled
from lightning_prune.export.check import compare
from lightning_prune.export.onnx_file import require_onnx, return_tensors, run_onnx, write_onnx
from lightning_prune.export.program import exported, run_program

FORMATS = ("state_dict", "pt2", "onnx")
_SUFFIXES = {"state_dict": (".pt", ".pth", ".bin"), "pt2": (".pt2",), "onnx": (".onnx",)}
_REPLACED = {".ckpt", *(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)}


def export(model: nn.Module, form: str, example: Any, path: str | Path, *, dynamic_batch: bool = True) -> Path:
    """Write a network to a file, in evaluation mode; the network itself is left as it was.

    The file is complete or not there: it takes its place only once it is written and checked. What
    ``torch.compile`` wraps is exported as it was before, so no name has ``_orig_mod`` in it.

    Args:
        model: The network, of any width: a LightningModule, with or without a Trainer, or any other module.
        form: What to write. ``"state_dict"``: the weights under the module's own names, to be loaded with
            ``weights_only=True`` into the same class built small. ``"pt2"``: the program of ``torch.export``.
            ``"onnx"``: takes the tensors among the inputs, and gives those among the outputs, in their order.
        example: Example input of ``forward``: a tensor, a tuple of arguments or a dict of keyword arguments (or one
            tuple or dict, if that is what ``forward`` takes); it goes to the device of the network. ``None``: the
            module's ``example_input_array``. Not needed for ``"state_dict"``.
        path: File to write. The suffix of a checkpoint or of another format is replaced by that of the format, a
            missing one added; folders are made.
        dynamic_batch: Leave the batch size open, which is the first dimension of every tensor argument that has any.
            A network that fixes it, say by a reshape to a constant, is exported with the sizes of the example, and a
            warning says so. ``False`` fixes all sizes from the start.

    Returns:
        The file that was written. ONNX weights of more than 1.8 GB lie beside it, in a file ending in ``.data``.

    Raises:
        ConfigurationError: If the format is unknown, its packages are not installed, the file cannot be written, the
            network does not take the example or cannot be exported, or the export does not compute the same: a
            relative difference of more than 1e-5 (of some roundings where the network computes in half precision).
            ONNX is compared in onnxruntime if that is installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(nn.Linear(2, 1), "state_dict", None, f"{folder}/small.ckpt").name
        'small.pt'
    """
    target = target_of(path, form)
    inner = uncompiled(model)
    refuse_valueless(inner)
    if form == "state_dict":
        with _written(target) as file:
            _save_state(inner, file)
        return target
    if form == "onnx":
        require_onnx()
    call = call_of(inner, example)
    with at_rest(inner), _written(target) as file:
        if form == "onnx":
            return_tensors(inner)
        program, calls = exported(inner, call, dynamic_batch)
        if form == "onnx":
            write_onnx(program, file)
            run = run_onnx(file)
        else:
            torch.export.save(program, file)
            run = run_program(file)
        if run is not None:
            compare(inner, program, calls, run)
    return target


def target_of(path: str | Path, form: str) -> Path:
    """The file that :func:`export` writes.

    Args:
        path: As for :func:`export`.
        form: As for :func:`export`.

    Raises:
        ConfigurationError: If the format is unknown.

    Example:
        >>> target_of("epoch=3-val=0.97.ckpt", "onnx").name, target_of("epoch=3-val=0.97", "onnx").name
        ('epoch=3-val=0.97.onnx', 'epoch=3-val=0.97.onnx')
    """
    if form not in FORMATS:
        raise unknown_name("export format", form, FORMATS)
    path = Path(path).expanduser()
    if path.suffix in _SUFFIXES[form] or path.is_dir():
        return path
    stem = path.stem if path.suffix in _REPLACED else path.name
    return path.parent / (stem + _SUFFIXES[form][0])


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """A file to write that takes the place of the target, with all files beside it, if nothing goes wrong."""
    if target.is_dir():
        raise ConfigurationError(f"cannot write {target}: it is a folder; name a file in it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(prefix=".export-", dir=target.parent)
    except OSError as error:
        raise ConfigurationError(f"cannot write {target}: {error}") from error
    with folder as name:
        yield Path(name) / target.name
        for file in sorted(Path(name).iterdir(), key=lambda file: file.name == target.name):
            os.replace(file, target.parent / file.name)


def _save_state(model: nn.Module, file: Path) -> None:
    state = model.state_dict()
    saved = OrderedDict((uncompiled_name(name), v.cpu() if isinstance(v, Tensor) else v) for name, v in state.items())
    if (versions := getattr(state, "_metadata", None)) is not None:
        saved._metadata = {uncompiled_name(name): version for name, version in versions.items()}  # type: ignore[attr-defined]
    torch.save(saved, file)
    try:
        torch.load(file, weights_only=True, mmap=True)
    except Exception as error:
        raise ConfigurationError(
            f"the state of {type(model).__name__} holds more than tensors and plain values, so that no one could load "
            f"it with weights_only=True: {reason(error)}"
        ) from error

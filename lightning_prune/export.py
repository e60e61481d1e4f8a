"""A pruned network in forms that need no library of ours to load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.choices import unknown_name
from lightning_prune.errors import ConfigurationError

FORMATS = ("state_dict", "pt2", "onnx")
_SUFFIXES = {"state_dict": ".pt", "pt2": ".pt2", "onnx": ".onnx"}


def export(model: nn.Module, form: str, example: Any, path: str | Path) -> Path:
    """Write a network to a file.

    Args:
        model: The network, of any width. Exported in evaluation mode.
        form: ``"state_dict"`` (the weights under the module's own names), ``"pt2"`` (``torch.export``) or ``"onnx"``.
        example: Example input of ``forward``: a tensor, or a tuple of arguments. Not needed for ``"state_dict"``.
        path: File to write; its suffix is replaced by that of the format.

    Returns:
        The file that was written.

    Raises:
        ConfigurationError: If the format is unknown or its packages are not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(nn.Linear(2, 1), "state_dict", None, f"{folder}/small.ckpt").name
        'small.pt'
    """
    if form not in FORMATS:
        raise unknown_name("export format", form, FORMATS)
    target = Path(path).with_suffix(_SUFFIXES[form])
    if form == "state_dict":
        torch.save(model.state_dict(), target)
        return target
    arguments = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    training = model.training
    model.eval()
    try:
        if form == "pt2":
            torch.export.save(torch.export.export(model, arguments), target)
        else:
            _to_onnx(model, arguments, target)
    finally:
        model.train(training)
    return target


def _to_onnx(model: nn.Module, arguments: tuple[Any, ...], target: Path) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            'export to ONNX needs packages that are not installed: pip install "lightning-prune[export]"'
        ) from error
    torch.onnx.export(model, arguments, str(target), dynamo=True, verbose=False)

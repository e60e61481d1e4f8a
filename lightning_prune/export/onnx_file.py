"""ONNX: written from the program of ``torch.export``, run with onnxruntime."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_prune.errors import ConfigurationError
from lightning_prune.export.calls import Call, reason, tensors_in
from lightning_prune.export.program import symbols_of

_ONE_FILE = 1_800_000_000
"""Most bytes of weights that go into the ONNX file itself, which cannot be larger than 2 GiB."""


def require_onnx() -> None:
    """See that what torch needs for ONNX is there.

    Raises:
        ConfigurationError: If a package is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"export to ONNX needs a package that is not installed ({error.name}): "
            f'pip install "lightning-prune[export]"'
        ) from error


def return_tensors(model: nn.Module) -> None:
    """Have ``forward`` return a tuple of the tensors among its outputs: ONNX has nothing else to return."""
    forward = model.forward

    @wraps(forward)
    def tensors_of(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(tensors_in(forward(*args, **kwargs)))

    vars(model)["forward"] = tensors_of


def write_onnx(program: ExportedProgram, file: Path) -> None:
    """Write a program as ONNX, with its open batch size named ``batch``.

    Raises:
        ConfigurationError: If torch cannot.
    """
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    try:
        torch.onnx.export(program, (), str(file), dynamo=True, verbose=False, external_data=size > _ONE_FILE)
    except Exception as error:
        raise ConfigurationError(f"torch.onnx cannot export the network: {reason(error)}") from error
    symbols = {symbol for symbol in symbols_of(program) if symbol is not None}
    _name_dimensions(file, {symbol: "batch" for symbol in symbols if len(symbols) == 1})


def _name_dimensions(file: Path, names: Mapping[str, str]) -> None:
    import onnx

    model = onnx.load(file, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            size = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), dimension.dim_param)
            if size.isdigit():
                dimension.dim_value = int(size)
            elif size:
                dimension.dim_param = size
    onnx.save(model, file)


def run_onnx(file: Path) -> Callable[[Call], list[Tensor]] | None:
    """What runs an ONNX file in onnxruntime, if that is installed and has what it takes on the CPU.

    Raises:
        ConfigurationError: If the file is not valid, or (from what is returned) if a run fails.
    """
    try:
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as LacksKernel
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except LacksKernel as error:
        warnings.warn(f"{file.name} was not compared with the network: {reason(error)}", stacklevel=3)
        return None
    except Exception as error:
        raise ConfigurationError(
            f"onnxruntime does not take the exported network: {reason(error)}. ONNX lacks many operators in bfloat16: "
            f"export a network in that type as copy.deepcopy(model).float()"
        ) from error

    def run(call: Call) -> list[Tensor]:
        # By position: torch renames an input that is also an output.
        names = [value.name for value in session.get_inputs()]
        given = dict(zip(names, (tensor.cpu().numpy() for tensor in call.tensors()), strict=True))
        try:
            return [torch.as_tensor(value) for value in session.run(None, given)]
        except Exception as error:
            raise ConfigurationError(f"onnxruntime cannot run the exported network: {reason(error)}") from error

    return run

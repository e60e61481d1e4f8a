"""The program of ``torch.export``, with its batch size left open where the network allows it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from lightning_prune.errors import ConfigurationError
from lightning_prune.export.calls import Call, outputs_of, reason, tensors_in, that_runs

_UNBOUNDED = 2**31
"""A batch size that no one reaches: an upper limit beyond it is none."""


def exported(model: nn.Module, call: Call, dynamic_batch: bool) -> tuple[ExportedProgram, list[Call]]:
    """The program of a network at rest, and calls to compare the two on.

    Args:
        model: The network.
        call: An example call.
        dynamic_batch: Whether to leave the batch size open.

    Raises:
        ConfigurationError: If the network does not run, or cannot be exported.
    """
    call = that_runs(model, call)
    limits: list[str] = []
    if dynamic_batch and any(tensor.dim() for tensor in call.tensors()):
        try:
            several = _of_several(call)
            program = _traced(model, several, dynamic=True)
            is_open, limits = _batch_of(program, several)
            larger = several.zipped([_doubled if opened else torch.clone for opened in is_open])
            if any(is_open):
                outputs_of(model, larger)
        except Exception as error:
            is_open, limits = [], [reason(error)]
        if any(is_open):
            if limits:
                _warn(model, "only for some batch sizes", limits)
            return program, [several, larger]
    try:
        program = _traced(model, call, dynamic=False)
    except Exception as error:
        raise ConfigurationError(f"torch.export cannot export {type(model).__name__}: {reason(error)}") from error
    if limits:
        _warn(model, "only for the sizes of the example", limits)
    return program, [call]


def _warn(model: nn.Module, extent: str, limits: list[str]) -> None:
    warnings.warn(
        f"{type(model).__name__} is exported {extent}: {'; '.join(limits)}. With dynamic_batch=False all sizes are "
        f"those of the example, without this warning.",
        stacklevel=4,
    )


def _traced(model: nn.Module, call: Call, dynamic: bool) -> ExportedProgram:
    shapes = ShapesCollection()
    for tensor in call.tensors():
        if dynamic and tensor.dim() and len(tensor) > 1:
            shapes[tensor] = {0: Dim.AUTO}
    with warnings.catch_warnings():
        # Everything is put back afterwards, attributes that `forward` sets too.
        warnings.filterwarnings("ignore", "The tensor attributes? self")
        return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes, strict=False)


def _of_several(call: Call) -> Call:
    """A batch of one made two, because torch takes every size of one for a constant."""
    batch = next(len(tensor) for tensor in call.tensors() if tensor.dim())
    return call.mapped(lambda tensor: _doubled(tensor) if batch == 1 and tensor.shape[:1] == (1,) else tensor)


def _doubled(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])


def symbols_of(program: ExportedProgram) -> list[str | None]:
    """For each input the symbol of its first dimension, or None where that is a number or there is none."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [values.get(name) if isinstance(name, str) else None for name in program.graph_signature.user_inputs]
    # A symbol that turned out to be constant is still a SymInt; only its name tells.
    first = [str(value.shape[0]) if isinstance(value, Tensor) and value.dim() else "0" for value in inputs]
    return [None if size.isdigit() else size for size in first]


def _batch_of(program: ExportedProgram, call: Call) -> tuple[list[bool], list[str]]:
    """For each input whether its first dimension is open, and what limits the batch size."""
    names, symbols = program.graph_signature.user_inputs, symbols_of(program)
    given = [len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in call.leaves()]
    inputs = list(zip(names, symbols, given, strict=True))
    batches = {size for _, symbol, size in inputs if symbol} or {next(size for size in given if size is not None)}
    limits = [f"the size of {name!r} is fixed" for name, symbol, size in inputs if not symbol and size in batches]
    for symbol, allowed in program.range_constraints.items():
        if str(symbol) in symbols and (allowed.lower > 2 or allowed.upper < _UNBOUNDED):
            most = f" and at most {allowed.upper}" if allowed.upper < _UNBOUNDED else ""
            limits.append(f"the size of {names[symbols.index(str(symbol))]!r} must be at least {allowed.lower}{most}")
    return [symbol is not None for symbol in symbols], limits


def run_program(file: Path) -> Callable[[Call], list[Tensor]]:
    """What runs a program file on a call.

    Raises:
        ConfigurationError: If torch cannot read what it has written, as with text among the outputs.
    """
    try:
        module: Any = torch.export.load(file).module()
    except Exception as error:
        context = error.__context__ or error
        raise ConfigurationError(f"torch.export cannot read back what it wrote: {reason(context)}") from error
    return lambda call: tensors_in(module(*call.args, **call.kwargs))

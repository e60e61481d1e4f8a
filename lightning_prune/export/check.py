"""Whether an exported network computes what the network does."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lightning_prune.errors import ConfigurationError
from lightning_prune.export.calls import Call, outputs_of

TOLERANCE = 1e-5
"""Largest difference of an exported network, relative to the largest value of an output."""


def compare(model: nn.Module, program: ExportedProgram, calls: list[Call], run: Callable[[Call], list[Tensor]]) -> None:
    """Refuse an export that does not compute the same; a network that draws random numbers is not compared.

    Args:
        model: The network, in evaluation mode.
        program: What was exported.
        calls: Calls to compare on.
        run: What runs the exported network.

    Raises:
        ConfigurationError: If they differ.
    """
    allowed = _tolerance(program)
    for call in calls:
        expected = outputs_of(model, call)
        if difference(expected, outputs_of(model, call, seed=1)) > allowed:
            warnings.warn(
                f"{type(model).__name__} draws random numbers in evaluation mode, so the exported one was not compared "
                f"with it",
                stacklevel=3,
            )
            return
        apart = difference(expected, run(call))
        if not apart <= allowed:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in call.tensors())
            raise ConfigurationError(
                f"the exported {type(model).__name__} does not compute the same: on input of shape {shapes} its "
                f"outputs differ by {apart:.2g} of the largest, more than {allowed:.2g}; nothing was written"
            )


def difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest difference, relative to the largest finite value of each output; equal NaN and infinities are equal.

    Example:
        >>> difference([torch.tensor([4.0, 1.0])], [torch.tensor([4.0, 2.0])])
        0.25
    """
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return float("inf")
    pairs = zip(expected, found, strict=True)
    return max((_relative(a.cpu().double(), b.cpu().double()) for a, b in pairs), default=0.0)


def _relative(expected: Tensor, found: Tensor) -> float:
    apart = (expected != found) & ~(expected.isnan() & found.isnan())
    if not apart.any():
        return 0.0
    finite = expected[expected.isfinite()].abs()
    largest = float(finite.amax()) if finite.numel() else 0.0
    return float((expected - found)[apart].abs().nan_to_num(nan=float("inf")).amax()) / (largest or 1.0)


def _tolerance(program: ExportedProgram) -> float:
    """The tolerance, or eight roundings of the coarsest type that is computed in if that is half precision."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    values = pytree.tree_leaves([node.meta.get("val") for graph in graphs for node in graph.nodes])
    types = {value.dtype for value in values if isinstance(value, Tensor) and value.dtype.is_floating_point}
    return max([TOLERANCE, *(8 * torch.finfo(dtype).eps for dtype in types if dtype.itemsize <= 2)])

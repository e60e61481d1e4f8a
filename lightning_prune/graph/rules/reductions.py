"""Reductions, softmax and pooling: labels that lie in the reduced dimensions must not matter there."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.graph.blocks import keep_positions
from lightning_prune.graph.calls import Call, Labelled, Planes, Rule
from lightning_prune.graph.labels import READ, STATISTICS, ZEROED, Plane, settle
from lightning_prune.graph.rules.contractions import NEEDS_ZERO
from lightning_prune.graph.rules.pointwise import merge

_SPATIAL = re.compile(r"pool|upsample|grid_sample|reflection_pad|replication_pad|col2im")


def _dims(call: Call, source: Tensor) -> list[int]:
    given = call.arguments.get("dim")
    if given is None or given == []:
        return list(range(source.dim()))
    return [d % max(source.dim(), 1) for d in (given if isinstance(given, (list, tuple)) else [given])]


def ignores_zeros(call: Call) -> bool:
    """Whether appending zeros leaves the reduction as it is, found by running it on short vectors."""
    for values in ([-1.5, 2.5], [1.5, 2.5], [-1.5, -2.5]):
        results = []
        for more in ([], [0.0]):
            arguments = dict(call.arguments)
            arguments[next(iter(arguments))] = torch.tensor(values + more)
            if arguments.get("dim"):
                arguments["dim"] = [0] if isinstance(arguments["dim"], (list, tuple)) else 0
            outcome = call.function(**arguments)
            results.append(outcome if isinstance(outcome, Tensor) else outcome[0])
        if results[0].shape != results[1].shape or not torch.equal(results[0], results[1]):
            return False
    return True


def reduce(call: Call) -> list[Planes]:
    """Sums, means, extremes, norms."""
    source = call.tensors[0]
    dims = _dims(call, source)
    keeps_dims = call.outputs[0].dim() == source.dim()
    result = []
    may_go = call.space.approximate and call.name in _STATISTICS
    for plane in call.planes(source):
        if call.space.any_inner and (may_go or (plane.zero and ignores_zeros(call))):
            plane = keep_positions(call.space, plane, dims)
        inside = [d for d in plane.dims if d in dims]
        if inside and len(inside) == len(plane.dims):
            call.space.mark(READ, plane.ids)
            if plane.zero and ignores_zeros(call):
                call.space.mark(ZEROED if call.static else NEEDS_ZERO, plane.ids)
                continue
            if may_go:
                call.space.mark(STATISTICS, plane.ids)
                continue
            call.space.freeze(plane.ids, f"is reduced over by {call.name}")
            continue
        ids = call.space.tie(plane.ids, inside)
        if not keeps_dims:
            ids = ids.reshape([n for d, n in enumerate(ids.shape) if d not in dims])
        result.append(Plane(ids, plane.zero and call.name in ("sum", "mean")))
    return [tuple(result) for _ in call.outputs]


def loss(call: Call) -> list[Planes]:
    """Pointwise losses, averaged or summed unless told otherwise."""
    static = [call.is_static(tensor) for tensor in call.tensors]
    operands = [Labelled(tuple(tensor.shape), call.planes(tensor)) for tensor in call.tensors]
    planes = merge(call.space, operands, lambda zeros: False, static)
    if call.arguments["reduction"] == 0:
        return [planes]
    for plane in planes:
        call.space.freeze(plane.ids, f"is averaged over by {call.name}")
    return [()]


def along(call: Call) -> list[Planes]:
    """Softmax, sorting, cumulative sums: positions along one dimension depend on each other."""
    source = call.tensors[0]
    dims = _dims(call, source)
    settled = settle(call.space, call.planes(source), dims, f"is mixed along by {call.name}")
    planes = tuple(Plane(plane.ids, False) for plane in settled)
    return [planes for _ in call.outputs]


def is_spatial(name: str) -> bool:
    """Whether the name is that of a pooling, resizing or padding operator on images."""
    return _spatial_dims(name) > 0


def _spatial_dims(name: str) -> int:
    match = re.search(r"([123])_?d", name)
    return int(match.group(1)) if match and _SPATIAL.search(name) else 0


def spatial(call: Call) -> list[Planes]:
    """Pooling and resizing work on each channel by itself."""
    source = call.tensors[0]
    last: Sequence[int] = range(source.dim() - _spatial_dims(call.name), source.dim())
    planes = settle(call.space, call.planes(source), last, "varies over the image")
    for other in call.tensors[1:]:
        for plane in call.planes(other):
            call.space.freeze(plane.ids, "steers a resampling")
    places = tuple(Plane(plane.ids, False) for plane in planes)
    return [planes, *(places for _ in call.outputs[1:])]


_STATISTICS = frozenset({"mean", "var", "std", "var_mean", "std_mean"})
_REDUCTIONS = (
    "sum", "mean", "amax", "amin", "max", "min", "prod", "std", "var", "var_mean", "std_mean", "norm", "argmax",
    "argmin", "linalg_vector_norm", "any", "all", "logsumexp", "nansum", "count_nonzero", "median", "aminmax",
)  # fmt: skip
_ALONG = (
    "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort",
    "argsort", "topk",
)  # fmt: skip
_LOSSES = (
    "mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits",
    "soft_margin_loss",
)  # fmt: skip
RULES: dict[str, Rule] = {
    **dict.fromkeys(_REDUCTIONS, reduce),
    **dict.fromkeys(_ALONG, along),
    **dict.fromkeys(_LOSSES, loss),
}

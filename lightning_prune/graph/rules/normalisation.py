"""Normalisations: statistics are reductions, the affine part is pointwise."""

from __future__ import annotations

from torch import Tensor

from lightning_prune.graph.blocks import leave_statistics
from lightning_prune.graph.calls import Call, Labelled, Planes, Rule
from lightning_prune.graph.labels import NORMALISED_OVER, Plane, outside, reshape_ids, settle
from lightning_prune.graph.rules.pointwise import mark, merge

_STATISTICS = f"{NORMALISED_OVER} (its mean and variance)"


def _affine(call: Call, planes: Planes, shape: tuple[int, ...], extra: dict[str, Tensor | None]) -> Planes:
    """Merge the input with the per-channel vectors laid along the dimensions of ``shape``."""
    roles = {"weight": "scale", "bias": "bias", "running_mean": "statistic", "running_var": "statistic"}
    operands = [Labelled(tuple(call.tensors[0].shape), planes)]
    names = ["input"]
    for name, vector in extra.items():
        if vector is None:
            continue
        labels = call.planes(vector)
        if vector.dim() != len(shape):
            labels = tuple(Plane(p.ids.reshape(shape), p.zero) for p in labels)
        mark(call.space, roles[name], labels)
        operands.append(Labelled(shape, labels))
        names.append(name)

    def zero(zeros: set[int]) -> bool:
        known = {names[i] for i in zeros}
        if extra.get("weight") is not None:
            return "weight" in known and (extra.get("bias") is None or "bias" in known)
        return "input" in known and (extra.get("running_mean") is None or "running_mean" in known)

    return merge(call.space, operands, zero)


def batch_norm(call: Call) -> list[Planes]:
    """Batch normalisation; with live statistics every other dimension is reduced first."""
    data = call.tensors[0]
    vectors = {key: call.arguments.get(key) for key in ("weight", "bias", "running_mean", "running_var")}
    live = call.arguments.get("training", "no_training" not in call.name and "no_update" not in call.name)
    planes = call.planes(data)
    if live or vectors["running_mean"] is None:
        others = [d for d in range(data.dim()) if d != 1]
        planes = leave_statistics(call.space, planes, others, f"{NORMALISED_OVER} by live statistics")
    shape = tuple(n if d == 1 else 1 for d, n in enumerate(data.shape))
    merged = _affine(call, planes, shape, vectors)
    channels = tuple(Plane(p.ids.flatten(), False) for p in merged if p.dims == (1,))
    saved = [channels if tuple(output.shape) == (data.shape[1],) else () for output in call.outputs[1:]]
    return [merged, *saved]


def layer_norm(call: Call) -> list[Planes]:
    """Statistics over the last dimensions: channels there cannot go without changing them."""
    data, normalised = call.tensors[0], len(call.arguments["normalized_shape"])
    inner = range(data.dim() - normalised, data.dim())
    planes = leave_statistics(call.space, call.planes(data), inner, _STATISTICS)
    vectors = {key: call.arguments.get(key) for key in ("weight", "bias")}
    merged = _affine(call, planes, tuple(data.shape[-normalised:]), vectors)
    statistics = tuple(Plane(p.ids, False) for p in outside(planes, inner))
    return [merged, *[statistics for _ in call.outputs[1:]]]


def group_norm(call: Call) -> list[Planes]:
    """Statistics over the channels of a group: whole groups can go."""
    data, groups = call.tensors[0], call.arguments["group"]
    batch, channels = data.shape[:2]
    inner = (batch, groups, channels // groups)
    ones = (1,) * (data.dim() - 2)
    flat = settle(call.space, call.planes(data), range(2, data.dim()), "varies over the image")
    split = (Plane(reshape_ids(p.ids.reshape(p.ids.shape[:2]), (batch, channels), inner), p.zero) for p in flat)
    # With several groups whole ones can go, which is exact; with a single one there is nothing exact to do.
    whole = (leave_statistics if groups == 1 else settle)(call.space, split, (2,), _STATISTICS)
    call.witness(inner, whole)
    planes = []
    for plane in whole:
        ids = reshape_ids(plane.ids, inner, (batch, channels))
        planes.append(Plane(ids.reshape(*ids.shape, *ones), plane.zero))
    vectors = {key: call.arguments.get(key) for key in ("weight", "bias")}
    statistics = tuple(Plane(p.ids.squeeze(2), False) for p in outside(whole, (2,)))
    return [_affine(call, tuple(planes), (1, channels, *ones), vectors), *[statistics for _ in call.outputs[1:]]]


_BATCH_NORMS = (
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_with_update", "_batch_norm_no_update", "_batch_norm_with_update_functional", "miopen_batch_norm",
)  # fmt: skip
RULES: dict[str, Rule] = {
    **dict.fromkeys(_BATCH_NORMS, batch_norm),
    "native_layer_norm": layer_norm,
    "native_group_norm": group_norm,
}

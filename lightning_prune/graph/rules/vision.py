"""Operators of torchvision, by their full names, and their relatives in ATen."""

from __future__ import annotations

from torch import Tensor

from lightning_prune.graph.calls import Call, Labelled, Planes, Rule
from lightning_prune.graph.labels import Plane, settle
from lightning_prune.graph.rules.contractions import grouped_product
from lightning_prune.graph.rules.pointwise import merge

_IMAGE = "varies over the image"


def _steered(call: Call, *tensors: Tensor, reason: str = "steers a resampling") -> None:
    for tensor in tensors:
        for plane in call.planes(tensor):
            call.space.freeze(plane.ids, reason)


def _numbers(planes: Planes) -> Planes:
    """The same labels on positions, which need not be zero where values are."""
    return tuple(Plane(plane.ids, False) for plane in planes)


def regions(call: Call) -> list[Planes]:
    """Each channel is read at each box by itself."""
    data, boxes = call.arguments["input"], call.arguments["rois"]
    _steered(call, boxes)
    planes = settle(call.space, call.planes(data), (0, 2, 3), _IMAGE)
    return [planes, *(_numbers(planes) for _ in call.outputs[1:])]


def _merged_blocks(call: Call, data: Tensor, dim: int, blocks: int, others: tuple[int, ...]) -> Planes:
    """Each block of channels along ``dim`` becomes one channel: it goes as a whole."""
    size = data.shape[dim]
    flat = settle(call.space, call.planes(data), others, _IMAGE)
    result = []
    for plane in flat:
        if plane.ids.shape[dim] == 1:
            result.append(plane)
            continue
        split = Plane(plane.ids.unflatten(dim, (blocks, size // blocks)), plane.zero)
        for whole in settle(call.space, (split,), (dim + 1,), "is one of several parts of a place"):
            result.append(Plane(whole.ids.squeeze(dim + 1), whole.zero))
    return tuple(result)


def position_sensitive_regions(call: Call) -> list[Planes]:
    """Each cell of a box reads channels of its own: all of them together make one channel."""
    data, boxes = call.arguments["input"], call.arguments["rois"]
    _steered(call, boxes)
    planes = _merged_blocks(call, data, 1, call.outputs[0].shape[1], (0, 2, 3))
    return [planes, _numbers(planes)]


def unfold_blocks(call: Call) -> list[Planes]:
    """``im2col``: each channel becomes as many rows as the kernel has places."""
    data = call.tensors[0]
    dim = data.dim() - 3
    places = call.outputs[0].shape[dim] // data.shape[dim]
    result = []
    for plane in settle(call.space, call.planes(data), (dim + 1, dim + 2), _IMAGE):
        ids = plane.ids.squeeze(-1)
        result.append(Plane(ids.repeat_interleave(places, dim) if ids.shape[dim] > 1 else ids, plane.zero))
    return [tuple(result)]


def fold_blocks(call: Call) -> list[Planes]:
    """``col2im``: as many rows as the kernel has places are added up to one channel."""
    data = call.tensors[0]
    dim = data.dim() - 2
    planes = _merged_blocks(call, data, dim, call.outputs[0].shape[dim], (dim + 1,))
    return [tuple(Plane(plane.ids.unsqueeze(-1), plane.zero) for plane in planes)]


def unpool(call: Call) -> list[Planes]:
    """Values go back to where pooling found them, each channel by itself."""
    image = range(call.tensors[0].dim() - (3 if "3d" in call.name else 2), call.tensors[0].dim())
    values, places = (
        Labelled(tuple(tensor.shape), settle(call.space, call.planes(tensor), image, _IMAGE))
        for tensor in (call.arguments["self"], call.arguments["indices"])
    )
    return [merge(call.space, (values, places), lambda zeros: 0 in zeros)]


def affine_grid(call: Call) -> list[Planes]:
    """Places to sample at, one set for each pose."""
    poses, target = call.tensors[0], call.outputs[0]
    planes = settle(call.space, call.planes(poses), (1, 2), "steers a resampling")
    return [tuple(Plane(plane.ids.reshape(-1, *[1] * (target.dim() - 1)), False) for plane in planes)]


def deformable(call: Call) -> list[Planes]:
    """A convolution whose places move: offsets and masks belong to places of the kernel, not to channels."""
    data, weight, bias = (call.arguments[key] for key in ("input", "weight", "bias"))
    offset, moved = call.arguments["offset"], call.arguments["offset_groups"]
    _steered(call, offset, call.arguments["mask"], reason="steers a deformable convolution")
    planes = settle(call.space, call.planes(data), (0, 2, 3), _IMAGE)
    channels = data.shape[1]
    if moved > 1:
        planes = tuple(_alike_in_groups(call, plane, moved, channels) for plane in planes)
        planes = tuple(plane for plane in planes if plane.dims)
    return [grouped_product(call, data, planes, weight, bias, call.arguments["groups"], transposed=False)]


def _alike_in_groups(call: Call, plane: Plane, groups: int, channels: int) -> Plane:
    """Groups of channels that share offsets must stay equally wide: the same channels go from each."""
    block = (groups, channels // groups)
    flat = plane.ids.flatten()
    whole = settle(call.space, (Plane(flat.reshape(block), plane.zero),), (0,), "shares its offsets with others")
    ids = whole[0].ids.expand(block).reshape(1, channels, 1, 1) if whole else flat.new_zeros(1, 1, 1, 1)
    return Plane(ids, plane.zero)


def choose_boxes(call: Call) -> list[Planes]:
    """Non-maximum suppression."""
    return call.opaque("decides which boxes remain")


RULES: dict[str, Rule] = {
    "im2col": unfold_blocks,
    "col2im": fold_blocks,
    "max_unpool2d": unpool,
    "max_unpool3d": unpool,
    "affine_grid_generator": affine_grid,
}
TORCHVISION: dict[str, Rule] = {
    "torchvision::deform_conv2d": deformable,
    "torchvision::roi_align": regions,
    "torchvision::roi_pool": regions,
    "torchvision::ps_roi_align": position_sensitive_regions,
    "torchvision::ps_roi_pool": position_sensitive_regions,
    "torchvision::nms": choose_boxes,
}

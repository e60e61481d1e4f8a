"""Sequences of different lengths."""

from __future__ import annotations

from lightning_prune.graph.calls import Call, Planes, Rule
from lightning_prune.graph.labels import Plane, settle


def pack(call: Call) -> list[Planes]:
    """Steps and samples become one dimension without the padding; features move on."""
    data = call.arguments["input"]
    planes = settle(call.space, call.planes(data), (0, 1), "is packed into a sequence")
    return [tuple(Plane(plane.ids.squeeze(0), plane.zero) for plane in planes), ()]


RULES: dict[str, Rule] = {"_pack_padded_sequence": pack}

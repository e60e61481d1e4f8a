"""Weights that are computed from parameters by an operator of their own."""

from __future__ import annotations

from lightning_prune.graph.calls import Call, Labelled, Planes, Rule
from lightning_prune.graph.labels import NEVER_ZERO, ZEROED, Plane, settle
from lightning_prune.graph.rules.pointwise import merge


def weight_norm(call: Call) -> list[Planes]:
    """Directions divided by their norm over all dimensions but one, times a magnitude.

    What is zeroed inside a direction leaves its norm alone. A direction that is zeroed as a whole has no norm to divide
    by, so it may not be taken for zero.
    """
    direction, magnitude = call.arguments["v"], call.arguments["g"]
    dim = call.arguments["dim"] % direction.dim()
    planes = []
    for plane in call.planes(direction):
        inside = [d for d in plane.dims if d != dim]
        if not inside:
            call.space.mark(NEVER_ZERO, plane.ids)
            planes.append(Plane(plane.ids, False))
        elif len(inside) == len(plane.dims) and plane.zero and call.static:
            call.space.mark(ZEROED, plane.ids)
            planes.append(plane)
        else:
            planes.extend(settle(call.space, (plane,), inside, "is divided by a norm"))
    operands = (
        Labelled(tuple(direction.shape), tuple(planes)),
        Labelled(tuple(magnitude.shape), call.planes(magnitude)),
    )
    result = merge(call.space, operands, bool, (call.static, call.is_static(magnitude)))
    lengths = tuple(Plane(plane.ids, False) for plane in result if set(plane.dims) == {dim})
    return [result, lengths]


RULES: dict[str, Rule] = {"_weight_norm_interface": weight_norm}

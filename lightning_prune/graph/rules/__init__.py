"""One rule for each kind of operator: where the labels of its inputs end up in its outputs.

A rule takes a :class:`~lightning_prune.graph.tracer.Call` and returns the planes of each output tensor. What belongs
together it reports to ``call.space``. An operator without a rule is opaque: everything that enters it stays whole.
"""

from __future__ import annotations

import torch
from torch._ops import OpOverload

from lightning_prune.graph.calls import Call, Planes, Rule
from lightning_prune.graph.rules import (
    contractions,
    creation,
    diagonals,
    indexing,
    normalisation,
    pointwise,
    recurrent,
    reductions,
    shapes,
    signal,
    vision,
    weights,
)

_USER_RULES: dict[str, Rule] = {}
_RULES: dict[str, Rule] = {
    **shapes.RULES,
    **reductions.RULES,
    **contractions.RULES,
    **normalisation.RULES,
    **creation.RULES,
    **pointwise.RULES,
    **indexing.RULES,
    **diagonals.RULES,
    **signal.RULES,
    **recurrent.RULES,
    **vision.RULES,
    **weights.RULES,
}


def opaque(call: Call) -> list[Planes]:
    """Nothing is known of the operator: all channels that enter it stay whole."""
    return call.opaque(f"operator {call.function._schema.name} has no rule")


def find_rule(function: OpOverload) -> Rule:
    """The rule of an operator overload."""
    full_name = function._schema.name
    if full_name in _USER_RULES:
        return _USER_RULES[full_name]
    if full_name in vision.TORCHVISION:
        return vision.TORCHVISION[full_name]
    namespace, name = full_name.split("::")
    if namespace not in ("aten", "prims"):
        return opaque
    if torch.Tag.inplace_view in function.tags:
        return shapes.IN_PLACE.get(name, opaque)
    name = name if name.startswith("__") or not name.endswith("_") else name[:-1]
    if torch.Tag.pointwise in function.tags and name not in shapes.RULES:
        return pointwise.pointwise
    if name in _RULES:
        return _RULES[name]
    return reductions.spatial if reductions.is_spatial(name) else opaque


def register_rule(operator: str, rule: Rule) -> None:
    """Teach the channel graph an operator of your own.

    Args:
        operator: Qualified name of the operator, for example ``"my_ops::swish"``.
        rule: Takes the call and returns the planes of each output tensor.
    """
    _USER_RULES[operator] = rule

"""One rule for each kind of operator: where the labels of its inputs end up in its outputs.

A rule takes a :class:`~lightning_prune.graph.tracer.Call` and returns the planes of each output tensor. What belongs
together it reports to ``call.space``. An operator without a rule is opaque: everything that enters it stays whole.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch._ops import OpOverload

from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.calls import Call, Planes, Rule
from lightning_prune.graph.labels import Plane
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
    name = call.function._schema.name
    meant = difflib.get_close_matches(name, [known for known in _USER_RULES if not _is_operator(known)], n=1)
    hint = f"; torch knows no '{meant[0]}', which was given one" if meant else ""
    return call.opaque(f"operator {name} has no rule{hint}")


def _is_operator(name: str) -> bool:
    """Whether torch knows an operator of that qualified name by now."""
    namespace, _, operator = name.partition("::")
    return hasattr(getattr(torch.ops, namespace), operator)


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
        operator: Qualified name of the operator, for example ``"my_ops::swish"``; it may be defined later.
        rule: Takes the call and returns a list with one tuple of planes for each output tensor. Where it returns
            anything else or fails, the channels that enter the operator stay whole, and the graph says why.

    Raises:
        ConfigurationError: If the name is not qualified, or the rule cannot be called.

    Example:
        >>> register_rule("my_ops::swish", lambda call: [call.planes(call.tensors[0])])
    """
    namespace, _, name = operator.partition("::")
    if not namespace or not name:
        raise ConfigurationError(f"'{operator}' is no qualified name of an operator, such as 'my_ops::swish'.")
    if not callable(rule):
        raise ConfigurationError(
            f"the rule for {operator} is a {type(rule).__name__}, but must be a function that takes the call."
        )

    def checked(call: Call) -> Sequence[Planes]:
        """What the rule says; nothing, where that is of no use."""
        found = rule(call)
        if _fits(found, len(call.outputs)):
            return found
        return call.opaque(f"the rule for {operator} returned {_kind(found)}, not one tuple of planes for each output")

    _USER_RULES[operator] = checked


def _fits(found: object, outputs: int) -> bool:
    """Whether a rule returned planes for each output."""
    if not isinstance(found, (list, tuple)) or len(found) != outputs:
        return False
    return all(
        isinstance(planes, (list, tuple)) and all(isinstance(plane, Plane) for plane in planes) for planes in found
    )


def _kind(found: object) -> str:
    """A few words on what a rule returned."""
    if not isinstance(found, (list, tuple)):
        return "None" if found is None else f"a {type(found).__name__}"
    parts = ", ".join(type(part).__name__ for part in found)
    return f"a {type(found).__name__} of {len(found)} ({parts})" if found else f"an empty {type(found).__name__}"

"""Numbers that scale a product of matrices by its inner width, as attention does, and follow that width after a cut."""

from __future__ import annotations

import math
from collections.abc import Iterable, MutableMapping
from typing import NamedTuple, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.graph.calls import LAYOUT_ONLY, SAME_AS_VIEW, Call, Numbers
from lightning_prune.graph.tracer import Event

_PRODUCTS = frozenset({"bmm", "baddbmm"})
_SIGNS = {"mul": 1, "div": -1}
_POWERS = (0.25, 0.5, 1.0)
"""Of the ratio of the widths: queries and keys are scaled by a fourth root each, or their product by a square root."""
_PRECISION = 1e-9
_FACTOR = "other"
_Known = TypeVar("_Known")


class ScaleError(Exception):
    """A number changed with a width, but it does not scale a product that is summed over that width."""


class Width(NamedTuple):
    """The size of a dimension before and after a cut."""

    old: int
    new: int


class Summed(NamedTuple):
    """What a product was summed over: a dimension that changed, and the labels along it."""

    width: Width
    labels: list[Tensor]


class Scales:
    """Follows tensors from where they are scaled to the product that is summed over the changed width, or back.

    Attributes:
        numbers: The new numbers, by position in the program.
        labels: Labels along the dimensions whose width they follow.
    """

    def __init__(self) -> None:
        """See the class."""
        self.numbers: dict[int, float] = {}
        self.labels: list[Tensor] = []
        self._summed: MutableMapping[Tensor, Summed] = WeakTensorKeyDictionary()
        self._owing: MutableMapping[Tensor, set[Width]] = WeakTensorKeyDictionary()

    def recorded(self, call: Call, constants: Numbers, record: Event, due: Event, position: int) -> Numbers:
        """The constants of a call; the recorded ones if they differ as the width does that is summed over.

        Args:
            call: What the shrunk network executes.
            constants: Its constants.
            record: What the full network executed there.
            due: The same, less what was removed.
            position: Where that is in the program.

        Raises:
            ScaleError: If what was scaled is used for something else than a product summed over that width.
        """
        self.numbers.pop(position, None)
        if _hands_on(call):
            _hand_on(self._summed, call)
            _hand_on(self._owing, call)
        elif call.name in _PRODUCTS:
            self._sum(call, record, due)
        elif any(tensor in self._owing for tensor in call.tensors):
            raise ScaleError(f"{call.name} of what was scaled by a number that follows the width is no attention")
        elif call.name in _SIGNS and constants != record.constants:
            return self._scale(call, constants, record, due, position)
        return constants

    def _sum(self, call: Call, record: Event, due: Event) -> None:
        first, second = record.inputs[-2:]
        width = Width(first.shape[-1], due.inputs[-2].shape[-1])
        owing = [self._owing[tensor] for tensor in call.tensors if tensor in self._owing]
        if any(width not in widths for widths in owing):
            raise ScaleError("a number that follows the width scales a product that is summed over another one")
        labels = [plane.ids for plane in first.planes if plane.ids.shape[-1] > 1]
        labels += [plane.ids for plane in second.planes if plane.ids.shape[-2] > 1]
        if owing:
            self.labels += labels
        if width.old != width.new:
            self._summed[call.outputs[0]] = Summed(width, labels)

    def _scale(self, call: Call, constants: Numbers, record: Event, due: Event, position: int) -> Numbers:
        summed = self._summed.get(call.tensors[0])
        sizes = zip(record.inputs[0].shape, due.inputs[0].shape, strict=True)
        widths = {Width(o, n) for o, n in sizes if o != n} if summed is None else {summed.width}
        old, new = _factors(record.constants, constants)
        followed = {width for width in widths if _follows(old, new, width, _SIGNS[call.name])}
        if not followed:
            return constants
        self.numbers[position] = new
        if summed is None:
            self._owing[call.outputs[0]] = followed
        else:
            self.labels += summed.labels
        return tuple((name, old if name == _FACTOR else value) for name, value in constants)


def _hands_on(call: Call) -> bool:
    """Whether the outputs hold what the input holds."""
    return call.function.is_view or call.name in LAYOUT_ONLY or call.name in SAME_AS_VIEW or call.name == "_to_copy"


def _hand_on(known: MutableMapping[Tensor, _Known], call: Call) -> None:
    if call.tensors and call.tensors[0] in known:
        for output in call.outputs:
            known[output] = known[call.tensors[0]]


def _factors(recorded: Iterable[object], constants: Numbers) -> tuple[float, float]:
    """What a tensor is multiplied with (or divided by) in the record and now; not numbers if that is no number."""
    found = []
    for known in (recorded, constants):
        values = [c[1] for c in known if isinstance(c, tuple) and c[0] == _FACTOR and type(c[1]) in (int, float)]
        found.append(float(values[0]) if values else math.nan)
    return found[0], found[1]


def _follows(old: float, new: float, width: Width, sign: int) -> bool:
    """Whether a number changed as a power of the width that scales of attention are made with."""
    ratio = width.old / width.new if width.new else math.nan
    return any(math.isclose(new, old * ratio ** (sign * power), rel_tol=_PRECISION) for power in _POWERS)

"""Symbols: integers that know from which attributes of which modules they were computed, and how."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

Guess = dict["Setting", int]


class Setting(NamedTuple):
    """One integer that a module remembers: an attribute, or one element of an attribute."""

    module: str
    attribute: str
    element: int | None = None


class Symbol(int):
    """An int that knows from which settings it was computed, and how.

    Attributes:
        setting: The setting whose value it is; None for the result of an operation.
        operation: Function and operands that it is the result of; None for a setting.
    """

    compared: ClassVar[list[tuple[Symbol, int]] | None] = None
    """Where comparisons with symbols are noted, if anybody wants to know."""
    setting: Setting | None = None
    operation: tuple[Callable[[int, int], int], int, int] | None = None

    def __eq__(self, other: object) -> bool:
        """As for the integer."""
        if Symbol.compared is not None and isinstance(other, int):
            Symbol.compared.append((self, int(other)))
        return int(self) == other

    def __ne__(self, other: object) -> bool:
        """As for the integer."""
        return not self == other

    __hash__ = int.__hash__

    @classmethod
    def of(cls, setting: Setting, value: int) -> Symbol:
        """The symbol of one setting."""
        symbol = cls(value)
        symbol.setting = setting
        return symbol

    @property
    def settings(self) -> frozenset[Setting]:
        """Every setting that it depends on."""
        if self.operation is not None:
            return frozenset().union(*(o.settings for o in self.operation[1:] if isinstance(o, Symbol)))
        return frozenset() if self.setting is None else frozenset([self.setting])

    def evaluate(self, values: Mapping[Setting, int]) -> int:
        """Its value under other settings; those that are not given keep theirs."""
        if self.operation is not None:
            function, first, second = self.operation
            return function(resolve(first, values), resolve(second, values))
        return int(self) if self.setting is None else values.get(self.setting, int(self))


def _binary(function: Callable[[int, int], int], swapped: bool) -> Callable[[Symbol, Any], Any]:
    def method(self: Symbol, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        first, second = (other, self) if swapped else (self, other)
        symbol = Symbol(function(int(first), int(second)))
        symbol.operation = (function, first, second)
        return symbol

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(Symbol, f"__{_name}__", _binary(getattr(operator, _name), False))
    setattr(Symbol, f"__r{_name}__", _binary(getattr(operator, _name), True))


def resolve(value: Any, values: Mapping[Setting, int]) -> Any:
    """The plain value of a symbol (or a slice of symbols) under the given settings; anything else as it is."""
    if isinstance(value, slice):
        return slice(*(resolve(part, values) for part in (value.start, value.stop, value.step)))
    return value.evaluate(values) if isinstance(value, Symbol) else value


def symbols_in(values: Iterable[Any]) -> Iterator[Symbol]:
    """Every symbol in nested tuples, lists and mappings."""
    for value in values:
        if isinstance(value, Symbol):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from symbols_in(value)
        elif isinstance(value, dict):
            yield from symbols_in(value.values())
        elif isinstance(value, slice):
            yield from symbols_in((value.start, value.stop, value.step))


@contextmanager
def comparisons() -> Iterator[list[tuple[Symbol, int]]]:
    """Inside, comparisons of symbols with other integers are noted."""
    before, Symbol.compared = Symbol.compared, []
    try:
        yield Symbol.compared
    finally:
        Symbol.compared = before


def missed(compared: Sequence[tuple[Symbol, int]]) -> Guess:
    """What the last setting that was found to differ from a size would have to be."""
    for symbol, other in reversed(compared):
        if symbol.setting is not None and int(symbol) != other > 0:
            return {symbol.setting: other}
    return {}

"""Integers that modules remember (``groups``, ``num_heads``, ...): found where they are used, solved, proven.

While the shrunk network runs, every integer attribute of its modules is a :class:`Symbol`: an int that remembers the
attribute it came from, through arithmetic. Where a function call does not reproduce the recorded program, the
attributes among its arguments are the unknowns, and sizes that changed in that call are the candidates.
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_prune.graph.analysis import Run
from lightning_prune.graph.labels import user_line
from lightning_prune.graph.program import is_observed, map_nested, unobserved
from lightning_prune.graph.tracer import Event
from lightning_prune.surgery.check import Checker

_MAX_ATTEMPTS = 200
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


def _symbols(values: Iterable[Any]) -> Iterator[Symbol]:
    """Every symbol in nested tuples, lists and mappings."""
    for value in values:
        if isinstance(value, Symbol):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _symbols(value)
        elif isinstance(value, dict):
            yield from _symbols(value.values())
        elif isinstance(value, slice):
            yield from _symbols((value.start, value.stop, value.step))


class UnsolvedError(Exception):
    """A call cannot reproduce the recorded program.

    Args:
        position: Index of the recorded event where it went wrong.
        reason: What went wrong and in which line of the user's code.
    """

    def __init__(self, position: int, reason: str) -> None:
        """See the class."""
        super().__init__(reason)
        self.position = position
        self.reason = reason
        self.run: Run | None = None

    @property
    def event(self) -> Event | None:
        """The recorded event where it went wrong, if there is one."""
        inside = self.run is not None and 0 <= self.position < len(self.run.events)
        return self.run.events[self.position] if self.run is not None and inside else None


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


class Solver(TorchFunctionMode):
    """Watches every function call of the shrunk network and solves the settings among its arguments.

    Args:
        checker: Compares what is executed with the record.
        values: Settings solved so far; new ones are added.
        used: Settings that reached any function call; new ones are added.

    Attributes:
        revised: Whether a setting was changed after an earlier call had used it as it was.
    """

    def __init__(self, checker: Checker, values: dict[Setting, int], used: set[Setting]) -> None:
        """See the class."""
        super().__init__()
        self.checker = checker
        self.values = values
        self.used = used
        self.revised = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call, with other settings if it does not fit."""
        if not is_observed():
            return func(*args, **(kwargs or {}))
        arguments = (args, kwargs or {})
        settings = set().union(*(symbol.settings for symbol in _symbols((args, *arguments[1].values()))))
        used_before = self.used & settings
        self.used |= settings
        start = self.checker.position
        try:
            return self._attempt(func, arguments, self.values, start) if settings else func(*args, **arguments[1])
        except UnsolvedError:
            raise
        except Exception as error:
            failed_at = self.checker.position
            for guess in self._guesses(arguments, sorted(settings, key=str), start, failed_at):
                try:
                    result = self._attempt(func, arguments, {**self.values, **guess}, start)
                except Exception:
                    continue
                self.values.update(guess)
                self.revised |= not used_before.isdisjoint(guess)
                return result
            name = getattr(func, "__name__", str(func))
            reason = f"{name} cannot follow a change of width: {error} ({user_line()})"
            raise UnsolvedError(failed_at, reason) from error

    def _attempt(self, func: Any, arguments: Any, values: Mapping[Setting, int], start: int) -> Any:
        self.checker.position = start
        args, kwargs = map_nested(lambda leaf: resolve(leaf, values), arguments)
        return func(*args, **kwargs)

    def _guesses(self, arguments: Any, settings: Sequence[Setting], start: int, end: int) -> Iterator[Guess]:
        """What the settings may be: sizes that changed in this call, and what follows from them."""
        with unobserved():
            placed = list(self._placed(arguments, range(start, end + 2)))
            changes = sorted(set().union(*(self.checker.changes(p) for p in range(start, end + 2))))
        yield from placed
        options: dict[Setting, list[int]] = {}
        for setting in settings:
            value = self.values.get(setting)
            if value is None:
                continue
            found = [new for old, new in changes if old == value]
            found += [value * new // old for old, new in changes if value * new % old == 0]
            found += [value - (old - new) for old, new in changes]
            options[setting] = [v for v in dict.fromkeys(found) if v > 0 and v != value]
        renamed = {setting: {new for old, new in changes if old == self.values.get(setting)} for setting in settings}
        yield {setting: values.pop() for setting, values in renamed.items() if len(values) == 1}
        singles = [{s: v} for s, values in options.items() for v in values]
        pairs = ({**a, **b} for a, b in itertools.combinations(singles, 2) if a.keys() != b.keys())
        yield from itertools.islice(itertools.chain(singles, pairs), _MAX_ATTEMPTS)

    def _placed(self, arguments: Any, positions: Iterable[int]) -> Iterator[Guess]:
        """Where a list of sizes was handed on as it is: the new sizes, place by place."""
        lists = [values for values in _sequences(arguments) if any(isinstance(v, Symbol) and v.setting for v in values)]
        for position in positions:
            for old, new in self.checker.due_sizes(position):
                for values in lists:
                    if len(values) == len(old) and all(a in (b, -1) for a, b in zip(values, old, strict=True)):
                        pairs = zip(values, new, strict=True)
                        yield {v.setting: n for v, n in pairs if isinstance(v, Symbol) and v.setting and v != -1}


def _sequences(value: Any) -> Iterator[Sequence[int]]:
    """Every sequence of nothing but integers in nested containers, the outermost ones first."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        if value and all(isinstance(item, int) for item in value):
            yield value
        for start in range(1, len(value) - 1):  # sizes given one by one, after the tensor
            if all(isinstance(item, int) for item in value[start:]):
                yield value[start:]
                break
        for item in value:
            yield from _sequences(item)


def integer_settings(model: nn.Module) -> dict[Setting, int]:
    """Every integer (and every integer in a tuple or list) that a module holds as an attribute."""
    found = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) is int:
                found[Setting(path, name)] = value
            elif type(value) in (tuple, list, torch.Size) or hasattr(value, "_fields"):
                for i, item in enumerate(value):
                    if type(item) is int:
                        found[Setting(path, name, i)] = item
    return found


def write_settings(model: nn.Module, values: Mapping[Setting, int]) -> None:
    """Store integers as the attributes (or elements of attributes) they belong to."""
    modules = dict(model.named_modules())
    elements: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for setting, value in values.items():
        if setting.element is None:
            modules[setting.module].__dict__[setting.attribute] = value
        else:
            elements[setting.module, setting.attribute][setting.element] = value
    for (path, attribute), changed in elements.items():
        attributes = modules[path].__dict__
        attributes[attribute] = _with_elements(attributes[attribute], changed)


def _with_elements(sequence: Any, changed: Mapping[int, int]) -> Any:
    """A sequence of the same type with some elements replaced; the very same if none differs."""
    items = [changed.get(i, item) for i, item in enumerate(sequence)]
    if all(a is b for a, b in zip(items, sequence, strict=True)):
        return sequence
    if type(sequence) is torch.Size and any(isinstance(item, Symbol) for item in items):
        return tuple(items)
    return type(sequence)(*items) if hasattr(sequence, "_fields") else type(sequence)(items)


class Remembered:
    """The very objects that the attributes behind some settings refer to.

    Args:
        model: The network.
        settings: The settings.
    """

    def __init__(self, model: nn.Module, settings: Iterable[Setting]) -> None:
        """See the class."""
        modules = dict(model.named_modules())
        places = dict.fromkeys((modules[setting.module], setting.attribute) for setting in settings)
        self._objects = [(module, attribute, module.__dict__[attribute]) for module, attribute in places]

    def restore(self) -> None:
        """Put them back."""
        for module, attribute, value in self._objects:
            module.__dict__[attribute] = value


@contextmanager
def symbolic(model: nn.Module, settings: Mapping[Setting, int]) -> Iterator[None]:
    """Replace integer attributes by symbols for a while."""
    remembered = Remembered(model, settings)
    try:
        write_settings(model, {setting: Symbol.of(setting, value) for setting, value in settings.items()})
        yield
    finally:
        remembered.restore()

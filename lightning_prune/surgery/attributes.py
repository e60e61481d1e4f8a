"""Integers that modules remember (``groups``, ``num_heads``, ...): found where they are used, solved, proven.

While the shrunk network runs, every integer attribute of its modules is a :class:`Symbol`: an int that remembers the
attribute it came from, through arithmetic. Where a function call does not reproduce the recorded program, the
attributes among its arguments are the unknowns, and sizes that changed in that call are the candidates.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_prune.graph.analysis import Run
from lightning_prune.graph.calls import tensors_among
from lightning_prune.graph.labels import user_line
from lightning_prune.graph.observation import is_observed, unobserved
from lightning_prune.graph.program import map_nested
from lightning_prune.graph.tracer import Event
from lightning_prune.surgery.check import Checker
from lightning_prune.surgery.symbols import Guess, Setting, Symbol, resolve, symbols_in

_MAX_ATTEMPTS = 200


class UnsolvedError(Exception):
    """A call cannot reproduce the recorded program.

    Args:
        position: Index of the recorded event where it went wrong.
        reason: What went wrong and in which line of the user's code.
        run: The recorded run, where it is known.
    """

    def __init__(self, position: int, reason: str, run: Run | None = None) -> None:
        """See the class."""
        super().__init__(reason)
        self.position = position
        self.reason = reason
        self.run = run

    @property
    def event(self) -> Event | None:
        """The recorded event where it went wrong, if there is one."""
        inside = self.run is not None and 0 <= self.position < len(self.run.events)
        return self.run.events[self.position] if self.run is not None and inside else None


class _OmittedError(Exception):
    """A call executed nothing where the record has an operator with its numbers.

    Args:
        result: What it returned.
    """

    def __init__(self, result: Any) -> None:
        """See the class."""
        super().__init__("it does nothing at this width")
        self.result = result


class Solver(TorchFunctionMode):
    """Watches every function call of the shrunk network and solves the settings among its arguments.

    Args:
        checker: Compares what is executed with the record.
        values: Settings solved so far; new ones are added.
        used: Settings that reached any function call; new ones are added.

    Attributes:
        revised: Where a setting was changed after an earlier call had used it as it was; None if nowhere.
    """

    def __init__(self, checker: Checker, values: dict[Setting, int], used: set[Setting]) -> None:
        """See the class."""
        super().__init__()
        self.checker = checker
        self.values = values
        self.used = used
        self.revised: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one call, with other settings if it does not fit."""
        if not is_observed():
            return func(*args, **(kwargs or {}))
        arguments = (args, kwargs or {})
        settings = set().union(*(symbol.settings for symbol in symbols_in((args, *arguments[1].values()))))
        used_before = self.used & settings
        self.used |= settings
        start = self.checker.position
        try:
            if not settings:
                return func(*args, **arguments[1])
            result = self._attempt(func, arguments, self.values, start)
            if self._omits(arguments, start):
                raise _OmittedError(result)
            return result
        except UnsolvedError:
            raise
        except Exception as error:
            failed_at = self.checker.position
            for guess in self._guesses(arguments, sorted(settings, key=str), start, failed_at):
                try:
                    result = self._attempt(func, arguments, {**self.values, **guess}, start)
                except Exception:
                    continue
                if isinstance(error, _OmittedError) and self.checker.position == start:
                    continue
                self.values.update(guess)
                if not used_before.isdisjoint(guess):
                    self.revised = start
                return result
            if isinstance(error, _OmittedError):
                return error.result
            name = getattr(func, "__name__", str(func))
            reason = f"{name} cannot follow a change of width: {error} ({user_line()})"
            raise UnsolvedError(failed_at, reason) from error

    def _omits(self, arguments: Any, start: int) -> bool:
        """Whether a call executed nothing where it probably should have, as a slice up to the very end does."""
        expected = self.checker.expected(start)
        if expected is None or self.checker.position != start or not expected.inputs:
            return False
        given = tensors_among((*arguments[0], *arguments[1].values()))
        if not given or tuple(given[0].shape) != expected.inputs[0].shape:
            return False
        values = {int(symbol) for symbol in symbols_in((*arguments[0], *arguments[1].values()))}
        sizes = (size for size in self.checker.recorded[start].sizes if isinstance(size, tuple))
        recorded = {value for _, value in sizes if isinstance(value, int)}
        return not values.isdisjoint(recorded)

    def _attempt(self, func: Any, arguments: Any, values: Mapping[Setting, int], start: int) -> Any:
        self.checker.position = start
        args, kwargs = map_nested(lambda leaf: resolve(leaf, values), arguments)
        return func(*args, **kwargs)

    def _guesses(self, arguments: Any, settings: Sequence[Setting], start: int, end: int) -> Iterator[Guess]:
        """What the settings may be: sizes that changed in this call, and what follows from them."""
        with unobserved():
            placed = list(self._placed(arguments, range(start, end + 2)))
            given = sorted(set().union(*(self.checker.changes(p, inputs=True) for p in range(start, end + 1))))
            made = sorted(set().union(*(self.checker.changes(p) for p in range(start, end + 2))))
        yield from placed
        changes = list(dict.fromkeys([*given, *made]))
        options: dict[Setting, list[int]] = {}
        for setting in settings:
            value = self.values.get(setting)
            if value is None:
                continue
            found = [new for old, new in changes if old == value]
            found += [value * new // old for old, new in changes if value * new % old == 0]
            found += [value - (old - new) for old, new in changes]
            options[setting] = [v for v in dict.fromkeys(found) if v > 0 and v != value]
        for sizes in (given, changes):
            renamed = {setting: {new for old, new in sizes if old == self.values.get(setting)} for setting in settings}
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

"""Integers that only describe a module (``out_channels``, ``num_features``): its own constructor tells what they mean.

Such attributes are never used in the forward pass, so running it cannot solve them. Building the module again on the
meta device, with one integer doubled at a time, shows which dimension of which tensor follows which argument.
"""

from __future__ import annotations

import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_prune.surgery.symbols import Setting

Shapes = dict[str, tuple[int, ...]]
Argument = tuple[str, int | None]
Laws = dict[tuple[str, int], dict[Argument, int]]
"""For each dimension of each tensor, the arguments that multiply (+1) or divide (-1) its size."""


class Description(NamedTuple):
    """What a module that owns tensors said of itself before anything was resized."""

    path: str
    module: nn.Module
    kind: type[nn.Module]
    arguments: dict[str, Any]
    shapes: Shapes


class Descriptions:
    """Follows descriptive attributes through a resize; made before it.

    Args:
        model: The network, not resized yet.
    """

    def __init__(self, model: nn.Module) -> None:
        """See the class."""
        self._modules = []
        for path, module in model.named_modules():
            shapes, kind = _own_shapes(module), _builder(type(module))
            if not shapes or kind is None:
                continue
            arguments = _constructor_arguments(module, _parameters(kind.__init__))
            if arguments is not None and _integers(arguments):
                self._modules.append(Description(path, module, kind, arguments, shapes))

    def settings(self, known: Mapping[Setting, Fraction], guessing: bool = False) -> dict[Setting, int]:
        """New values of descriptive attributes, now that tensors have another size.

        Args:
            known: Settings whose change (new value / old value) is already known, among them those that do not change.
            guessing: Whether to try out what the shapes leave open (the groups of a depthwise convolution), and take
                the first answer with which a module can be built that has these very shapes.
        """
        ratios: dict[str, dict[Argument, Fraction]] = defaultdict(dict)
        for setting, ratio in known.items():
            ratios[setting.module][setting.attribute, setting.element] = ratio
        result: dict[Setting, int] = {}
        # Parametrizations may make tensors of their own, which must meet those of the module.
        present = [_own_shapes(module) for _, module, *_ in self._modules]
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            for (path, _, kind, arguments, old), now in zip(self._modules, present, strict=True):
                if old == now:
                    continue
                laws = _known_laws(kind, arguments, old)
                solved = _solve(laws, old, now, ratios[path])
                if guessing:
                    solved = _guessed(kind, arguments, laws, (old, now), solved)
                for argument, ratio in solved.items():
                    value = ratio * _value(arguments, argument)
                    if value.denominator == 1:
                        result[Setting(path, *argument)] = int(value)
        return result


def _own_shapes(module: nn.Module) -> Shapes:
    own = {**module._parameters, **module._buffers}
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items() if tensor is not None}
    if is_parametrized(module):
        shapes.update(_parametrized_shapes(module))
    return shapes


def _parametrized_shapes(module: nn.Module) -> Shapes:
    """Shapes of the tensors that a module computes from parameters; it is left as it was."""
    shapes = {}
    for name, parametrizations in module.parametrizations.items():  # type: ignore[operator, union-attr]
        modes = [(part, part.training) for part in parametrizations.modules()]
        parametrizations.train(False)  # in which none of them takes a step towards anything
        try:
            with torch.no_grad():
                shapes[name] = tuple(parametrizations().shape)
        except Exception:  # a parametrization of the user's may refuse anything; then it tells us nothing
            continue
        finally:
            for part, mode in modes:
                part.training = mode
    return shapes


def _builder(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class itself or, where it hands on any arguments (as recurrent layers do), the one that names them."""
    for base in kind.__mro__:
        if issubclass(base, nn.Module) and "__init__" in vars(base):
            kinds = [parameter.kind for parameter in _parameters(base.__init__).values()]
            if inspect.Parameter.VAR_KEYWORD not in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
                return base
    return None


def _constructor_arguments(module: nn.Module, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any] | None:
    """The arguments the module would be built from, as far as its attributes of the same names tell."""
    arguments: dict[str, Any] = {}
    for name, parameter in parameters.items():
        try:
            value = getattr(module, name)
        except Exception:  # missing, or a property of the user's that raises whatever it likes
            if parameter.default is parameter.empty:
                return None
            continue
        if isinstance(value, Tensor):
            value = True
        elif value is None and isinstance(parameter.default, bool):
            value = False
        arguments[name] = value
    return arguments


@cache
def _parameters(constructor: Callable[..., None]) -> Mapping[str, inspect.Parameter]:
    """Parameters of a constructor, without ``self``."""
    return dict(list(inspect.signature(constructor).parameters.items())[1:])


def _value(arguments: Mapping[str, Any], argument: Argument) -> int:
    value = arguments[argument[0]]
    return int(value if argument[1] is None else value[argument[1]])


def _scaled(arguments: Mapping[str, Any], argument: Argument, ratio: Fraction) -> dict[str, Any] | None:
    scaled = ratio * _value(arguments, argument)
    if scaled.denominator != 1:
        return None
    name, element = argument
    if element is None:
        return {**arguments, name: int(scaled)}
    items = list(arguments[name])
    items[element] = int(scaled)
    return {**arguments, name: type(arguments[name])(items)}


def _built_shapes(kind: type[nn.Module], arguments: Mapping[str, Any]) -> Shapes | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a module that nobody uses
            return _own_shapes(kind(**arguments))
    except Exception:  # a constructor of the user's may refuse anything; then it tells us nothing
        return None


_LAWS: WeakKeyDictionary[type[nn.Module], dict[str, Laws]] = WeakKeyDictionary()

_LAWS_KEPT = 512


def _known_laws(kind: type[nn.Module], arguments: Mapping[str, Any], shapes: Shapes) -> Laws:
    """Laws are the same for all modules built alike."""
    known = _LAWS.setdefault(kind, {})
    key = f"{sorted(arguments.items(), key=lambda item: item[0])} {shapes}"
    if key not in known:
        if len(known) >= _LAWS_KEPT:
            known.clear()
        known[key] = _laws(kind, arguments, shapes)
    return known[key]


def _laws(kind: type[nn.Module], arguments: Mapping[str, Any], shapes: Shapes) -> Laws:
    built = _built_shapes(kind, arguments)
    if built != shapes:
        return {}
    laws: Laws = {}
    for argument in _integers(arguments):
        # The last one is for an odd number of groups, which can be neither doubled nor halved.
        for ratio in (Fraction(2), Fraction(1, 2), Fraction(1, max(_value(arguments, argument), 1))):
            changed = _scaled(arguments, argument, ratio)
            other = _built_shapes(kind, changed) if changed is not None else None
            if other is None or other.keys() != shapes.keys():
                continue
            for name, shape in shapes.items():
                for dim, (old, new) in enumerate(zip(shape, other[name], strict=False)):
                    if new == ratio * old != old:
                        laws.setdefault((name, dim), {})[argument] = 1
                    elif new * ratio == old != new:
                        laws.setdefault((name, dim), {})[argument] = -1
            break
    return laws


def _integers(arguments: Mapping[str, Any]) -> list[Argument]:
    found: list[Argument] = []
    for name, value in arguments.items():
        if type(value) is int:
            found.append((name, None))
        elif isinstance(value, (tuple, list)):
            found.extend((name, i) for i, item in enumerate(value) if type(item) is int)
    return found


def _guessed(
    kind: type[nn.Module],
    arguments: Mapping[str, Any],
    laws: Laws,
    shapes: tuple[Shapes, Shapes],
    solved: Mapping[Argument, Fraction],
) -> dict[Argument, Fraction]:
    """The ratios, with those that the shapes leave open: such an argument stays, or goes with one that is solved."""
    old, now = shapes
    left = dict.fromkeys(argument for law in laws.values() for argument in law if argument not in solved)
    for ratio in (Fraction(1), *dict.fromkeys(solved.values())):
        for argument in left:
            tried = {**solved, **_solve(laws, old, now, {**solved, argument: ratio}), argument: ratio}
            changed: dict[str, Any] | None = dict(arguments)
            for each, change in tried.items():
                changed = None if changed is None else _scaled(changed, each, change)
            if changed is not None and _built_shapes(kind, changed) == now:
                return {each: change for each, change in tried.items() if change != 1}
    return dict(solved)


def _solve(laws: Laws, old: Shapes, new: Shapes, known: Mapping[Argument, Fraction]) -> dict[Argument, Fraction]:
    """Ratios of the arguments: each dimension with a single unknown gives one."""
    ratios = dict(known)
    progress = True
    while progress:
        progress = False
        for (name, dim), law in laws.items():
            unknown = [argument for argument in law if argument not in ratios]
            if len(unknown) != 1 or name not in new:
                continue
            ratio = Fraction(new[name][dim], old[name][dim])
            for argument, exponent in law.items():
                if argument in ratios:
                    ratio /= ratios[argument] ** exponent
            ratios[unknown[0]] = ratio ** law[unknown[0]]
            progress = True
    return {argument: ratio for argument, ratio in ratios.items() if argument not in known and ratio != 1}

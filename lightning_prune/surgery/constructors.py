"""Integers that only describe a module (``out_channels``, ``num_features``): its own constructor tells what they mean.

Such attributes are never used in the forward pass, so running it cannot solve them. Building the module again on the
meta device, with one integer doubled at a time, shows which dimension of which tensor follows which argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.surgery.attributes import Setting

Shapes = dict[str, tuple[int, ...]]
Argument = tuple[str, int | None]


def described_settings(
    model: nn.Module, before: Mapping[str, tuple[int, ...]], known: Mapping[Setting, Fraction]
) -> dict[Setting, int]:
    """New values of descriptive attributes after tensors changed their size.

    Args:
        model: The network, already resized.
        before: Shapes of the tensors that were resized, by full name, as they were before.
        known: Settings whose change (new value / old value) is already known, among them those that do not change.
    """
    result: dict[Setting, int] = {}
    cache: dict[Any, Any] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        now = _own_shapes(module)
        old = {name: before.get(prefix + name, shape) for name, shape in now.items()}
        if old == now:
            continue
        arguments = _constructor_arguments(module)
        if arguments is None:
            continue
        key = (type(module), repr(sorted(arguments.items(), key=lambda item: item[0])))
        if key not in cache:
            cache[key] = _laws(type(module), arguments, old)
        ratios = {
            (s.attribute, s.element): ratio for s, ratio in known.items() if s.module == path
        }  # fmt: skip
        for argument, ratio in _solve(cache[key], old, now, ratios).items():
            value = ratio * _value(arguments, argument)
            if value.denominator == 1:
                result[Setting(path, *argument)] = int(value)
    return result


def _own_shapes(module: nn.Module) -> Shapes:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tuple(tensor.shape) for name, tensor in own}


def _constructor_arguments(module: nn.Module) -> dict[str, Any] | None:
    """The arguments the module would be built from, as far as its attributes of the same names tell."""
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if hasattr(module, name):
            value = getattr(module, name)
            if isinstance(value, Tensor):
                value = True
            elif value is None and isinstance(parameter.default, bool):
                value = False
            arguments[name] = value
        elif parameter.default is parameter.empty:
            return None
    return arguments


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
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return _own_shapes(kind(**arguments))
    except Exception:  # a constructor of the user's may refuse anything; then it tells us nothing
        return None


def _laws(kind: type[nn.Module], arguments: dict[str, Any], shapes: Shapes) -> dict[tuple[str, int], dict[Argument, int]]:
    """For each dimension of each tensor, which arguments multiply (+1) or divide (-1) its size."""
    built = _built_shapes(kind, arguments)
    if built != shapes:
        return {}
    laws: dict[tuple[str, int], dict[Argument, int]] = {}
    for argument in _integers(arguments):
        for ratio in (Fraction(2), Fraction(1, 2)):
            changed = _scaled(arguments, argument, ratio)
            other = _built_shapes(kind, changed) if changed is not None else None
            if other is None or other.keys() != shapes.keys():
                continue
            for name, shape in shapes.items():
                for dim, (old, new) in enumerate(zip(shape, other[name], strict=True)):
                    if Fraction(new, old) == ratio:
                        laws.setdefault((name, dim), {})[argument] = 1
                    elif Fraction(new, old) == 1 / ratio:
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


def _solve(
    laws: Mapping[tuple[str, int], Mapping[Argument, int]], old: Shapes, new: Shapes, known: Mapping[Argument, Fraction]
) -> dict[Argument, Fraction]:
    """Ratios of the arguments: each dimension with a single unknown gives one."""
    ratios = dict(known)
    progress = True
    while progress:
        progress = False
        for (name, dim), law in laws.items():
            unknown = [argument for argument in law if argument not in ratios]
            if len(unknown) != 1:
                continue
            ratio = Fraction(new[name][dim], old[name][dim])
            for argument, exponent in law.items():
                if argument in ratios:
                    ratio /= ratios[argument] ** exponent
            ratios[unknown[0]] = ratio ** law[unknown[0]]
            progress = True
    return {argument: ratio for argument, ratio in ratios.items() if argument not in known and ratio != 1}

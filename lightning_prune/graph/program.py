"""Programs: ways of running the user's network that leave no trace behind."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Program:
    """One way of running the user's network, on fixed real data, that leaves no trace.

    Args:
        name: How to speak of it in messages, for example ``"training_step (train mode)"``.
        run: Runs it once with the network's present weights. Returns a (nested) collection of tensors, all of which
            a shrunk network must reproduce where they keep their shape.
        training: Whether the network runs in train mode.
        samples: Number of samples in the data it runs on; costs are given per sample.
        handed_out: Picks from what ``run`` returned the tensors that the network hands to the outside; these keep
            their shape whatever is pruned.
    """

    name: str
    run: Callable[[], Any]
    training: bool = False
    samples: int = 1
    handed_out: Callable[[Any], Any] = lambda result: result


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers and in the attributes of objects (a dataclass, say), each once."""
    seen: dict[int, Any] = {}
    pending = [value]
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, (str, bytes, type, nn.Module, ModuleType, FunctionType)):
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, Mapping):
            pending.extend(reversed(list(item.values())))
        elif isinstance(item, (list, tuple, set, frozenset)):
            pending.extend(reversed(list(item)))
        else:
            pending.extend(reversed(list(getattr(item, "__dict__", {}).values())))
            pending.extend(getattr(item, name) for name in getattr(item, "__slots__", ()) if hasattr(item, name))


def map_nested(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to everything in nested tuples, lists and dicts, such as an operator's arguments."""
    if isinstance(value, dict):
        return {key: map_nested(function, item) for key, item in value.items()}
    if isinstance(value, list):
        return [map_nested(function, item) for item in value]
    if not isinstance(value, tuple):
        return function(value)
    items = [map_nested(function, item) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


_unobserved_depth = 0


@contextmanager
def unobserved() -> Iterator[None]:
    """Inside, a tracer does not look: for bookkeeping around the user's code that is not part of the program."""
    global _unobserved_depth
    _unobserved_depth += 1
    try:
        with _disable_current_modes():
            yield
    finally:
        _unobserved_depth -= 1


def is_observed() -> bool:
    """Whether a tracer should look at what is executed now."""
    return _unobserved_depth == 0


@contextmanager
def preserved(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Run ``model`` in the given mode and put modes, buffers, gradients and random state back afterwards.

    Args:
        model: Any module.
        training: The mode for every module of ``model``; None leaves each as it is.
    """
    modes = [(module, module.training) for module in model.modules()]
    scripted = torch.jit.ScriptModule  # whose buffers live outside Python
    registered = [(m, dict(m._buffers)) for m in model.modules() if not isinstance(m, scripted)]
    with unobserved():
        buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = sorted({t.device.index or 0 for t in [*model.parameters(), *model.buffers()] if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            for parameter, _ in gradients:
                parameter.grad = None
            if training is not None:
                model.train(training)
            yield
    finally:
        for module, named in registered:
            module._buffers.clear()
            module._buffers.update(named)
        with unobserved(), torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put back which objects the attributes of all modules refer to, and the random state of Python and NumPy."""
    attributes = [(m, dict(vars(m))) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, kept in attributes:
            vars(module).clear()
            vars(module).update(kept)


def count_samples(data: Any) -> int:
    """Length of the first tensor in (nested) data; 1 if there is none."""
    tensors = [leaf for leaf in tree_leaves(data) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    return len(tensors[0]) if tensors else 1


def module_programs(model: nn.Module, inputs: Tensor | Sequence[Any] | Mapping[str, Any]) -> list[Program]:
    """Programs that call ``model`` on example inputs, in evaluation and in train mode.

    Args:
        model: Any module.
        inputs: One tensor, a sequence of positional arguments, or a mapping of keyword arguments.
    """
    arguments: Sequence[Any] = inputs if isinstance(inputs, (tuple, list)) else ()
    keywords: Mapping[str, Any] = inputs if isinstance(inputs, Mapping) else {}
    if isinstance(inputs, Tensor):
        arguments = (inputs,)

    def runner(training: bool) -> Callable[[], Any]:
        def run() -> Any:
            with attributes_kept(model), preserved(model, training), torch.no_grad():
                return model(*arguments, **keywords)

        return run

    samples = count_samples((arguments, keywords))
    return [
        Program(f"forward ({'train' if training else 'evaluation'} mode)", runner(training), training, samples)
        for training in (False, True)
    ]

"""Programs: ways of running the user's network that leave no trace behind."""

from __future__ import annotations

import gc
import inspect
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.observation import bookkeeping, unobserved
from lightning_prune.graph.support import ParametersKept, check_inputs, check_result, hinted, same_structure

MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
SEQUENCES = (list, deque)
"""The containers, beside sets, whose contents are put back after a run."""


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
        restricts: Whether it only says what must stay as it is: it may fail, and tensors that no other program uses
            stay whole.
        deployed: Whether it is how the network will be used, so that its cost is the network's cost.
        derived: Whether the analysis has made it of another one.
    """

    name: str
    run: Callable[[], Any]
    training: bool = False
    samples: int = 1
    handed_out: Callable[[Any], Any] = lambda result: result
    restricts: bool = False
    deployed: bool = False
    derived: bool = False


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


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python does not look for garbage in cycles: many small objects are made here, and none of them is any."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_lookers: list[Callable[[], None]] = []


@contextmanager
def before_putting_back(look: Callable[[], None]) -> Iterator[None]:
    """Have a look at the network each time when what a program has run inside is about to be undone."""
    _lookers.append(look)
    try:
        yield
    finally:
        _lookers.remove(look)


@contextmanager
def preserved(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Run ``model`` in the given mode and put modes, buffers, gradients and random state back afterwards.

    Args:
        model: Any module.
        training: The mode for every module of ``model``; None leaves each as it is.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    scripted = torch.jit.ScriptModule  # whose buffers live outside Python
    registered = [(module, dict(module._buffers)) for module in modules if not isinstance(module, scripted)]
    parameters = list(_own(modules, "_parameters"))
    with bookkeeping():
        buffers = [(buffer, buffer.detach().clone()) for buffer in _own(modules, "_buffers")]
        gradients = [(parameter, parameter.grad) for parameter in parameters]
    held = [*parameters, *(buffer for buffer, _ in buffers)]
    devices = sorted({tensor.device.index or 0 for tensor in held if tensor.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), _other_accelerators():
            with bookkeeping():
                for parameter, gradient in gradients:
                    if gradient is not None:
                        parameter.grad = None
            if training is not None:
                model.train(training)
            yield
            for look in _lookers:
                look()
    finally:
        for module, named in registered:
            module._buffers.clear()
            module._buffers.update(named)
        with bookkeeping():
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for buffer, value in buffers:
                _put_back(buffer, value)
        for module, mode in modes:
            module.training = mode


def _put_back(buffer: Tensor, value: Tensor) -> None:
    """Give a buffer its content back, even one that was made in a validation, in inference mode."""
    if torch._debug_has_internal_overlap(buffer) == 1:  # an expanded one, which nothing can have written to
        return
    with torch.inference_mode() if buffer.is_inference() else torch.no_grad():
        buffer.copy_(value)


@contextmanager
def _other_accelerators() -> Iterator[None]:
    """Put the random state of those accelerators back that ``fork_rng`` does not know without being told."""
    available = [(torch.mps, torch.backends.mps.is_available()), (torch.xpu, torch.xpu.is_available())]
    states = [(device, device.get_rng_state()) for device, usable in available if usable]
    try:
        yield
    finally:
        for device, state in states:
            device.set_rng_state(state)


def _own(modules: Iterable[nn.Module], registry: str) -> Iterator[Tensor]:
    """What modules have registered, each tensor once."""
    seen: set[int] = set()
    for module in modules:
        for tensor in getattr(module, registry).values():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put back what the attributes of all modules refer to and contain, and the random state of Python and NumPy."""
    attributes = [(m, dict(vars(m))) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    contents = [(container, container.copy()) for _, kept in attributes for container in _containers(kept.values())]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, kept in attributes:
            vars(module).clear()
            vars(module).update(kept)
        for container, content in contents:
            container.clear()
            container.extend(content) if type(container) in SEQUENCES else container.update(content)


def _containers(values: Iterable[Any]) -> Iterator[Any]:
    """Every list, dict and set that a module holds, nested ones too; a cache or its hooks, say."""
    for value in values:
        if type(value) in (*MAPPINGS, *SEQUENCES, set):
            yield value
        if type(value) in MAPPINGS:
            yield from _containers(value.values())
        elif type(value) in (*SEQUENCES, tuple):
            yield from _containers(value)


def forget_caches(model: nn.Module) -> None:
    """Let modules drop what they worked out from their weights, as many do when their mode is switched."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(not model.training)
    model.train(not model.training)
    for module, mode in modes:
        module.training = mode


def count_samples(data: Any) -> int:
    """Length of the first tensor in (nested) data; 1 if there is none."""
    tensors = [leaf for leaf in tree_leaves(data) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    return len(tensors[0]) if tensors else 1


Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""One tensor, a sequence of positional arguments or a mapping of keyword arguments."""


@dataclass(frozen=True)
class Example:
    """A way to call a network.

    Args:
        inputs: One tensor, a sequence of positional arguments or a mapping of keyword arguments.
        method: Name of the method that is called with them.
    """

    inputs: Inputs
    method: str = "forward"


def module_programs(
    model: nn.Module, inputs: Inputs | Example, more: Sequence[Inputs | Example | Program] = ()
) -> list[Program]:
    """Programs that call ``model`` on example inputs, in evaluation and in train mode.

    Args:
        model: Any module.
        inputs: One tensor, a sequence of positional arguments, or a mapping of keyword arguments; or an
            :class:`Example`, to call another method than ``forward``.
        more: Further ones, for parts of the network that the first does not reach; each is run with other random
            numbers than the ones before, so that the same inputs again may skip other layers. A :class:`Program` is
            taken as it is.

    Raises:
        ConfigurationError: If there is no such method, or inputs are of another kind.
        TraceError: If nothing can be learnt from running the network on such inputs.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> [program.name for program in module_programs(net, torch.zeros(3, 4), [Example([True], "train")])]
        ... # doctest: +NORMALIZE_WHITESPACE
        ['forward (evaluation mode)', 'forward (train mode)', 'train (evaluation mode)', 'train (train mode)']
    """
    programs: list[Program] = []
    calls: Counter[str] = Counter()
    for entry in (inputs, *more):
        if isinstance(entry, Program):
            programs.append(entry)
            continue
        example = entry if isinstance(entry, Example) else Example(entry)
        calls[example.method] += 1
        copy = calls[example.method]
        # Glued to the method, so that it counts as a call of its own: one that fails is an error.
        name = example.method if copy == 1 else f"{example.method}#{copy}"
        programs += _example_programs(model, example, name, copy - 1)
    return programs


def _example_programs(model: nn.Module, example: Example, name: str, seed: int) -> list[Program]:
    """Programs for one example, in evaluation and in train mode; with a seed unless it is 0."""
    given, named = _arguments(example.inputs)
    if not callable(getattr(model, example.method, None)):
        raise ConfigurationError(f"{type(model).__name__} has no method '{example.method}' to run it by")
    _check_call(model, example.method, given, named)
    tensors = [tensor for tensor in tree_leaves((given, named)) if isinstance(tensor, Tensor)]
    check_inputs(model, name, tensors)

    def program(training: bool) -> Program:
        spoken = f"{name} ({'train' if training else 'evaluation'} mode)"
        parameters_kept = ParametersKept(model)

        def run() -> Any:
            method = model if example.method == "forward" else getattr(model, example.method)
            arguments, keywords = copied((given, named))
            torch.clear_autocast_cache()  # of a surrounding autocast, whose weights may be those of an earlier run
            with attributes_kept(model), preserved(model, training), parameters_kept(), torch.no_grad():
                if seed:
                    seed_everywhere(seed)
                with same_structure(model, spoken), hinted(model, spoken, tensors):
                    result = method(*arguments, **keywords)
            check_result(model, spoken, result, tensors_in(result))
            return result

        return Program(spoken, run, training, count_samples((given, named)))

    return [program(training) for training in (False, True)]


def _check_call(model: nn.Module, method: str, given: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Refuse example inputs that do not fit the parameters of a method, as far as these are known."""
    try:
        signature = inspect.signature(getattr(model, method))
    except ValueError:
        return
    try:
        signature.bind(*given, **named)
    except TypeError as error:
        raise ConfigurationError(
            f"{type(model).__name__}.{method} does not take these example inputs: {error}. A dict is taken as keyword "
            f"arguments, a list or tuple as positional ones; to give one as the only argument, wrap it: (inputs,)"
        ) from error


def copied(data: Any) -> Any:
    """Inputs or a batch with tensors of their own, so that a network which writes into them does no harm.

    A tensor that is there twice is one tensor in the copy, too.
    """
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return copies[id(tensor)]

    with unobserved():
        if hasattr(data, "clone") and not isinstance(data, Tensor):
            return data.clone()
        return apply_to_collection(data, Tensor, copy)


def _arguments(inputs: Inputs) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Example inputs as positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, (tuple, list)):
        return inputs, {}
    raise ConfigurationError(
        f"example inputs must be a tensor, a list or tuple of arguments or a dict of keyword arguments, not "
        f"{type(inputs).__name__}"
    )


def seed_everywhere(seed: int) -> None:
    """Seed torch, numpy and Python, and unlike Lightning's function leave the environment variables alone."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)

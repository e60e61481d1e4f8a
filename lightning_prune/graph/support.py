"""What cannot be traced, said in words: before anything is run where that can be seen, otherwise while it runs."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import Buffer, Parameter, is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.errors import PruneError, TraceError
from lightning_prune.graph.observation import bookkeeping

_PLAIN = (Tensor, Parameter, Buffer)


def check_network(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a network that cannot be traced or cut at all.

    Args:
        model: The network.
        tensors: Its parameters and buffers by name.

    Raises:
        TraceError: With the part that is in the way, and what to do about it.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            f"{_class_of(model)} is a ScriptModule, which is compiled for the sizes it has: prune the nn.Module it was "
            f"made from, and script the smaller network"
        )
    for path, module in model.named_modules():
        _check_wrapper(path, module)
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    _check_devices({name: tensor for name, tensor in tensors.items() if isinstance(tensor, Parameter)})
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise TraceError(
                f"{name} is on the meta device, where tensors have no values, so nothing can be proven: move the "
                f"network to a real device with `to_empty(device=...)` and load its weights, then prune it"
            )
    if not any(isinstance(tensor, Parameter) for tensor in tensors.values()):
        packed = next((name for name, module in model.named_modules() if _is_packed(module)), None)
        raise TraceError(
            f"{_class_of(model)} has no parameters, so there is nothing to prune"
            if packed is None
            else f"{_class_of(model)} has no parameters: {_named(packed)} is quantised and keeps its weights in a "
            f"packed form that cannot be cut; prune the network first, then quantise the smaller one"
        )


def left_whole(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Modules and tensors that cannot be cut though the rest of the network can, with the reason.

    Args:
        model: The network.
        tensors: Its parameters and buffers by name.
    """
    whole: dict[str, str] = {}
    for path, module in model.named_modules():
        if _is_packed(module):
            whole[path] = "is quantised and keeps its weights in a packed form; quantise after pruning"
        if isinstance(module, torch.jit.ScriptModule):
            inside = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
            for name in (name for name, tensor in tensors.items() if id(tensor) in inside and name not in whole):
                whole[name] = f"belongs to the scripted module '{path}'; script it after pruning"
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            whole[name] = f"is a sparse tensor ({_layout_of(tensor)})"
        elif type(tensor) not in _PLAIN:
            whole[name] = f"is a tensor of the class {type(tensor).__name__}, whose numbers may be kept in another way"
    return {**_sharing_memory(tensors), **whole}


def _sharing_memory(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Parameters, and what they share memory with, that would go apart when each is given memory of its own."""
    spans = []
    for name, tensor in tensors.items():
        if tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() and type(tensor) in _PLAIN:
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            spans.append((tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size(), name))
    found = {}
    last, end = "", 0
    for start, stop, name in sorted(spans):
        if start < end and any(isinstance(tensors[each], nn.Parameter) for each in (name, last)):
            for one, other in ((name, last), (last, name)):
                found[one] = (
                    f"shares memory with {other}, which it is not; to tie them, use one parameter in both places"
                )
        if stop > end:
            last, end = name, stop
    return found


def check_samples(program: str, samples: int) -> None:
    """Refuse data without a sample.

    Raises:
        TraceError: If there is none.
    """
    if samples == 0:
        raise TraceError(
            f"{program} runs on a batch of size 0, from which nothing can be learnt: give at least one sample"
        )


def check_inputs(model: nn.Module, program: str, inputs: Iterable[Tensor]) -> None:
    """Refuse example inputs that nothing can be learnt from.

    Raises:
        TraceError: If one is nested or has no values.
    """
    for tensor in inputs:
        if tensor.is_nested:
            raise TraceError(
                f"an example input of {program} is a nested tensor, whose sizes cannot be followed: give padded tensors"
            )
        if tensor.is_meta:
            raise TraceError(
                f"an example input of {program} is on the meta device, where tensors have no values{_on_devices(model)}"
            )


def check_result(model: nn.Module, program: str, result: Any, tensors: Iterable[Tensor]) -> None:
    """Refuse a result that says nothing about the network.

    Args:
        model: The network.
        program: What was run.
        result: What it returned.
        tensors: The tensors in it.

    Raises:
        TraceError: If there is none, or their class hides what was done with them.
    """
    empty = True
    for tensor in tensors:
        empty = False
        if type(tensor) not in _PLAIN:
            raise TraceError(
                f"{program} of {_class_of(model)} returned a tensor of the class {type(tensor).__name__}, through "
                f"which channels cannot be followed: give the network plain tensors, as `.as_subclass(torch.Tensor)` "
                f"makes them"
            )
    if empty:
        raise TraceError(
            f"{program} of {_class_of(model)} returned no tensor but {_kind(result)}, so a smaller network cannot be "
            f"compared with it: return the tensors that it computes"
        )


@contextmanager
def hinted(model: nn.Module, program: str, inputs: Iterable[Tensor]) -> Iterator[None]:
    """Say so if what runs inside fails while its example inputs are on another device than the network.

    Raises:
        TraceError: In place of such a failure.
    """
    try:
        yield
    except RuntimeError as error:
        own = {str(parameter.device) for parameter in model.parameters()}
        others = sorted({str(tensor.device) for tensor in inputs} - own)
        if isinstance(error, PruneError) or not others or not own:
            raise
        raise TraceError(
            f"the network failed in {program}: its example inputs are on {', '.join(others)}{_on_devices(model)} "
            f"({type(error).__name__}: {error})"
        ) from error


@contextmanager
def same_structure(model: nn.Module, program: str) -> Iterator[None]:
    """See to it that what runs inside leaves sub-modules and parameters the objects they were.

    Raises:
        TraceError: If it does not; putting things back is left to the caller.
    """
    before = _structure(model)
    yield
    after = _structure(model)
    changed = [name for name in {**before, **after} if before.get(name) is not after.get(name)]
    if changed:
        name = changed[0]
        what = "removes" if name not in after else "replaces" if name in before else "adds"
        raise TraceError(
            f"{program} of {_class_of(model)} {what} '{name}' while it runs; a network can only be cut if its parts "
            f"stay the same objects: make them in `__init__`, or run the network once before it is pruned if only its "
            f"first run does this"
        )


class ParametersKept:
    """Puts back the parameters that a network writes to while it runs, as some do to keep them normalised.

    Which ones it writes to is found out in its first run: copying all of them each time would be slow.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        """See the class."""
        self._model = model
        self._written: set[Parameter] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Everything that is written to a parameter inside is undone afterwards."""
        with bookkeeping():
            strided = [p for p in self._model.parameters() if p.layout is torch.strided and type(p) in _PLAIN]
            memory = {parameter: parameter.data for parameter in strided}
            copies = {p: memory[p].clone() for p in memory if self._written is not None and p in self._written}
        writes = _Writes(memory, copies)
        try:
            with writes if self._written is None else nullcontext():
                yield
            self._written = set(copies) if self._written is None else self._written
        finally:
            with bookkeeping(), torch.no_grad():
                for parameter, data in memory.items():
                    if parameter.data_ptr() != data.data_ptr() or parameter.shape != data.shape:
                        parameter.data = data
                for parameter, copy in copies.items():
                    parameter.copy_(copy)


class _Writes(TorchDispatchMode):
    """Copies a parameter just before something is written to its memory.

    Args:
        memory: The memory of each parameter.
        copies: Where the copies go.
    """

    def __init__(self, memory: Mapping[Parameter, Tensor], copies: dict[Parameter, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._owners: dict[int, list[Parameter]] = defaultdict(list)
        for parameter, data in memory.items():
            self._owners[data.untyped_storage()._cdata].append(parameter)
        self._memory, self._copies = memory, copies

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at what is about to be written."""
        kwargs = kwargs or {}
        if not func._schema.is_mutable:
            return func(*args, **kwargs)
        for number, name in _written_arguments(func):
            value = args[number] if number < len(args) else kwargs.get(name)
            self._keep(value if isinstance(value, (list, tuple)) else [value])
        return func(*args, **kwargs)

    def _keep(self, values: Iterable[Any]) -> None:
        for value in values:
            if not isinstance(value, Tensor) or value.layout is not torch.strided:
                continue
            for owner in self._owners.get(value.untyped_storage()._cdata, ()):
                if owner not in self._copies:
                    with bookkeeping():
                        self._copies[owner] = self._memory[owner].clone()


@cache
def _written_arguments(function: OpOverload) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments that an operator writes to."""
    arguments = enumerate(function._schema.arguments)
    return tuple((n, a.name) for n, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _check_wrapper(path: str, module: nn.Module) -> None:
    """Refuse a module that wraps another one to run it on several devices."""
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        raise TraceError(
            f"{_named(path)} is wrapped in {_class_of(module)}: prune its `.module`, and wrap the smaller network anew"
        )
    # A network can only be wrapped by what was imported already, and importing it is slow.
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if fsdp is not None and isinstance(module, fsdp):
        raise TraceError(
            f"{_named(path)} is wrapped in {_class_of(module)}, which shards its parameters: prune the network before "
            f"it is wrapped"
        )


def _check_tensor(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise TraceError(
            f"{name} is a lazy parameter that has no shape yet: run one forward pass through the network before "
            f"it is pruned, or give the LightningModule an example_input_array"
        )
    if tensor.is_nested:
        raise TraceError(f"{name} is a nested tensor, whose sizes cannot be followed: keep its parts as single tensors")
    sharded = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if sharded is not None and isinstance(tensor, sharded):
        raise TraceError(
            f"{name} is a DTensor, which is spread over several devices: prune the network before it is sharded"
        )


def _check_devices(parameters: Mapping[str, Tensor]) -> None:
    homes: dict[torch.device, str] = {}
    for name, parameter in parameters.items():
        homes.setdefault(parameter.device, name)
    if len(homes) > 1:
        (first, one), (second, other) = list(homes.items())[:2]
        raise TraceError(
            f"the network lives on several devices ({one} on {first}, {other} on {second}): move it to a single one "
            f"before it is pruned"
        )


def _is_packed(module: nn.Module) -> bool:
    """Whether a module holds an object of torch's C++ side, as quantised layers do."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return any(isinstance(value, torch.ScriptObject) for value in vars(module).values())


def _structure(model: nn.Module) -> dict[str, object]:
    """Every sub-module and parameter by name, under all of its names."""
    found: dict[str, object] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[path] = module
        for name, parameter in module._parameters.items():
            found[f"{path}.{name}" if path else name] = parameter
    return found


def _on_devices(model: nn.Module) -> str:
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    return f"; the network is on {', '.join(devices)}: move them there" if devices else ""


def _class_of(module: object) -> str:
    return type(module).__name__


def _named(path: str) -> str:
    return f"'{path}'" if path else "the network"


def _kind(result: object) -> str:
    return "None" if result is None else f"a value of type {type(result).__name__}"


def _layout_of(tensor: Tensor) -> str:
    return str(tensor.layout).removeprefix("torch.")

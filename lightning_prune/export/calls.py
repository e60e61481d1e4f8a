"""How a network is called for an export, and what state it is in meanwhile."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from lightning_prune.compiled import WRAPPED
from lightning_prune.errors import ConfigurationError
from lightning_prune.probe.snapshot import Snapshot


@dataclass(frozen=True)
class Call:
    """Arguments of ``forward``.

    Attributes:
        args: Positional ones.
        kwargs: Keyword ones, in the order in which ``forward`` names them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Call:
        """The same arguments with something done to each tensor."""
        return self.zipped([function] * len(self.leaves()))

    def zipped(self, functions: list[Callable[[Tensor], Tensor]]) -> Call:
        """The same arguments with something done to each tensor, one function for each of :meth:`leaves`."""
        leaves, structure = pytree.tree_flatten((self.args, self.kwargs))
        changed = [f(leaf) if isinstance(leaf, Tensor) else leaf for f, leaf in zip(functions, leaves, strict=True)]
        return Call(*pytree.tree_unflatten(changed, structure))

    def leaves(self) -> list[Any]:
        """Everything among the arguments that is no container, in order."""
        return pytree.tree_leaves((self.args, self.kwargs))

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, in order."""
        return tensors_in((self.args, self.kwargs))


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested containers, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def call_of(model: nn.Module, example: Any) -> Call:
    """How ``forward`` takes an example, with tensors of its own on the device of the network.

    Raises:
        ConfigurationError: If there is no example, or ``forward`` does not take it.
    """
    if example is None:
        example = getattr(model, "example_input_array", None)
    if example is None:
        raise ConfigurationError(
            f"give an example input of {type(model).__name__}.forward, or set `example_input_array` on the module"
        )
    signature = inspect.signature(model.forward)
    complaints = []
    for call in _readings(example):
        try:
            bound = signature.bind(*call.args, **call.kwargs)
        except TypeError as error:
            complaints.append(str(error))
        else:
            ordered = {name: call.kwargs[name] for name in bound.arguments if name in call.kwargs}
            device = next((tensor.device for tensor in state_of(model).values()), torch.device("cpu"))
            with torch.inference_mode(False):
                return Call(call.args, {**ordered, **call.kwargs}).mapped(partial(_copied, device=device))
    raise ConfigurationError(f"{type(model).__name__}.forward{signature} does not take the example: {complaints[0]}")


def _readings(example: Any) -> Iterator[Call]:
    """What an example can mean, the likeliest first."""
    if isinstance(example, (tuple, list)):
        yield Call(tuple(example), {})
    elif isinstance(example, Mapping) and all(isinstance(name, str) for name in example):
        yield Call((), dict(example))
    yield Call((example,), {})


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True)


def that_runs(model: nn.Module, call: Call) -> Call:
    """The call, or the same in the floating type of the network where only that runs.

    Raises:
        ConfigurationError: If neither runs, or nothing comes of it.
    """
    types = {tensor.dtype for tensor in state_of(model).values() if tensor.is_floating_point()}
    cast = [call.mapped(partial(_cast, dtype=dtype)) for dtype in types if len(types) == 1]
    errors: list[Exception] = []
    for attempt in (call, *cast):
        try:
            found = outputs_of(model, attempt)
        except Exception as error:
            errors.append(error)
            continue
        if not found:
            raise ConfigurationError(f"{type(model).__name__}.forward returned no tensor")
        return attempt
    given = ", ".join(f"{tuple(t.shape)} of {t.dtype}" for t in call.tensors())
    raise ConfigurationError(
        f"{type(model).__name__}.forward failed on the example, {given}: {reason(errors[0])}"
    ) from errors[0]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def outputs_of(model: nn.Module, call: Call, seed: int = 0) -> list[Tensor]:
    """The tensors that the network itself gives as it is now, without any compiled code."""
    torch.manual_seed(seed)
    copied = call.mapped(torch.clone)  # a network may write into its input
    snapshot = Snapshot(model)  # and count, or collect
    try:
        with torch.compiler.set_stance("force_eager"):
            return tensors_in(model(*copied.args, **copied.kwargs))
    finally:
        snapshot.restore()


def refuse_valueless(model: nn.Module) -> None:
    """Refuse a network that has no values.

    Raises:
        ConfigurationError: If a parameter or buffer is lazy or on the meta device.
    """
    for name, tensor in state_of(model).items():
        if is_lazy(tensor) or tensor.is_meta:
            kind = "lazy" if is_lazy(tensor) else "on the meta device"
            raise ConfigurationError(
                f"{name!r} of {type(model).__name__} has no values yet, for it is {kind}: run one batch through the "
                f"network, or load its weights, before it is exported"
            )


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wrapped, or the module itself."""
    while WRAPPED in module._modules:
        module = getattr(module, WRAPPED)
    return module


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Keep a module in evaluation mode, uncompiled and logging nothing; put back whatever ``forward`` did to it."""
    snapshot = Snapshot(model)
    try:
        for module in list(model.modules()):
            children = {name: uncompiled(child) for name, child in module._modules.items() if child is not None}
            module._modules.update(children)
        model.eval()
        for module in model.modules():
            if hasattr(type(module), "log_dict") and hasattr(type(module), "trainer"):
                # A Trainer keeps no results outside its loops, so logging in `forward` would fail.
                vars(module).update(log=_do_nothing, log_dict=_do_nothing, print=_do_nothing)
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        snapshot.restore()


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None


def reason(error: BaseException) -> str:
    """The first lines of what was said first, without full stop."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".") or type(error).__name__

"""A fresh draw of tensors by the reset methods of their own modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def redraw(model: nn.Module, targets: Mapping[str, Tensor], generator: torch.Generator) -> list[str]:
    """Give tensors the values that their modules' own resets draw; returns the names of those without a reset.

    Args:
        model: The network.
        targets: Parameters and buffers of it, by full name.
        generator: Source of randomness; one number is drawn from it.
    """
    waiting = {id(tensor): name for name, tensor in targets.items()}
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with _seeded(model, seed), torch.no_grad():
        for module in model.modules():
            own = {name: id(tensor) for name, tensor in _own_tensors(module).items() if id(tensor) in waiting}
            if own and (reset := _reset_of(module)) is not None:
                _redraw(module, reset, set(own))
                for done in own.values():
                    waiting.pop(done, None)
    return list(waiting.values())


def _reset_of(module: nn.Module) -> Callable[[], object] | None:
    """How a module draws its own tensors; torch's attention has the method under a private name."""
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(reset := getattr(module, name, None)):
            found: Callable[[], object] = reset
            return found
    return None


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _redraw(module: nn.Module, reset: Callable[[], object], names: set[str]) -> None:
    """Call ``reset`` and keep its effect on the named tensors of ``module`` only."""
    before = {name: (tensor, tensor.clone()) for name, tensor in _own_tensors(module).items()}
    others = [
        (tensor, tensor.clone())
        for child in module.modules()
        if child is not module
        for tensor in _own_tensors(child).values()
    ]
    reset()
    after = _own_tensors(module)
    for name, (tensor, value) in before.items():
        tensor.copy_(after[name] if name in names else value)
        if after[name] is not tensor:
            setattr(module, name, tensor)
    for tensor, value in others:
        tensor.copy_(value)


@contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Draw from a fixed seed on every device of the model, and put the random states back afterwards."""
    devices = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield

"""Programs: ways of running the user's network that leave no trace behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Program:
    """One way of running the user's network, on fixed real data, that leaves no trace.

    Args:
        name: How to speak of it in messages, for example ``"training_step (train mode)"``.
        run: Runs it once with the network's present weights. Returns a (nested) collection of the tensors that the
            network hands to the outside; these keep their shape whatever is pruned.
        training: Whether the network runs in train mode.
    """

    name: str
    run: Callable[[], Any]
    training: bool = False


@contextmanager
def preserved(model: nn.Module, training: bool) -> Iterator[None]:
    """Run ``model`` in the given mode and put modes, buffers, gradients and random state back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = sorted({t.device.index or 0 for t in [*model.parameters(), *model.buffers()] if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            for parameter, _ in gradients:
                parameter.grad = None
            model.train(training)
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode


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
            with preserved(model, training), torch.no_grad():
                return model(*arguments, **keywords)

        return run

    return [Program(f"forward ({'train' if t else 'evaluation'} mode)", runner(t), t) for t in (False, True)]

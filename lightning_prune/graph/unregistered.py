"""Tensors that modules hold without having registered them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_REGISTRIES = frozenset(vars(nn.Module()))
"""Where a module keeps what it has registered."""


def loose_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that modules hold without having registered them, as attributes or in containers: caches, mostly."""
    registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name in unregistered(module):
            for place, tensor in placed_tensors(name, vars(module)[name]):
                if id(tensor) not in registered and tensor.grad_fn is None:
                    registered.add(id(tensor))
                    found[f"{path}.{place}" if path else place] = tensor
    return found


def unregistered(module: nn.Module) -> list[str]:
    """Names of the attributes that are not how a module keeps what it has registered."""
    return [name for name in vars(module) if name not in _REGISTRIES or not name.startswith("_")]


def placed_tensors(place: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested dicts, lists and tuples, each with how to get there."""
    if isinstance(value, Tensor):
        yield place, value
    elif type(value) is dict:
        for key, item in value.items():
            yield from placed_tensors(f"{place}[{key!r}]", item)
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            yield from placed_tensors(f"{place}[{number}]", item)

"""What a module holds in its attributes, and how to put it back."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.graph.program import MAPPINGS, SEQUENCES

_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


class Snapshot:
    """Everything a module and its children hold in plain attributes, to be put back with :meth:`restore`.

    Parameters, buffers, metric states, counters, and what a module collects in lists, dicts, sets and deques, however
    nested, all live in ``__dict__``. Containers and modules get their contents back in place, so that whoever else
    refers to them is served too. Tensors get their values back if they are attributes or values of a dict; tensors in
    lists and sets are taken to be replaced rather than written to. Objects of other classes are not looked into.

    Args:
        model: Any module.

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> layer.seen = []
        >>> before = Snapshot(layer)
        >>> layer.seen.append(layer(torch.tensor([[0.0], [2.0]])))
        >>> layer.seen.clear() or layer.seen.append("something else")
        >>> layer.running_mean
        tensor([0.1000])
        >>> before.restore()
        >>> layer.seen, layer.running_mean
        ([], tensor([0.]))
    """

    def __init__(self, model: nn.Module) -> None:
        self._restorers: list[Callable[[], object]] = []
        self._seen: dict[int, object] = {}
        pending: list[object] = [model]
        while pending:
            value = pending.pop()
            if id(value) not in self._seen:
                self._seen[id(value)] = value  # the reference keeps the id from being used again
                pending.extend(self._take(value))

    def restore(self) -> None:
        """Put everything back."""
        for restorer in self._restorers:
            restorer()

    def _take(self, value: Any) -> Iterable[object]:
        """Remember one value and return what it contains."""
        if isinstance(value, nn.Module):
            return (vars(value),)
        if type(value) in MAPPINGS:
            self._restorers.append(_mapping_restorer(value))
            return list(value.values())
        if type(value) in SEQUENCES:
            self._restorers.append(_sequence_restorer(value))
            return [item for item in value if not isinstance(item, Tensor)]
        if type(value) is set:
            self._restorers.append(_set_restorer(value))
        elif isinstance(value, _GENERATORS):
            self._restorers.append(_generator_restorer(value))
        elif isinstance(value, Tensor) and _has_plain_values(value):
            self._restorers.append(_tensor_restorer(value))
        return ()


def _has_plain_values(tensor: Tensor) -> bool:
    return not (is_lazy(tensor) or tensor.is_inference() or tensor.is_meta) and tensor.layout is torch.strided


def _mapping_restorer(mapping: dict[Any, Any]) -> Callable[[], None]:
    items = list(mapping.items())

    def restore() -> None:
        if not _same(mapping.keys(), [key for key, _ in items]) or not _same(mapping.values(), [v for _, v in items]):
            mapping.clear()
            mapping.update(items)

    return restore


def _sequence_restorer(sequence: list[Any] | deque[Any]) -> Callable[[], None]:
    items = list(sequence)

    def restore() -> None:
        if not _same(sequence, items):
            sequence.clear()
            sequence.extend(items)

    return restore


def _set_restorer(values: set[Any]) -> Callable[[], None]:
    items = list(values)

    def restore() -> None:
        values.clear()
        values.update(items)

    return restore


def _tensor_restorer(tensor: Tensor) -> Callable[[], None]:
    value = tensor.detach().clone()

    def restore() -> None:
        if not torch.equal(tensor, value):
            # Through .data, so that a graph that has saved this tensor does not take it for modified.
            tensor.data.copy_(value)

    return restore


def _generator_restorer(generator: Any) -> Callable[[], object]:
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bit_state = bits.state
        return lambda: setattr(bits, "state", bit_state)
    if isinstance(generator, random.Random):
        python_state = generator.getstate()
        return lambda: generator.setstate(python_state)
    state = generator.get_state()
    return lambda: generator.set_state(state)


def _same(present: Iterable[object], before: list[Any]) -> bool:
    values = list(present)
    return len(values) == len(before) and all(a is b for a, b in zip(values, before, strict=True))

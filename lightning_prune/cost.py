"""What a network costs: predicted from a channel graph, or measured on the real thing."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lightning_prune.errors import PruneError
from lightning_prune.graph.channels import ChannelGraph, Extent, Operation


class CostModel:
    """Predicts what a network would cost if its channel groups had other widths, without building it.

    Args:
        graph: Channel graph of the network.
        parameters: Names of the tensors of the graph that count as parameters; the others are buffers.

    Raises:
        PruneError: If the graph lacks one of the parameters, or holds an operator whose cost is unknown.

    Example:
        >>> rows = (Extent(0, (("fc", 1),)), Extent(3))
        >>> model = CostModel(ChannelGraph(groups={}, tensors={"fc.weight": rows}), ["fc.weight"])
        >>> model.parameters({"fc": 5})
        15
    """

    def __init__(self, graph: ChannelGraph, parameters: Collection[str]) -> None:
        missing = sorted(set(parameters) - set(graph.tensors))
        if missing:
            raise PruneError(
                f"the channel graph knows no size for {', '.join(missing)}. Was it traced from this network?"
            )
        self._shapes = [graph.tensors[name] for name in parameters]
        self._operations = [_flops_of(operation) for operation in graph.operations]
        self._batch_size = graph.batch_size

    def channels(self, widths: Mapping[str, int]) -> int:
        """Number of units over all groups."""
        return sum(widths.values())

    def parameters(self, widths: Mapping[str, int]) -> int:
        """Number of parameters when the groups have the given widths."""
        return sum(prod(extent.size(widths) for extent in shape) for shape in self._shapes)

    def macs(self, widths: Mapping[str, int]) -> float:
        """Multiply-accumulates per sample of the run whose cost is counted, when the groups have the given widths."""
        return sum(flops(widths) for flops in self._operations) / 2 / self._batch_size


def _flops_of(operation: Operation) -> Callable[[Mapping[str, int]], int]:
    """A function from group widths to the floating-point operations of one operator."""
    registered: Any = flop_registry.get(operation.function)
    # What is registered walks through all arguments to turn tensors into sizes, which would take most of the time of an
    # evaluation. The formula inside takes sizes.
    formula: Any = getattr(registered, "__wrapped__", None)
    if formula is None:
        raise PruneError(f"no cost formula on sizes for {operation.function} in torch.utils.flop_counter.")

    def flops(widths: Mapping[str, int]) -> int:
        arguments = [_sized(argument, widths) for argument in operation.arguments]
        return int(formula(*arguments, out_shape=_sized(operation.result, widths)))

    return flops


def _sized(argument: object, widths: Mapping[str, int]) -> object:
    """The argument with a tensor's extents turned into its size; anything else unchanged."""
    if isinstance(argument, tuple) and argument and isinstance(argument[0], Extent):
        return torch.Size([extent.size(widths) for extent in argument])
    return argument


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of a module; a shared parameter counts once.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(run: Callable[[], object], batch_size: int) -> float:
    """Multiply-accumulates per sample of what ``run`` does, counted by ``torch.utils.flop_counter``.

    Args:
        run: Runs the network once, on a batch.
        batch_size: Number of samples in that batch.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> count_macs(lambda: layer(torch.zeros(4, 3)), batch_size=4)
        6.0
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops()) / 2 / batch_size


def measure_latency(run: Callable[[], object], repeats: int = 30, warmup: int = 5, limit: float = 5.0) -> float:
    """Median wall-clock seconds of one call of ``run``, waiting for the accelerator if there is one.

    Args:
        run: Runs the network once.
        repeats: Number of timed calls.
        warmup: Number of calls before, which are not timed.
        limit: Seconds after which no more calls are made; there are two at least, one of them timed.

    Example:
        >>> measure_latency(lambda: time.sleep(0.002), repeats=3, warmup=0) >= 0.002
        True
    """
    end = time.perf_counter() + limit
    for number in range(warmup):
        if number == 0 or time.perf_counter() < end:
            run()
    times = [_seconds(run)]
    while len(times) < repeats and time.perf_counter() < end:
        times.append(_seconds(run))
    return statistics.median(times)


def _seconds(run: Callable[[], object]) -> float:
    _synchronise()
    start = time.perf_counter()
    run()
    _synchronise()
    return time.perf_counter() - start


def _synchronise() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def checkpoint_bytes(state_dict: Mapping[str, Tensor]) -> int:
    """Size in bytes of a state dict as ``torch.save`` writes it.

    Example:
        >>> checkpoint_bytes({"weight": torch.zeros(1000)}) > 4000
        True
    """
    buffer = io.BytesIO()
    torch.save(dict(state_dict), buffer)
    return buffer.tell()

"""The flow through a network made positive, on an input of ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_prune.graph.program import map_nested, tensors_in


class _Reached(BaseException):
    """The output that was wanted is there; no ``except Exception`` of the user's code holds this up."""


class _Step(nn.Module):
    """Anything that runs a network, as a module around it."""

    def __init__(self, network: nn.Module, run: Callable[[], object]) -> None:
        super().__init__()
        self.network = network
        self._run = run

    def forward(self) -> None:
        self._run()


def synaptic_flow(
    network: nn.Module, run: Callable[[], object], parts: Sequence[nn.Module], whole: bool, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Derivatives of the summed outputs with respect to the absolute values of the parameters.

    The network's own tensors are not touched: others stand in for them while it runs.

    Args:
        network: Any module, in evaluation mode.
        run: Calls the network or parts of it on anything; inputs that depend on no parameter are replaced by ones.
        parts: Those parts.
        whole: Whether the outputs are those of the network, as soon as it is called. They are those of the parts
            otherwise, and if it is not; outputs that another part reads on do not count.
        dtype: Precision to do that in; None for that of the parameters.

    Returns:
        By full name; nothing for parameters that have no part in the outputs.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[-5.0, 6.0]]))
        >>> flow = synaptic_flow(net, lambda: net(torch.zeros(1, 2)), [*net], True, torch.float64)
        >>> flow["0.weight"].tolist(), flow["1.weight"].tolist()
        ([[5.0, 5.0], [6.0, 6.0]], [[3.0, 7.0]])
    """
    named = [*network.named_parameters(), *network.named_buffers()]
    positive = {name: _positive(tensor, dtype) for name, tensor in named if tensor.is_floating_point()}
    leaves = {name: positive[name].requires_grad_() for name, p in network.named_parameters() if name in positive}
    outputs: list[Tensor] = []
    with torch.enable_grad(), _fed_with_ones(network, parts, whole, dtype, outputs), suppress(_Reached):
        functional_call(_Step(network, run), {f"network.{name}": t for name, t in positive.items()}, ())
    total = _sum([tensor for tensor in outputs if tensor.requires_grad])
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True) if total.requires_grad else ()
    return {name: flow for name, flow in zip(leaves, found, strict=False) if flow is not None}


def _positive(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to(dtype or tensor.dtype).abs()


@contextmanager
def _fed_with_ones(
    network: nn.Module, parts: Sequence[nn.Module], whole: bool, dtype: torch.dtype | None, outputs: list[Tensor]
) -> Iterator[None]:
    def feed(_part: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return map_nested(one, args), map_nested(one, kwargs)

    def feed_whole(_network: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if whole:  # then what the parts get is up to the network
            handles.close()
        return feed(_network, args, kwargs)

    def one(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
            return torch.ones_like(value, dtype=dtype)
        return value

    def take(_part: nn.Module, _args: Any, output: Any) -> None:
        outputs.extend(tensor for tensor in tensors_in(output) if tensor.is_floating_point())

    def take_and_leave(_network: nn.Module, _args: Any, output: Any) -> None:
        outputs.clear()
        take(_network, _args, output)
        raise _Reached

    with ExitStack() as stack, ExitStack() as handles:
        stack.callback(network.register_forward_pre_hook(feed_whole, with_kwargs=True).remove)
        if whole:
            stack.callback(network.register_forward_hook(take_and_leave).remove)
        for part in parts:
            handles.callback(part.register_forward_pre_hook(feed, with_kwargs=True).remove)
            handles.callback(part.register_forward_hook(take).remove)
        yield


def _sum(outputs: Sequence[Tensor]) -> Tensor:
    """Sum of all outputs that no other one depends on: the derivative of the sum of all by them is one."""
    distinct = list({id(output): output for output in outputs}.values())
    total = sum((output.sum() for output in distinct), start=torch.zeros(()))
    if len(distinct) < 2:
        return total
    slopes = torch.autograd.grad(total, distinct, retain_graph=True)
    last = [output.sum() for output, slope in zip(distinct, slopes, strict=True) if bool((slope == 1).all())]
    return sum(last, start=torch.zeros(()))

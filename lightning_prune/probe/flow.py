"""The flow through a network made positive, on an input of ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
    network: nn.Module, run: Callable[[], object], parts: Sequence[nn.Module], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Derivatives of the summed outputs with respect to the absolute values of the parameters.

    The network's own tensors are not touched: others stand in for them while it runs.

    Args:
        network: Any module, in evaluation mode.
        run: Runs it on anything; inputs of the parts that depend on no parameter are replaced by ones.
        parts: The network itself, which is left as soon as its outputs are there, or parts of it that ``run`` calls;
            outputs of those that another part reads on do not count.
        dtype: Precision to do that in; None for that of the parameters.

    Returns:
        By full name; nothing for parameters that have no part in the outputs.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[-5.0, 6.0]]))
        >>> flow = synaptic_flow(net, lambda: net(torch.zeros(1, 2)), [net], torch.float64)
        >>> flow["0.weight"].tolist(), flow["1.weight"].tolist()
        ([[5.0, 5.0], [6.0, 6.0]], [[3.0, 7.0]])
    """
    named = [*network.named_parameters(), *network.named_buffers()]
    positive = {name: _positive(tensor, dtype) for name, tensor in named if tensor.is_floating_point()}
    leaves = {name: positive[name].requires_grad_() for name, p in network.named_parameters() if name in positive}
    outputs: list[Tensor] = []
    with torch.enable_grad(), _fed_with_ones(network, parts, dtype, outputs):
        with suppress(_Reached):
            functional_call(_Step(network, run), {f"network.{name}": t for name, t in positive.items()}, ())
        total = _sum([tensor for tensor in outputs if tensor.requires_grad])
        if not total.requires_grad:
            return {}
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: flow for name, flow in zip(leaves, found, strict=True) if flow is not None}


def _positive(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to(dtype or tensor.dtype).abs()


@contextmanager
def _fed_with_ones(
    network: nn.Module, parts: Sequence[nn.Module], dtype: torch.dtype | None, outputs: list[Tensor]
) -> Iterator[None]:
    def feed(_part: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return map_nested(one, args), map_nested(one, kwargs)

    def one(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
            return torch.ones_like(value, dtype=dtype)
        return value

    def take(part: nn.Module, _args: Any, output: Any) -> None:
        outputs.extend(tensor for tensor in tensors_in(output) if tensor.is_floating_point())
        if part is network:
            raise _Reached

    handles = [part.register_forward_pre_hook(feed, with_kwargs=True) for part in parts]
    handles += [part.register_forward_hook(take) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sum(outputs: Sequence[Tensor]) -> Tensor:
    """Sum of all outputs that no other one depends on: the derivative of the sum of all by them is one."""
    distinct = list({id(output): output for output in outputs}.values())
    total = sum((output.sum() for output in distinct), start=torch.zeros(()))
    if len(distinct) < 2:
        return total
    slopes = torch.autograd.grad(total, distinct, retain_graph=True)
    last = [output.sum() for output, slope in zip(distinct, slopes, strict=True) if bool((slope == 1).all())]
    return sum(last, start=torch.zeros(()))

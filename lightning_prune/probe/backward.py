"""What becomes of the backward passes that the user's training step runs itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_prune.errors import PruneError

_BACKWARD = (torch.Tensor.backward, torch.autograd.backward)
_REQUIRING = (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]


class NoBackward(TorchFunctionMode):
    """Leaves out every backward pass, so that a step written for training runs without gradients too.

    Code that looks at gradients after that finds zeros, in the given parameters and in tensors that were made to
    require them inside. ``torch.autograd.grad`` of what has no graph gives zeros as well.

    Args:
        losses: Where to put the tensors that were to be differentiated.
        parameters: Those of the network.

    Example:
        >>> losses = []
        >>> with torch.no_grad(), NoBackward(losses):
        ...     torch.ones(()).backward()
        >>> losses
        [tensor(1.)]
    """

    def __init__(self, losses: list[Tensor], parameters: Iterable[nn.Parameter] = ()) -> None:
        super().__init__()
        self._losses = losses
        self._leaves: list[Tensor] = list(parameters)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` unless it differentiates."""
        if func in _BACKWARD:
            self._losses.extend(_tensors(args[0]))
            for leaf in self._leaves:
                if leaf.requires_grad and leaf.grad is None:
                    leaf.grad = torch.zeros_like(leaf)
            return None
        if func is torch.autograd.grad and not any(tensor.requires_grad for tensor in _tensors(args[0])):
            return tuple(torch.zeros_like(tensor) for tensor in _tensors(args[1]))
        result = func(*args, **(kwargs or {}))
        if func in _REQUIRING:
            self._leaves.append(args[0])
        elif kwargs and kwargs.get("requires_grad") is True and isinstance(result, Tensor):
            self._leaves.append(result)
        return result


class LocalBackward(TorchFunctionMode):
    """Has every backward pass fill ``.grad`` of the given parameters without any node of theirs being run.

    The reducer of DistributedDataParallel hangs on these nodes. It notes each gradient that passes even between its own
    backward passes, and then waits for ones that never come (``find_unused_parameters``) or come only once
    (``static_graph``).

    Args:
        parameters: Those that get a gradient; other leaves get none.

    Example:
        >>> weight = nn.Parameter(torch.tensor(3.0))
        >>> with LocalBackward([weight]):
        ...     (weight * 2).backward()
        >>> weight.grad
        tensor(2.)
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._parameters = list(parameters)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, or put what it would add to ``.grad`` there."""
        if func in _BACKWARD:
            return self._accumulate(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _accumulate(
        self,
        outputs: Tensor | Sequence[Tensor],
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        grad_tensors: Tensor | Sequence[Tensor] | None = None,
        inputs: Tensor | Sequence[Tensor] | None = None,
    ) -> None:
        """Take the arguments of ``Tensor.backward`` and of ``torch.autograd.backward``."""
        given = gradient if grad_tensors is None else grad_tensors
        chosen = None if inputs is None else {id(tensor) for tensor in _tensors(inputs)}
        leaves = [p for p in self._parameters if p.requires_grad and (chosen is None or id(p) in chosen)]
        seeds = None if given is None else _tensors(given)
        gradients = self._derivatives(_tensors(outputs), leaves, seeds, retain_graph, create_graph)
        for leaf, new in zip(leaves, gradients, strict=True):
            if new is not None:
                leaf.grad = new.clone() if leaf.grad is None else leaf.grad + new

    def _derivatives(
        self,
        outputs: tuple[Tensor, ...],
        leaves: list[nn.Parameter],
        seeds: tuple[Tensor, ...] | None,
        retain_graph: bool | None,
        create_graph: bool,
    ) -> Sequence[Tensor | None]:
        return torch.autograd.grad(outputs, leaves, seeds, retain_graph, create_graph, allow_unused=True)


class HessianBackward(LocalBackward):
    """Has every backward pass fill ``.grad`` with the product of the second derivative and a vector.

    Args:
        vectors: The vector, by parameter.

    Example:
        >>> weight = nn.Parameter(torch.tensor(3.0))
        >>> with HessianBackward({weight: torch.tensor(0.5)}):
        ...     (weight**3).backward()
        >>> weight.grad
        tensor(9.)
    """

    def __init__(self, vectors: Mapping[nn.Parameter, Tensor]) -> None:
        super().__init__(vectors)
        self._vectors = vectors

    def _derivatives(
        self,
        outputs: tuple[Tensor, ...],
        leaves: list[nn.Parameter],
        seeds: tuple[Tensor, ...] | None,
        retain_graph: bool | None,
        create_graph: bool,
    ) -> Sequence[Tensor | None]:
        try:
            gradients = super()._derivatives(outputs, leaves, seeds, True, True)
            along = [(g * self._vectors[p]).sum() for p, g in zip(leaves, gradients, strict=True) if g is not None]
            slope = sum(along, start=torch.zeros(()))
            if not slope.requires_grad:  # of a loss that is linear in all parameters
                return [torch.zeros_like(parameter) for parameter in leaves]
            if any(node.name() == "torch::autograd::Error" for node in _graph(slope)):  # which is passed over otherwise
                raise RuntimeError("one of its functions is marked as once_differentiable")
            return torch.autograd.grad(slope, leaves, retain_graph=retain_graph, allow_unused=True)
        except RuntimeError as error:
            raise PruneError(
                f"the loss cannot be differentiated twice: {error}. Have the network use functions that have a second "
                'derivative, or choose a criterion that needs only the first, such as "snip".'
            ) from error


def _tensors(values: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (values,) if isinstance(values, Tensor) else tuple(values)


def _graph(tensor: Tensor) -> Iterator[Any]:
    """All nodes of the graph that a tensor hangs on."""
    seen: set[Any] = set()
    pending: list[Any] = [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending.extend(successor for successor, _ in node.next_functions)

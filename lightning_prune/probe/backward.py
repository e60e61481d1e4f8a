"""What becomes of the backward passes that the user's training step runs itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_BACKWARD = (torch.Tensor.backward, torch.autograd.backward)


class NoBackward(TorchFunctionMode):
    """Leaves out every backward pass, so that a step written for training runs without gradients too.

    ``torch.autograd.grad`` of what has no graph gives zeros.

    Args:
        losses: Where to put the tensors that were to be differentiated.

    Example:
        >>> losses = []
        >>> with torch.no_grad(), NoBackward(losses):
        ...     torch.ones(()).backward()
        >>> losses
        [tensor(1.)]
    """

    def __init__(self, losses: list[Tensor]) -> None:
        super().__init__()
        self._losses = losses

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` unless it differentiates."""
        if func in _BACKWARD:
            self._losses.extend(_tensors(args[0]))
            return None
        if func is torch.autograd.grad and not any(tensor.requires_grad for tensor in _tensors(args[0])):
            return tuple(torch.zeros_like(tensor) for tensor in _tensors(args[1]))
        return func(*args, **(kwargs or {}))


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
        gradients = torch.autograd.grad(
            _tensors(outputs),
            leaves,
            None if given is None else _tensors(given),
            retain_graph,
            create_graph,
            allow_unused=True,
        )
        for leaf, new in zip(leaves, gradients, strict=True):
            if new is not None:
                leaf.grad = new.clone() if leaf.grad is None else leaf.grad + new


def _tensors(values: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (values,) if isinstance(values, Tensor) else tuple(values)

"""SGD that makes the gradients of different tensors comparable."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_SMALLEST = 1e-30


class NormalisedSGD(Optimizer):
    """SGD with momentum on gradients divided by the running root mean square of the entries of their tensor.

    All entries of a tensor share one second moment, as in NovoGrad (Ginsburg et al., 2019), so that within a tensor the
    gradient keeps its direction, and no tensor is faster than the others because its gradients are larger. Unlike
    there, the mean over the entries is taken and not their sum, and its running mean starts from zero, corrected.

    Args:
        params: What to move.
        lr: Learning rate.
        momentum: Share of the last step that is taken again.
        beta: Share of the mean square that is kept in each step.
        weight_decay: Coefficient of an L2 penalty, added to the normalised gradient.

    Example:
        >>> x, y = torch.zeros(2), torch.zeros(2)
        >>> x.grad, y.grad = torch.tensor([3.0, -3.0]), torch.tensor([0.01, -0.01])
        >>> NormalisedSGD([x, y], lr=0.5).step()
        >>> x.tolist(), y.tolist()
        ([-0.5, 0.5], [-0.5, 0.5])
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-2,
        momentum: float = 0.9,
        beta: float = 0.98,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "beta": beta, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, beta = self.state[parameter], group["beta"]
        if not state:
            state.update(step=0, mean_square=gradient.new_zeros(()), momentum_buffer=torch.zeros_like(parameter))
        state["step"] += 1
        state["mean_square"].lerp_(gradient.square().mean(), 1 - beta)
        size = (state["mean_square"] / (1 - beta ** state["step"])).sqrt().clamp_min(_SMALLEST)
        state["momentum_buffer"].mul_(group["momentum"]).add_(gradient / size)
        state["momentum_buffer"].add_(parameter, alpha=group["weight_decay"])
        parameter.sub_(state["momentum_buffer"], alpha=group["lr"])

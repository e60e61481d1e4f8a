"""The Lion optimizer, which torch does not have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion(Optimizer):
    """Steps of equal size in the direction of the sign of a momentum (Chen et al., 2023).

    Args:
        params: What to move.
        lr: Size of a step.
        betas: How much of the momentum goes into a step, and how much of it is kept afterwards.
        weight_decay: Decoupled weight decay.

    Example:
        >>> x = torch.zeros(2)
        >>> x.grad = torch.tensor([3.0, -0.1])
        >>> Lion([x], lr=0.5).step()
        >>> x.tolist()
        [-0.5, 0.5]
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            into, keep = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                momentum = state.setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(momentum.lerp(parameter.grad, 1 - into).sign(), alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - keep)
        return loss

"""What the weights are multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_FIRST_FACTOR: dict[Any, int] = {
    _aten.mm.default: 0,
    _aten.bmm.default: 0,
    _aten.mv.default: 0,
    _aten.addmm.default: 1,
    _aten.baddbmm.default: 1,
    _aten.addmv.default: 1,
}
_COPIES = {_aten._to_copy.default, _aten.clone.default}


class InputSquares(TorchDispatchMode):
    """Adds up, for every weight, the squares of all numbers that it is multiplied with.

    It looks at matrix products and convolutions of the weights themselves, of views of them and of copies in another
    precision, whichever module or function runs them.

    Args:
        weights: The weights to look for, by full name.

    Example:
        >>> weight = torch.ones(2, 2)
        >>> with torch.no_grad(), InputSquares({"weight": weight}) as seen:
        ...     _ = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) @ weight.t()
        >>> seen.squares()
        {'weight': tensor([[10., 20.],
                [10., 20.]])}
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = {name: weight.detach() for name, weight in weights.items() if weight.numel()}
        # One number for each element of the memory behind a weight, which is how views are told what they are of.
        self._totals = {_memory(weight): _zeros_behind(weight) for weight in self._weights.values()}
        self._found: set[int] = set()
        self._copies: dict[int, tuple[Tensor, int]] = {}

    def squares(self) -> dict[str, Tensor]:
        """The sums so far, of the weights' shapes; nothing for a weight that was no factor of anything."""
        return {
            name: _like(self._totals[_memory(weight)], weight).clone()
            for name, weight in self._weights.items()
            if _memory(weight) in self._found
        }

    def is_made_up(self, tensor: Tensor) -> bool:
        """Never: the network runs on real numbers."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``, and look at what it multiplies."""
        result = func(*args, **(kwargs or {}))
        if func in _FIRST_FACTOR:
            left, right = args[_FIRST_FACTOR[func] :][:2]
            columns = right if right.dim() > 1 else right.unsqueeze(-1)
            self._add(left, lambda: _precise(columns).square().sum(-1).unsqueeze(-2))
            self._add(right, lambda: _precise(left).square().sum(-2).unsqueeze(-1))
        elif func is _aten.convolution.default:
            self._add(args[1], lambda: _patches(result, *args))
        elif func in _COPIES:
            self._follow(args[0], result)
        return result

    def _add(self, factor: Tensor, squares: Callable[[], Tensor]) -> None:
        key = self._memory_of_weight(factor)
        if key is None:
            return
        self._found.add(key)
        new = squares().expand(factor.shape)
        for dim, stride in enumerate(factor.stride()):
            if stride == 0:  # the same weights over and over
                new, factor = new.sum(dim, keepdim=True), factor.narrow(dim, 0, 1)
        _like(self._totals[key], factor).add_(new)

    def _follow(self, source: Tensor, copy: Tensor) -> None:
        key = self._memory_of_weight(source)
        if key is not None and (source.stride(), source.storage_offset()) == (copy.stride(), copy.storage_offset()):
            self._copies[_memory(copy)] = copy, key  # with the copy held on to, its memory is not used again

    def _memory_of_weight(self, tensor: Tensor) -> int | None:
        """Where the weight lies that the tensor is a view or copy of, if it is one."""
        key = _memory(tensor)
        key = self._copies[key][1] if key in self._copies else key
        return key if key in self._totals else None


def _patches(result: Tensor, images: Tensor, weight: Tensor, _bias: Any, *settings: Any) -> Tensor:
    """Sum over all squares that each weight of a convolution meets.

    A convolution is linear in its weight, so with squared images that is the derivative of the sum of its outputs.
    """
    squared = _precise(images).square()
    ones = torch.ones_like(result, dtype=squared.dtype)
    backward = _aten.convolution_backward.default
    derivative: Tensor = backward(ones, squared, weight.to(squared.dtype), None, *settings, [False, True, False])[1]
    return derivative


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _zeros_behind(weight: Tensor) -> Tensor:
    count = weight.untyped_storage().nbytes() // weight.element_size()
    return torch.zeros(count, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)


def _like(total: Tensor, view: Tensor) -> Tensor:
    return total.as_strided(view.shape, view.stride(), view.storage_offset())

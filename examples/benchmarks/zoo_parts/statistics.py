"""What a masked network must do differently to equal one whose normalised or attended width was cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_SIGNATURES = {
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}


def _named(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", "")


class KeptStatistics(TorchFunctionMode):
    """Inside, norms over channels, and standardised weights, take their statistics over what is kept only.

    Args:
        kept: Bool mask of the kept entries by ``id`` of the parameter. A norm over channels whose weight is not a
            parameter counts channels as removed that are zero throughout.

    Attributes:
        changed: Number of norm calls that had removed channels.
    """

    def __init__(self, kept: dict[int, Tensor]):
        super().__init__()
        self.kept = kept
        self.changed = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _named(func)
        if name == "mean":
            return self._mean(func, args, kwargs)
        if name not in _SIGNATURES:
            return func(*args, **kwargs)
        given = {**dict(zip(_SIGNATURES[name], args, strict=False)), **kwargs}
        x, weight, bias, eps = given["input"], given.get("weight"), given.get("bias"), given.get("eps")
        groups = given["num_groups"] if name == "group_norm" else None
        if name == "batch_norm":
            kept = self._of_parameter(x) if given.get("running_mean") is None else None
        else:
            kept = self._mask(x, weight, x.shape[1:2] if groups else torch.Size(given["normalized_shape"]), groups)
        if kept is None or bool(kept.all()):
            return func(*args, **kwargs)
        self.changed += 1
        eps = (torch.finfo(x.dtype).eps if name == "rms_norm" else 1e-5) if eps is None else eps
        if name == "batch_norm":
            y = _standardised(x, kept, eps)
            weight, bias = (None if v is None else v.view(1, -1, *(1,) * (x.dim() - 2)) for v in (weight, bias))
        elif groups:
            y = _normalised(x.unflatten(1, (groups, -1)), kept.view(groups, -1), x.dim(), eps).flatten(1, 2)
            channels = (1, -1) + (1,) * (x.dim() - 2)
            weight, bias = (None if v is None else v.view(channels) for v in (weight, bias))
        else:
            y = _over_last(x, kept, eps, centred=name == "layer_norm")
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def _mean(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A mean over the last dimension that is kept with size 1, as in norms that are written by hand."""
        given = {**dict(zip(("input", "dim", "keepdim"), args, strict=False)), **kwargs}
        x, dim = given["input"], given.get("dim")
        last = dim in (-1, x.dim() - 1, (-1,), [-1]) and given.get("keepdim") and x.is_floating_point()
        kept = self._mask(x, None, x.shape[-1:], None) if last else None
        if kept is None or bool(kept.all()):
            return func(*args, **kwargs)
        self.changed += 1
        return x.sum(-1, keepdim=True) / kept.sum()

    def _of_parameter(self, x: Tensor) -> Tensor | None:
        """Which entries of a parameter, or of a view of one, are kept."""
        kept = self.kept.get(id(x if x._base is None else x._base))
        return None if kept is None else kept.view(x.shape)

    def _mask(self, x: Tensor, weight: Tensor | None, shape: torch.Size, groups: int | None) -> Tensor | None:
        if isinstance(weight, torch.nn.Parameter):
            return self.kept.get(id(weight))
        others = [d for d in range(x.dim()) if (d != 1 if groups else d < x.dim() - len(shape))]
        return (x.abs() > 1e-50).sum(others).bool() if others else None


def _standardised(x: Tensor, kept: Tensor, eps: float) -> Tensor:
    """Batch norm of ``[batch, channels, ...]`` over the kept entries of each channel; the others stay zero."""
    dims = tuple(d for d in range(x.dim()) if d != 1)
    count = kept.sum(dims, keepdim=True).clamp(min=1)
    x = (x - (x * kept).sum(dims, keepdim=True) / count) * kept
    return x / ((x * x).sum(dims, keepdim=True) / count + eps).sqrt()


def _over_last(x: Tensor, kept: Tensor, eps: float, centred: bool) -> Tensor:
    dims = tuple(range(-kept.dim(), 0))
    mask = kept.to(x.dtype)
    count = mask.sum()
    if centred:
        x = x - (x * mask).sum(dims, keepdim=True) / count
    return x / (((x * x) * mask).sum(dims, keepdim=True) / count + eps).sqrt()


def _normalised(x: Tensor, kept: Tensor, full_dim: int, eps: float) -> Tensor:
    """Group norm of ``[batch, groups, channels, ...]`` over the kept channels of each group."""
    dims = tuple(range(2, x.dim()))
    mask = kept.view(1, *kept.shape, *(1,) * (full_dim - 2)).to(x.dtype).expand_as(x)
    count = mask.sum(dims, keepdim=True).clamp(min=1)
    x = x - (x * mask).sum(dims, keepdim=True) / count
    return x / ((x * x * mask).sum(dims, keepdim=True) / count + eps).sqrt()


class RecordedScales(TorchFunctionMode):
    """Inside, the scale that each attention call uses is noted in ``scales``."""

    def __init__(self) -> None:
        super().__init__()
        self.scales: list[float] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            scale = kwargs.get("scale")
            self.scales.append(query.shape[-1] ** -0.5 if scale is None else scale)
        return func(*args, **kwargs)


class GivenScales(TorchFunctionMode):
    """Inside, the attention calls use the given scales, one after another."""

    def __init__(self, scales: list[float]):
        super().__init__()
        self.scales = iter(scales)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            kwargs = {**kwargs, "scale": next(self.scales, kwargs.get("scale"))}
        return func(*args, **kwargs)

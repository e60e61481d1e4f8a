"""The tensors to reinitialise, and checks that what is given for them fits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_prune.errors import PruneError


def not_frozen(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The named parameters and buffers without what is frozen.

    That is each parameter that takes no gradient, and each buffer of a module that has parameters of its own, none of
    which takes one.

    Args:
        model: The network.
        names: Full names.

    Example:
        >>> norms = nn.Sequential(nn.BatchNorm1d(2).requires_grad_(False), nn.BatchNorm1d(2, affine=False))
        >>> not_frozen(norms, ["0.weight", "0.running_mean", "1.running_mean"])
        ['1.running_mean']
    """
    frozen: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        own = dict(module.named_parameters(path, recurse=False, remove_duplicate=False))
        still = {name for name, parameter in own.items() if not parameter.requires_grad}
        frozen |= still
        if own and len(still) == len(own):
            frozen |= dict(module.named_buffers(path, recurse=False, remove_duplicate=False)).keys()
    return [name for name in names if name not in frozen]


def targets_of(model: nn.Module, names: Collection[str], kept: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The named parameters and buffers in the order of the model, each tensor once.

    Raises:
        PruneError: If the network has no tensor of one of the names, or a mask of one does not fit.

    Example:
        >>> list(targets_of(nn.Linear(2, 1), ["bias", "weight"], None))
        ['weight', 'bias']
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    present = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
    wanted = set(names)
    if unknown := sorted(wanted - set(present)):
        raise PruneError(f"cannot reinitialise {', '.join(unknown)}: the network has no tensor of that name.")
    first_names = {id(tensor): name for name, tensor in reversed(present.items()) if name in wanted}
    targets = {name: present[name] for name in present if first_names.get(id(present[name])) == name}
    for name, mask in (kept or {}).items():
        if name in targets and (mask.dtype != torch.bool or mask.shape != targets[name].shape):
            raise PruneError(
                f"cannot reinitialise {name}: the mask of its surviving entries must be bool of shape "
                f"{list(targets[name].shape)}, but is {mask.dtype} of shape {list(mask.shape)}."
            )
    return targets


def check_origin(
    method: str, wanted: Mapping[str, Tensor], origin: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor]:
    """The values before training, which must be there for all wanted tensors and have their present shapes.

    Raises:
        PruneError: If there are none, or some are missing or of another shape.
    """
    values = origin or {}
    if missing := [name for name in wanted if name not in values]:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise PruneError(
            f"{method} needs the values before training, and has none for {listed}. Pass as origin a copy of them made "
            f"before the first step, cut to the present shapes."
        )
    for name, tensor in wanted.items():
        if values[name].shape != tensor.shape:
            raise PruneError(
                f"cannot reinitialise {name} of shape {list(tensor.shape)}: its value before training has shape "
                f"{list(values[name].shape)}. Cut it as the network was cut."
            )
    return values


def zero_the_rest(targets: Mapping[str, Tensor], kept: Mapping[str, Tensor] | None) -> None:
    """Zero the entries that are not kept."""
    for name, mask in (kept or {}).items():
        if name in targets:
            targets[name].detach().masked_fill_(~mask.to(targets[name].device), 0)

"""Handing the part of removed channels over to those that stay, where what reads them can be proven to allow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_prune.graph.channels import Slot
from lightning_prune.surgery.mixing import Receiver
from lightning_prune.surgery.readers import Readers
from lightning_prune.surgery.regression import Regression, regress, scales

Before = Sequence[tuple[Mapping[str, Tensor], str, Tensor]]
"""Networks' tensors by full name, the name of one that was changed, and its former value."""


def kernels(weight: Tensor, slot: Slot, outputs: Sequence[int]) -> Tensor:
    """What each entry of each unit is multiplied with, ``[units, entries, outputs, rest]``.

    Args:
        weight: The tensor that reads the units.
        slot: Where it reads them.
        outputs: Its dimensions along which outputs are made.
    """
    units, entries = slot.index.shape
    chosen = weight.detach().index_select(slot.dim, slot.index.flatten().to(weight.device)).movedim(slot.dim, 0)
    # The dimension of the units has come to the front, so those before it have moved on by one.
    dims = [dim + 1 if dim < slot.dim else dim for dim in sorted(outputs)]
    chosen = chosen.movedim(dims, list(range(1, len(dims) + 1)))
    count = chosen.shape[1 : len(dims) + 1].numel()
    return chosen.reshape(units, entries, count, chosen[0].numel() // count)


def absorb(
    tensors: Mapping[str, Tensor],
    slot: Slot,
    outputs: Sequence[int],
    receiver: Receiver | None,
    reach: Tensor,
    gone: Tensor,
    stay: Tensor,
    regression: Regression,
) -> None:
    """Have the staying units do in one tensor what removed ones did there, as far as a regression can tell.

    The weights of the removed units are left for whoever switches them off.

    Args:
        tensors: Parameters and buffers by full name.
        slot: Where the tensor reads the units.
        outputs: Its dimensions along which outputs are made.
        receiver: What takes up the constant; None leaves it out.
        reach: What :func:`~lightning_prune.surgery.mixing.coverage` says of the tensor.
        gone: Removed units, a bool mask.
        stay: Staying units, a bool mask.
        regression: The removed units as a function of the staying ones.

    Example:
        >>> slot = Slot("head.weight", 1, torch.arange(2)[:, None], "consumer")
        >>> tensors = {"head.weight": torch.tensor([[1.0, 10.0]]), "head.bias": torch.zeros(1)}
        >>> gone, known = torch.tensor([False, True]), Regression(torch.full((1, 1, 1), 2.0), torch.full((1, 1), 3.0))
        >>> absorb(tensors, slot, [0], Receiver("head.bias", 1), torch.ones(()), gone, ~gone, known)
        >>> tensors["head.weight"], tensors["head.bias"]
        (tensor([[21., 10.]]), tensor([30.]))
    """
    weight = tensors[slot.tensor].detach()
    slopes, constants = (
        part.to(weight.device, torch.promote_types(weight.dtype, torch.float32)) for part in regression
    )
    gone, stay = gone.cpu(), stay.cpu()
    parts = weight.index_select(slot.dim, slot.positions(gone).to(weight.device)).movedim(slot.dim, 0)
    parts = parts.reshape(int(gone.sum()), slot.index.shape[1], *parts.shape[1:]).to(slopes)
    taken = torch.einsum("eps,pe...->se...", slopes, parts).flatten(0, 1).movedim(0, slot.dim)
    if receiver is not None:
        vector = tensors[receiver.tensor].detach()
        total = kernels(weight * reach, slot, outputs)[gone.to(weight.device)].sum(3).to(constants)
        vector += (receiver.sign * torch.einsum("peo,ep->o", total, constants)).to(vector)
    weight.index_add_(slot.dim, slot.positions(stay).to(weight.device), taken.to(weight.dtype))


def rescale(tensors: Mapping[str, Tensor], slot: Slot, stay: Tensor, factors: Tensor) -> None:
    """Multiply what a tensor makes of the staying units.

    Args:
        tensors: Parameters and buffers by full name.
        slot: Where the tensor reads the units.
        stay: Staying units, a bool mask.
        factors: A factor for each of them.

    Example:
        >>> slot = Slot("head.weight", 1, torch.arange(4).view(2, 2), "consumer")
        >>> tensors = {"head.weight": torch.ones(1, 4)}
        >>> rescale(tensors, slot, torch.tensor([False, True]), torch.tensor([3.0]))
        >>> tensors["head.weight"]
        tensor([[1., 1., 3., 3.]])
    """
    weight = tensors[slot.tensor].detach()
    positions = slot.positions(stay.cpu()).to(weight.device)
    values = factors.repeat_interleave(slot.index.shape[1]).to(weight)
    along = values.view([-1 if dim == slot.dim else 1 for dim in range(weight.dim())])
    weight.index_copy_(slot.dim, positions, weight.index_select(slot.dim, positions) * along)


def hand_over(
    copies: Sequence[Mapping[str, Tensor]],
    readers: Readers,
    keep: Mapping[str, Tensor],
    alive: Mapping[str, Tensor],
    ridge: float,
    how: Literal["scale", "regression"] = "regression",
) -> Before:
    """Have the units that stay take over from those that go, wherever that is proven to be possible.

    Args:
        copies: Parameters and buffers by full name, of the network and of averages of its weights.
        readers: What reads the units.
        keep: The units that stay, bool masks by group name.
        alive: The units that were there.
        ridge: As for :func:`regress` and :func:`scales`.
        how: By a factor for each unit that stays (see :func:`scales`), or by all that they tell of each that goes (see
            :func:`regress`).

    Returns:
        What :func:`put_back` takes.
    """
    changed: dict[str, None] = {}
    plans = []
    for (group, tensor, _), reader in readers.items():
        gone = alive[group] & ~keep[group] if group in keep and group in alive else torch.zeros(1, dtype=torch.bool)
        if reader.exact and bool(gone.any()):
            plans.append((reader, gone, keep[group] & alive[group]))
            changed.update({tensor: None, **({reader.receiver.tensor: None} if reader.receiver else {})})
    before = [(copy, name, copy[name].detach().clone()) for copy in copies for name in changed]
    for reader, gone, stay in plans:
        if how == "scale":
            factors = scales(reader.parts, gone, stay, ridge)
            for copy in copies:
                rescale(copy, reader.slot, stay, factors)
        else:
            known = regress(reader.mean, reader.products, gone, stay, ridge, reader.receiver is not None)
            for copy in copies:
                absorb(copy, reader.slot, reader.outputs, reader.receiver, reader.reach, gone, stay, known)
    return before


def put_back(before: Before) -> None:
    """Undo :func:`hand_over`."""
    for tensors, name, value in before:
        tensors[name].detach().copy_(value)

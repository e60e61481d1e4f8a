"""Which entries of a network survived pruning, found from the values of its parameters alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LINES = 3  # lines through a tensor that together tell the positions of one dimension apart
_ATTEMPTS = 6
_PLACES = 64


class NotLocatedError(Exception):
    """The values of a pruned parameter are not those of the original one."""


@torch.no_grad()
def surviving(original: nn.Module, pruned: nn.Module) -> dict[str, Tensor]:
    """A bool mask for each parameter of the original that lost entries, True where an entry survived.

    Raises:
        NotLocatedError: If a parameter is missing, or holds values which the original did not have.
    """
    left = dict(pruned.named_parameters(remove_duplicate=False))
    masks = {}
    for name, full in original.named_parameters():
        if name not in left:
            raise NotLocatedError(f"{name} is gone")
        mask = _mask(name, full.detach(), left[name].detach())
        if mask is not None:
            masks[name] = mask
    return masks


def _mask(name: str, full: Tensor, part: Tensor) -> Tensor | None:
    if full.shape == part.shape:
        return None  # if values moved inside it, the outputs show it
    if part.dim() != full.dim() or any(p > f for p, f in zip(part.shape, full.shape, strict=True)):
        raise NotLocatedError(f"{name} went from {tuple(full.shape)} to {tuple(part.shape)}")
    positions = _positions(full, part)
    if positions is None:
        return _scattered(name, full, part)
    mask = torch.ones_like(full, dtype=torch.bool)
    for dim, kept in enumerate(positions):
        gone = torch.ones(full.shape[dim], dtype=torch.bool)
        gone[kept] = False
        mask.index_fill_(dim, gone.nonzero().flatten(), False)
    return mask


def _positions(full: Tensor, part: Tensor) -> list[Tensor] | None:
    """The kept positions of each dimension, where the same ones were kept everywhere along it."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(_ATTEMPTS):
        anchors = [_anchor(full, part, generator) for _ in range(_LINES)]
        found = [anchor for anchor in anchors if anchor is not None]
        if not found:
            continue
        kept = [
            _match(_key(full, [f for f, _ in found], d), _key(part, [p for _, p in found], d))
            for d in range(full.dim())
        ]
        if any(k is None for k in kept):
            continue
        chosen = full
        for dim, indices in enumerate(kept):
            chosen = chosen.index_select(dim, indices)
        if torch.equal(chosen, part):
            return kept
    return None


def _anchor(full: Tensor, part: Tensor, generator: torch.Generator) -> tuple[list[int], list[int]] | None:
    """Coordinates of one value in the original and in the pruned tensor, if there is one place where it fits."""
    inside = [int(torch.randint(size, (1,), generator=generator)) for size in part.shape]
    places = (full == part[tuple(inside)]).nonzero().tolist()
    if len(places) > 1:  # among millions of values some are equal; those beside them are not
        places = [place for place in places[:_PLACES] if _fits(full, part, place, inside)]
    return (places[0], inside) if len(places) == 1 else None


def _fits(full: Tensor, part: Tensor, place: list[int], inside: list[int]) -> bool:
    return all(bool(torch.isin(_line(part, inside, d), _line(full, place, d)).all()) for d in range(full.dim()))


def _line(tensor: Tensor, anchor: list[int], dim: int) -> Tensor:
    return tensor[tuple(slice(None) if d == dim else at for d, at in enumerate(anchor))]


def _key(tensor: Tensor, anchors: list[list[int]], dim: int) -> Tensor:
    """One number for each position along ``dim``, made of the values on the lines through the anchors."""
    key = torch.zeros(tensor.shape[dim], dtype=torch.float64)
    for number, anchor in enumerate(anchors):
        line = _line(tensor, anchor, dim)
        key += (line.real if line.is_complex() else line).double() * (1 + 0.6180339887 * number)
    return key


def _match(full: Tensor, part: Tensor) -> Tensor | None:
    values, order = full.sort()
    at = torch.searchsorted(values, part).clamp(max=len(values) - 1)
    return order[at] if torch.equal(values[at], part) else None


def _scattered(name: str, full: Tensor, part: Tensor) -> Tensor:
    """The mask of a tensor that lost other positions in each of its blocks (the groups of a convolution)."""
    values, order = full.flatten().sort()
    found = part.flatten()
    at = torch.searchsorted(values, found).clamp(max=len(values) - 1)
    if not torch.equal(values[at], found) or bool((values[1:] == values[:-1]).any()):
        raise NotLocatedError(f"the values of {name} {tuple(part.shape)} were not found in the original")
    mask = torch.zeros(full.numel(), dtype=torch.bool)
    mask[order[at]] = True
    return mask.view(full.shape)

"""Blocks of equal size (attention heads, say): whether whole ones go, or equal positions of all."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lightning_prune.graph.labels import STATISTICS, LabelSpace, Plane, settle, varying


def keep_positions(space: LabelSpace, plane: Plane, dims: Iterable[int]) -> Plane:
    """A plane that varies along some dimensions and before them: tied before them if equal positions were chosen."""
    dims = tuple(dims)
    outer = [d for d in plane.dims if d not in dims]
    if not outer or plane.dims[-1] not in dims or not space.prefers_inner(plane.ids):
        return plane
    return Plane(space.tie(plane.ids, outer), plane.zero)


def leave_statistics(space: LabelSpace, planes: Iterable[Plane], dims: Iterable[int], reason: str) -> tuple[Plane, ...]:
    """Planes of what statistics are taken over along some dimensions: exact only if nothing goes along them.

    Where approximate results are allowed, what lies in these dimensions may go, and the statistics go with it.
    """
    if not space.approximate:
        return settle(space, planes, dims, reason)
    dims = tuple(dims)
    kept = []
    for plane in planes:
        plane = keep_positions(space, plane, dims)
        inside = [d for d in dims if plane.ids.shape[d] > 1]
        if inside and len(inside) < len(plane.dims):
            plane = Plane(space.tie(plane.ids, inside), plane.zero)
        elif inside:
            space.mark(STATISTICS, plane.ids)
        kept.append(plane)
    return tuple(kept)


def share_blocks_only(space: LabelSpace, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor] | None:
    """Labels that meet along blocks only, made the same in every block where equal positions were chosen.

    Then they have nothing to do with each other any more. Those that vary along the blocks only stay whole.

    Args:
        space: Where the choice is known.
        first: Compact labels of as many dimensions as the others.
        second: The others.

    Returns:
        The labels afterwards; None if they meet elsewhere too, or nothing was chosen for them.
    """
    dims = varying(first), varying(second)
    common = [d for d in dims[0] if d in dims[1]]
    if not common or max(dims, key=len)[-1] in common or not space.prefers_inner(first, second):
        return None
    for ids, own in zip((first, second), dims, strict=True):
        if len(own) == len(common):
            space.freeze(ids, "numbers blocks (heads, say) of which equal positions may go instead")
    return space.tie(first, common), space.tie(second, common)

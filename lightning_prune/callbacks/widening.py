"""Widening of the network of a running fit, with all that hangs on it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.support import shadows
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.tracer import named_leaves
from lightning_prune.graph.unregistered import loose_tensors
from lightning_prune.growth import copies_for, growable, widen
from lightning_prune.surgery.attributes import integer_settings, write_settings


def grow(network: Network, names: Iterable[str], expand: float, noise: float, generator: torch.Generator) -> list[str]:
    """Widen groups in all processes alike, with optimizers, averages of the weights and the record, and trace again.

    Args:
        network: The network.
        names: Groups that may grow.
        expand: By how much.
        noise: As for :func:`~lightning_prune.growth.share_out`.
        generator: Equal in all processes.

    Returns:
        The groups that have grown; those that cannot without a change to what the network computes stay as they are.

    Raises:
        ConfigurationError: If none of them can; nothing is changed then.
        ShrinkError: If some of them can alone, but not together; nothing is changed then.
    """
    before = integer_settings(network.module)
    copies = {name: copies_for(network.graph.groups[name].width, expand, generator) for name in names}
    copies = {name: times for name, times in copies.items() if bool((times > 1).any())}
    here = growable(network.graph, copies)
    votes = network.average(torch.tensor([float(name in here) for name in copies]))
    grown = [name for name, share in zip(copies, votes.tolist(), strict=True) if share == 1]
    if not grown:
        raise ConfigurationError(
            f"nothing can grow by a factor of {expand:g}: none of the channel groups {', '.join(names)} can be made "
            f"wider without a change to what the network computes. Give a larger expand if they are narrow, or 1 to "
            f"prune without growth."
        )
    result = widen(network.graph, {name: copies[name] for name in grown}, network.optimizers, noise, generator)
    for copy in shadows(network.module):
        result.widening.apply({**named_leaves(copy), **loose_tensors(copy)}, 0.0, generator)
        write_settings(copy, result.settings)
    copied = {name: network.positions[name].repeat_interleave(copies[name].cpu()) for name in grown}
    network.positions.update(copied)
    network.follow_resize(before, result.settings, result.widening.cuts)
    return grown

"""Equal positions of every block (of every attention head, say) instead of whole blocks: where the user chose so."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from lightning_prune.choices import unknown_name
from lightning_prune.compiled import uncompiled_name
from lightning_prune.graph.analysis import Analysis, Place
from lightning_prune.graph.channels import Refusal

NO_EFFECT = "was chosen for inner, but nowhere could either whole blocks or equal positions of all blocks go"
"""What is noted of a pattern whose choice made no difference."""


def chosen_places(analysis: Analysis, patterns: Sequence[str]) -> frozenset[Place]:
    """The dimensions that make the channels of the modules or tensors whose names match a pattern.

    Args:
        analysis: What is known of the network without the choice.
        patterns: As in ``fnmatch``.

    Raises:
        ConfigurationError: If a pattern matches nothing that makes channels.
    """
    producers = analysis.producers()
    # What is down to a single channel makes none any more, but a pattern for it is no mistake.
    single = [name for name, tensor in analysis.tensors.items() if 1 in tensor.shape]
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in [*(leaf.tensor for leaf in producers), *single]):
            known = [_names(leaf.tensor)[0] for leaf in producers]
            raise unknown_name("module in inner", pattern, dict.fromkeys(known))
    return frozenset(
        (leaf.tensor, leaf.dim) for leaf in producers if any(_matches(leaf.tensor, pattern) for pattern in patterns)
    )


def without_effect(analysis: Analysis, patterns: Sequence[str]) -> list[Refusal]:
    """Notes on the patterns whose choice made no difference."""
    notes = []
    for pattern in patterns:
        leaves = [leaf for leaf in analysis.producers() if _matches(leaf.tensor, pattern)]
        if not any(analysis.inner_mattered(leaf) for leaf in leaves):
            notes.append(Refusal(pattern, NO_EFFECT))
    return notes


def _names(tensor: str) -> tuple[str, str]:
    """Names that a tensor goes by: that of its module, and its own."""
    plain = uncompiled_name(tensor)
    return plain.rpartition(".")[0] or plain, plain


def _matches(tensor: str, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in _names(tensor))

"""What the network puts out: compared between the masked network and the shrunk one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_prune.graph.analysis import Analysis
from lightning_prune.graph.channels import ChannelGraph
from lightning_prune.surgery.resize import Saved, replace, restore

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def outputs(analysis: Analysis) -> list[tuple[str, Tensor]]:
    """What the evaluation programs hand out now."""
    results = []
    for run in analysis.runs:
        if not run.program.training:
            tensors = [leaf for leaf in tree_leaves(run.program.run()) if isinstance(leaf, Tensor)]
            results += [(run.program.name, tensor.detach().clone()) for tensor in tensors]
    return results


def masked_outputs(graph: ChannelGraph, keep: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Outputs of the full network with the removed units switched off."""
    assert graph.evidence is not None
    tensors, values = graph.evidence.tensors, {}
    for name, units in keep.items():
        group = graph.groups[name]
        off = torch.ones(group.width, dtype=torch.bool)
        off[units] = False
        for slot in group.off:
            value = values.setdefault(slot.tensor, tensors[slot.tensor].detach().clone())
            value.index_fill_(slot.dim, slot.positions(off).to(value.device), 0)
    saved = [Saved(tensors[name], tensors[name].detach(), tensors[name].grad) for name in values]
    try:
        for name, value in values.items():
            replace(tensors[name], value)
        return outputs(graph.evidence)
    finally:
        restore(saved)


def _difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference relative to the largest value; infinite where one is NaN and the other is not."""
    if expected.numel() == 0 or not (expected.is_floating_point() or expected.is_complex()):
        return 0.0
    a, b = expected.double(), found.double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a[a.isfinite()], b[b.isfinite()]
    scale = float(a.abs().max()) if a.numel() else 0.0
    return float((a - b).abs().max()) / scale if scale > 0 else float(b.abs().max()) if b.numel() else 0.0


def largest_difference(expected: list[tuple[str, Tensor]], found: list[tuple[str, Tensor]]) -> tuple[float, float]:
    """Largest relative difference, and the tolerance for the data type it was found in."""
    worst, tolerance = 0.0, _TOLERANCE[torch.float32]
    for (_, a), (_, b) in zip(expected, found, strict=True):
        if a.shape == b.shape:
            difference, allowed = _difference(a, b), _TOLERANCE.get(a.dtype, 1e-4)
            if difference / allowed > worst / tolerance:
                worst, tolerance = difference, allowed
    return worst, tolerance

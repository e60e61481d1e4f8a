"""Tiny networks, each with one construct that pruning libraries find hard: ``MODELS`` by name.

Batches hold two samples, images are not square, and widths are chosen so that no two sizes agree by chance.
"""

from __future__ import annotations

from examples.benchmarks.awkward_parts.attention import ATTENTION
from examples.benchmarks.awkward_parts.base import AwkwardModel
from examples.benchmarks.awkward_parts.convolutions import CONVOLUTIONS
from examples.benchmarks.awkward_parts.flow import FLOW
from examples.benchmarks.awkward_parts.mixing import MIXING
from examples.benchmarks.awkward_parts.norms import NORMS
from examples.benchmarks.awkward_parts.parameters import PARAMETERS
from examples.benchmarks.awkward_parts.positions import POSITIONS
from examples.benchmarks.awkward_parts.recurrent import RECURRENT
from examples.benchmarks.awkward_parts.shapes import SHAPES
from examples.benchmarks.awkward_parts.vision import VISION

__all__ = ["MODELS", "AwkwardModel"]

MODELS: dict[str, AwkwardModel] = {
    **ATTENTION,
    **POSITIONS,
    **NORMS,
    **RECURRENT,
    **CONVOLUTIONS,
    **SHAPES,
    **PARAMETERS,
    **MIXING,
    **FLOW,
    **VISION,
}

"""Seeing which units are on while a network predicts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import ConfigurationError, PruneError
from lightning_prune.graph.activations import Reading, watch
from lightning_prune.graph.channels import ChannelGraph
from lightning_prune.graph.program import Program, tensors_in
from lightning_prune.patterns.mining import PatternMining

_REMEDY = "Leave it out with `exclude`, or choose another method"


@dataclass(frozen=True)
class Signatures:
    """Which units are on for each sample, and what is predicted for it.

    Attributes:
        units: By group name, bool of shape ``[samples, units]``, on the CPU.
        predictions: The predicted class, int64 of shape ``[samples]``, on the CPU.
    """

    units: Mapping[str, Tensor]
    predictions: Tensor


def signatures_of(
    graph: ChannelGraph,
    evaluations: Callable[[int], Sequence[Program]],
    wanted: Collection[str],
    how: PatternMining,
) -> Signatures:
    """Run a network and take down its signatures.

    A unit is on for a sample if some operator that reads it with a parameter is given enough positive values of it.

    Args:
        graph: The channel graph of the network as it is.
        evaluations: Gives ways of running it on so many batches, whose results hold ``"outputs"`` by name.
        wanted: Names of the groups to look at.
        how: Number of samples, and what counts as on and as a prediction.

    Raises:
        ConfigurationError: If there are no class scores.
        PruneError: If a group is not read, or what is read of it cannot be told apart by samples.
        TraceError: If the network takes another course than when it was traced.
    """
    batches = math.ceil(how.samples / evaluations(1)[0].samples)
    columns: dict[str, list[Tensor]] = defaultdict(list)
    predictions = []
    for program in evaluations(batches):
        on, scores = _run(graph, program, wanted, how)
        predictions.append(scores.argmax(1).cpu())
        for name in wanted:
            if name not in on:
                raise PruneError(
                    f"no operator reads channel group {name!r} with a parameter in evaluation mode, so it cannot be "
                    f"seen which of its units are on. {_REMEDY}."
                )
            if len(on[name]) != len(scores):
                raise PruneError(
                    f"what reads channel group {name!r} is given {len(on[name])} rows for {len(scores)} samples, so it "
                    f"cannot be told for which sample a unit is on. {_REMEDY}."
                )
            columns[name].append(on[name].cpu())
    return Signatures({name: torch.cat(parts) for name, parts in columns.items()}, torch.cat(predictions))


def _run(
    graph: ChannelGraph, program: Program, wanted: Collection[str], how: PatternMining
) -> tuple[dict[str, Tensor], Tensor]:
    """Which units are on in one batch, and its class scores."""
    on: dict[str, Tensor] = {}
    results: list[Any] = []

    def observe(reading: Reading) -> None:
        name = reading.group
        if name in wanted:
            found = (reading.channels > 0).float().mean(2) > how.positive
            on[name] = on[name] | found if name in on and len(on[name]) == len(found) else found

    def run() -> Any:
        results.append(program.run())
        return results[-1]

    watch(graph, replace(program, run=run), observe)
    return on, class_scores(results[0]["outputs"], program.samples, how.outputs)


def class_scores(found: Mapping[str, Any], samples: int, name: str | None = None) -> Tensor:
    """The class scores among the outputs of a run.

    Args:
        found: Outputs by name, in the order in which they were made.
        samples: Number of samples of the batch.
        name: Name of the output that holds them; default: the last that has their shape.

    Raises:
        ConfigurationError: If there are none.

    Example:
        >>> outputs = {"body": torch.zeros(5, 64), "head": torch.zeros(5, 3), "loss": torch.tensor(0.0)}
        >>> list(class_scores(outputs, 5).shape)
        [5, 3]
    """
    if name is not None and name not in found:
        raise ConfigurationError(f"outputs={name!r} is no output of this network; there are: {', '.join(found)}.")
    for place in [name] if name is not None else reversed(list(found)):
        for tensor in tensors_in(found[place]):
            if tensor.is_floating_point() and tensor.dim() == 2 and len(tensor) == samples and tensor.shape[1] > 1:
                return tensor.detach()
    shapes = {place: [list(tensor.shape) for tensor in tensors_in(value)] for place, value in found.items()}
    raise ConfigurationError(
        f"decision patterns imply which class a network predicts, but none of its outputs is of shape [{samples}, "
        f"classes] for {samples} samples: {shapes}. If it classifies, say with `outputs` which child module gives the "
        f"scores; if not, choose another method."
    )

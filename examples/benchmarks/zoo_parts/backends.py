"""The pruning libraries, each called as its own documentation says."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune import ChannelGraph, __version__

from .hints import apply_hints

BACKENDS = {
    "ours": "lightning-prune",
    "torch-pruning": "torch-pruning",
    "torch-pruning-hints": "torch-pruning",
    "kirigami": "torch-kirigami",
}


@dataclass
class Pruned:
    """What a backend did, filled in as it goes along, so that a failure leaves what was reached.

    Attributes:
        stage: What it is doing: ``trace`` or ``shrink``.
        trace_seconds: CPU seconds to analyse the network.
        shrink_seconds: CPU seconds to choose and to remove.
        share_prunable: Share of the parameters that lie in tensors which some group cuts (ours).
        refusals: What stays whole and why (ours).
        retraced: Whether tracing the shrunk network finds the same groups less what went (ours).
    """

    stage: str = "trace"
    trace_seconds: float | None = None
    shrink_seconds: float | None = None
    share_prunable: float | None = None
    refusals: list[tuple[str, str]] = field(default_factory=list)
    retraced: bool | None = None
    check_retrace: Callable[[], bool] | None = None


@dataclass(frozen=True)
class Request:
    """What is asked of a backend."""

    suite: str
    name: str
    model: nn.Module
    inputs: tuple[Any, ...]
    ratio: float
    norms: str
    seed: int


def versions() -> dict[str, str]:
    """Versions of everything that takes part."""
    found = {"lightning-prune": __version__}
    for package in ("torch", "torchvision", "timm", "transformers", "torch-pruning", "torch-kirigami"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def load(backend: str) -> None:
    """Import a backend's library, so that its import does not count."""
    import_module(BACKENDS[backend].replace("-", "_"))


def prune(backend: str, request: Request, result: Pruned) -> None:
    """Prune a model in place.

    Raises:
        Exception: Whatever the library raises.
    """
    {"ours": _ours, "kirigami": _kirigami}.get(backend, _torch_pruning)(request, result, backend.endswith("-hints"))


def _ours(request: Request, result: Pruned, hints: bool) -> None:
    import lightning_prune

    options = {} if request.norms == "exact" else {"norms": request.norms}
    start = time.process_time()
    graph = lightning_prune.trace(request.model, request.inputs, **options)
    result.trace_seconds, result.stage = time.process_time() - start, "shrink"
    result.refusals = [(path, reason) for path, reason in graph.refused]
    result.share_prunable = prunable_share(request.model, graph)
    keep = random_keep(graph.widths, request.ratio, request.seed)
    start = time.process_time()
    lightning_prune.shrink(request.model, graph, keep)
    result.shrink_seconds = time.process_time() - start
    result.check_retrace = lambda: finds_again(
        graph, keep, lightning_prune.trace(request.model, request.inputs, **options)
    )


def prunable_share(model: nn.Module, graph: ChannelGraph) -> float:
    """Share of the parameters that lie in tensors which some group cuts; of one unit nothing goes."""
    cut = {slot.tensor for group in graph.groups.values() if group.width > 1 for slot in group.slots}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(size for name, size in sizes.items() if name in cut) / max(1, sum(sizes.values()))


def finds_again(graph: ChannelGraph, keep: Mapping[str, Tensor], again: ChannelGraph) -> bool:
    """Whether the graph of a shrunk network has the same groups less what went.

    A grouped operator with one group left is an ordinary one, whose channels may go one by one: groups that were not
    there before are right where they share a tensor with a group that has one unit left.
    """
    kept = {name: len(units) for name, units in keep.items()}
    single = {slot.tensor for name, group in graph.groups.items() if kept[name] == 1 for slot in group.slots}
    finer = [group for name, group in again.groups.items() if kept.get(name, 1) == 1]
    same = all(again.widths.get(name) == width for name, width in kept.items() if width > 1)
    return same and all(any(slot.tensor in single for slot in group.slots) for group in finer)


def random_keep(widths: dict[str, int], ratio: float, seed: int) -> dict[str, Tensor]:
    """Random units of each group, at least one of each."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randperm(width, generator=generator)[: max(1, round(width * (1 - ratio)))].sort().values
        for name, width in widths.items()
    }


def _torch_pruning(request: Request, result: Pruned, hints: bool) -> None:
    if hints:
        os.environ["TIMM_FUSED_ATTN"] = "0"
    import torch_pruning

    model = request.model
    hint = apply_hints(request.suite, request.name, model) if hints else None
    ignored = [*output_layers(model, request.inputs), *(hint.ignored if hint else [])]
    start = time.process_time()
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        request.inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=request.ratio,
        ignored_layers=ignored,
        num_heads=dict(hint.num_heads) if hint else {},
        forward_fn=lambda network, inputs: network(*inputs),
    )
    result.trace_seconds, result.stage = time.process_time() - start, "shrink"
    start = time.process_time()
    pruner.step()
    if hint:
        hint.repair(pruner)
    result.shrink_seconds = time.process_time() - start


def output_layers(model: nn.Module, inputs: Sequence[Any]) -> list[nn.Module]:
    """The layers with a matrix from which the outputs come directly: what a user means by 'the output layer'."""
    owners = {id(parameter): module for module in model.modules() for parameter in module.parameters(recurse=False)}
    states = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in states:
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    with torch.enable_grad():
        outputs = [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    found: dict[int, nn.Module] = {}
    pending, seen = [output.grad_fn for output in outputs], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        matrices = _matrices(node)
        found |= {id(matrix): owners[id(matrix)] for matrix in matrices if id(matrix) in owners}
        if not matrices:
            pending += [following for following, _ in node.next_functions]
    for parameter, required in states:
        parameter.requires_grad_(required)
    return list(dict.fromkeys(found.values()))


def _matrices(node: Any) -> list[Tensor]:
    """Parameters of two or more dimensions that an autograd node reads, itself or through a transposition."""
    found = []
    for following, _ in node.next_functions:
        while following is not None and following.name() in ("TBackward0", "TransposeBackward0", "PermuteBackward0"):
            following = following.next_functions[0][0]
        variable = getattr(following, "variable", None)
        if variable is not None and variable.dim() > 1:
            found.append(variable)
    return found


def _kirigami(request: Request, result: Pruned, hints: bool) -> None:
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import ChannelRatio, Greedy, GroupMagnitude, Pruner

    start = time.process_time()
    pruner = Pruner(request.model, graph=DependencyGraph.build(request.model, args=request.inputs))
    candidates = pruner.discover_candidates()
    result.trace_seconds, result.stage = time.process_time() - start, "shrink"
    start = time.process_time()
    pruner.prune(candidates, budget=ChannelRatio(request.ratio), strategy=Greedy(GroupMagnitude(p=2)))
    result.shrink_seconds = time.process_time() - start

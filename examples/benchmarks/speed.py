"""Seconds for finding and cutting the channels of a network, in forwards of that network, beside Torch-Pruning.

    python examples/benchmarks/speed.py --repeats 5 --out examples/results/speed.md

Everything is measured in CPU seconds of one thread, in one process, in turns; the table gives medians and, in brackets,
the spread from the smallest to the largest. A forward is one of the full network on the batch that is traced (2 images
of 224 x 224 pixels). ``trace`` finds the channel groups and proves a trial cut, ``shrink`` cuts half of every group and
compares the result with the masked network; ``unverified`` is both without that comparison (``verify=False``), so the
operators of the cut network are still followed, but their numbers are not looked at. Torch-Pruning builds its graph and
prunes half of every layer but the last one, and proves nothing; it is left out where it is not installed, fails, or has
not ended after a minute. All of these are in forwards. Operators are the executed ATen operators of one evaluation
forward.
"""

from __future__ import annotations

import argparse
import copy
import gc
import shlex
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from lightning_prune import shrink, trace

PEERS_LIMIT = 60
"""Seconds after which the peer is taken to hang."""
MODELS = ["resnet18", "resnet50", "resnet152", "vit_b_16", "vit_l_16", "swin_t"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="Torch-Pruning too")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = ["| model | operators | forward, s | trace | shrink | both | unverified | Torch-Pruning |"]
    rows.append("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name in options.models.split(","):
        rows.append(measured(name, options.repeats, options.peer))
        print(rows[-1], flush=True)
    text = (
        f"# Speed\n\n{__doc__.partition(chr(10))[2].strip()}\n\n{about(options.repeats)}\n\n" + "\n".join(rows) + "\n"
    )
    if options.out is not None:
        options.out.write_text(text)


def about(repeats: int) -> str:
    return (
        f"Made by `python {shlex.join(sys.argv)}` with torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, {repeats} repeats."
    )


def measured(name: str, repeats: int, peer: bool) -> str:
    inputs = torch.randn(2, 3, 224, 224)
    model = torchvision.models.get_model(name, weights=None).eval()
    with torch.no_grad():
        model(inputs)
    times: dict[str, list[float]] = {"forward": [], "trace": [], "shrink": [], "both": [], "quick": [], "peer": []}
    for repeat in range(repeats):
        torch.manual_seed(repeat)
        forward = min(seconds(lambda: plain_forward(model, inputs)) for _ in range(2))
        found, cut, operators = own_seconds(copy.deepcopy(model), inputs, verify=True)
        times["forward"].append(forward)
        times["trace"].append(found / forward)
        times["shrink"].append(cut / forward)
        times["both"].append((found + cut) / forward)
        found, cut, _ = own_seconds(copy.deepcopy(model), inputs, verify=False)
        times["quick"].append((found + cut) / forward)
        if peer and len(times["peer"]) == repeat:  # once it has failed it is not tried again
            other = peers_seconds(copy.deepcopy(model), inputs)
            times["peer"] += [] if other is None else [other / forward]
    cells = [spread(times[key]) for key in ("trace", "shrink", "both", "quick", "peer")]
    return f"| {name} | {operators} | {statistics.median(times['forward']):.3f} | {' | '.join(cells)} |"


def own_seconds(model: nn.Module, inputs: Tensor, verify: bool) -> tuple[float, float, int]:
    """Seconds of the trace and of the cut, and the number of operators."""
    graph = None

    def find() -> None:
        nonlocal graph
        graph = trace(model, inputs)

    found = seconds(find)
    keep = {group: torch.randperm(width)[: max(1, width // 2)] for group, width in graph.widths.items()}
    cut = seconds(lambda: shrink(model, graph, keep, verify=verify))
    return found, cut, len(graph.evidence.runs[0].events)


def plain_forward(model: nn.Module, inputs: Tensor) -> None:
    with torch.no_grad():
        model(inputs)


def peers_seconds(model: nn.Module, inputs: Tensor) -> float | None:
    """Torch-Pruning on the same network; None where it is missing, fails or takes too long."""
    try:
        import torch_pruning
    except ImportError:
        return None
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]

    def prune() -> None:
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        pruner = torch_pruning.pruner.MagnitudePruner(
            model, inputs, importance, pruning_ratio=0.5, ignored_layers=[last]
        )
        pruner.step()

    def give_up(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, PEERS_LIMIT)
    try:
        return seconds(prune)
    except Exception:
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def seconds(action: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()
    action()
    return time.process_time() - start


def spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


if __name__ == "__main__":
    main()

"""What pruning costs while a network trains: masks in every step, and what a shrunk network takes after its shrink.

    python examples/benchmarks/overhead.py --out examples/results/overhead.md

A ResNet-18 of torchvision is trained by Lightning's Trainer on random images of 32 x 32 pixels, with SGD, momentum and
weight decay. Each row is a fit of its own; all fits run in one process and one thread at a time, and take turns step by
step, in a new random order each round, so that whatever else the machine does falls on all of them alike. A step is
timed from the start of one batch to the start of the next: everything the Trainer does is in it, with all hooks of all
callbacks, and at the end of an epoch that too. Garbage is collected between the rounds. The first epoch is left out.
Times are medians and, in brackets, the lower and upper quartile; ratios are taken within each round (of steps) or each
epoch (of its sum) before their median is. CPU is the CPU time of the process, wall the time that passed. The second row
is the same training as the first one once more: what its ratio is away from 1 is the error of this measurement.

Memory is the peak of resident memory in the second epoch above what the process takes with all libraries loaded, each
row in a new process, where malloc gives back at once what is freed.

All rows hold or aim at one half: lightning-prune masks half of all channels (its masks hold the weights that read them
at zero), ModelPruning half of the weights or of the rows of each convolution, from the end of the first epoch on, and
Torch-Pruning's pruners add to the gradients before each step and prune nothing before training ends. "Zeros" is the
share of zeros among the convolutions' weights at the end. The network that is built small has the widths of the shrunk
one, from new layers. In the last row the same network is trained in a process that has traced and cut another one
before, and has let go of it: what libraries keep once they have been used (code, kernels compiled for a shape) does not
grow with the network, but on one as small as this it weighs.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
import torchvision
from overhead_parts.memory import peak, print_peak
from overhead_parts.turns import Clock, Turns, in_turns
from overhead_parts.variants import VARIANTS, Classifier, fit, shrunk_widths, widths_of, zeros

import lightning_prune

AGAINST = {"shrunk": "small", "small": "small", "after": "small"}
"""What a variant is compared with, if not with plain training."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--epochs", type=int, default=9, help="the first one is left out")
    parser.add_argument("--steps", type=int, default=10, help="in an epoch")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="peak memory too")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if options.memory_of is not None:
        print_peak(options.memory_of, options.batch_size)
        return
    started = time.perf_counter()
    text = report(options)
    minutes = (time.perf_counter() - started) / 60
    explanation = __doc__.partition(chr(10))[2].strip()
    text = f"# Overhead\n\n{explanation}\n\n{about(options)} It took {minutes:.0f} min.\n\n{text}"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


def about(options: argparse.Namespace) -> str:
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, lightning {lightning.__version__}"
    return (
        f"Made by `python {shlex.join(sys.argv)}` with lightning-prune {lightning_prune.__version__}, {versions}"
        f"{peers_version()}: {options.epochs - 1} epochs of {options.steps} steps of {options.batch_size} images."
    )


def peers_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f", torch-pruning {version('torch-pruning')}"
    except PackageNotFoundError:
        return ""


def report(options: argparse.Namespace) -> str:
    keys = [key for key in options.variants.split(",") if peers_version() or "Torch-Pruning" not in VARIANTS[key].name]
    widths = shrunk_widths(options.batch_size)
    modules: dict[str, Classifier] = {}

    def training(key: str, turns: Turns) -> None:
        modules[key] = fit(VARIANTS[key], widths, options.epochs, options.steps, options.batch_size, turns)

    fits = [lambda turns, key=key: training(key, turns) for key in keys]
    times = dict(zip(keys, in_turns(fits, lambda line: print(line, file=sys.stderr, flush=True)), strict=True))
    times = {key: steps[options.steps :] for key, steps in times.items()}
    if {"shrunk", "small"} <= modules.keys():
        assert widths_of(modules["shrunk"]) == widths_of(modules["small"])
    memory = {key: peak(key, widths, options.batch_size) for key in keys} if options.memory else {}
    rows = [
        "| training | zeros | step, CPU ms | ratio, CPU | ratio, wall | epoch, ratio, CPU | epoch, ratio, wall "
        "| peak memory, MB | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for key in keys:
        base = AGAINST.get(key, "plain")
        cells = [VARIANTS[key].name, f"{zeros(modules[key]):.0%}", spread([1000 * step.cpu for step in times[key]], 0)]
        for length in (1, options.steps):
            for clock in ("cpu", "wall"):
                cells.append(ratio(times[key], times.get(base), length, clock))
        cells += [f"{memory[key]:.0f}", f"{memory[key] / memory[base]:.3f}"] if base in memory else ["-", "-"]
        rows.append("| " + " | ".join(cells) + " |")
    note = "Ratios of the last three rows are to the network built small, the others to training without a callback."
    return "\n".join(rows) + f"\n\n{note}\n"


def ratio(steps: Sequence[Clock], base: Sequence[Clock] | None, length: int, clock: str) -> str:
    """Ratios of the sums of each ``length`` steps."""
    if base is None:
        return "-"
    ours, theirs = ([getattr(step, clock) for step in series] for series in (steps, base))
    starts = range(0, len(ours), length)
    return spread([sum(ours[i : i + length]) / sum(theirs[i : i + length]) for i in starts], 3)


def spread(values: Sequence[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    main()

"""Results of the studies: options, cells that are not computed twice, and tables of paired differences."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from examples.studies.nets import TASKS

# Options -------------------------------------------------------------------------------------------------------------


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every study has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with MNIST and CIFAR-10; see data.load")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of finished cells; what is there is not redone"
    )
    parser.add_argument("--out", type=Path, help="Markdown file for the table; it is printed otherwise")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--train", type=int, help="use only so many training images")
    parser.add_argument("--test", action="store_true", help="measure on the test images, not on those held out")
    return parser


def fit_arguments(
    description: str | None, methods: Sequence[str], tasks: Sequence[str], epochs: int, train: int | None = None
) -> argparse.ArgumentParser:
    """Those and the options of a study that fits nets with each of several methods, with their defaults."""
    parser = arguments(description)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=tasks, help="nets, each with its data")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--rate", type=float, help="learning rate at the start; default: that of the net")
    parser.set_defaults(seeds=[0, 1, 2], train=train)
    return parser


def add_precision(parser: argparse.ArgumentParser) -> None:
    """The option to train in half precision, for studies in which no method looks at weights as they are cast."""
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true", help="of the training")


def grid(options: argparse.Namespace, share: str, shares: Sequence[float], *more: str) -> list[dict[str, Any]]:
    """A key for each net, seed, method and share to remove; ``dense`` is not pruned.

    Args:
        options: Those of :func:`fit_arguments`.
        share: Name of the share in the keys.
        shares: The shares.
        more: Names of further options that results must have in common to be compared.
    """
    common = {name: getattr(options, name) for name in ("epochs", "train", "test", *more)}
    rates = {task: options.rate or TASKS[task].rate for task in options.tasks}
    return [
        {"net": task, share: removed, "seed": seed, "method": method, "rate": rates[task]} | common
        for task in options.tasks
        for seed in options.seeds
        for method in options.methods
        for removed in (shares if method != "dense" else [0.0])
    ]


# Cells ---------------------------------------------------------------------------------------------------------------


class Cells:
    """Results in a file of JSON lines; what is in it is not computed again.

    Several processes may work on different cells of one file at the same time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            if line.endswith("}"):  # else it is empty, or the process that wrote it was killed in the middle
                yield json.loads(line)

    def run(self, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        """Do the work unless there is a result with this key."""
        if any(key.items() <= row.items() for row in self):
            return
        row = {**key, **work()}
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(row))  # a line of its own, whatever a killed process has left behind
        print(json.dumps(row), flush=True)


def results(
    keys: Sequence[dict[str, Any]], work: Callable[[dict[str, Any]], dict[str, Any]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The results of all keys, in their order, of which only those are computed that are not there yet."""
    cells = Cells(options.work / "cells.jsonl")
    for key in keys:
        cells.run(key, partial(work, key))
    found = list(cells)
    return [row for key in keys for row in found if key.items() <= row.items()]


# Tables --------------------------------------------------------------------------------------------------------------


def paired_table(
    rows: Sequence[dict[str, Any]],
    groups: Sequence[str],
    reference: str,
    value: str,
    more: Sequence[str] = (),
    digits: int = 2,
) -> str:
    """A Markdown table with a line for each method in each group, and its paired difference to a reference method.

    Args:
        rows: Cells, each with a ``method``, a ``seed`` and numbers; pairs are those of equal group and seed.
        groups: Names of what makes a group, such as the sparsity.
        reference: The method to compare with.
        value: Name of the number that is compared.
        more: Names of further numbers whose means are shown, those that are not None.
        digits: How many to show after the point.
    """
    head = [*groups, "method", "seeds", f"{value}, mean ± sd", f"minus {reference}, mean ± standard error", *more]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * (len(groups) + 1) + "--:|" * (len(head) - len(groups) - 1)]
    by_line: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_line.setdefault((*(row[name] for name in groups), row["method"]), {})[row["seed"]] = row
    first = list(dict.fromkeys(line[:-1] for line in by_line))
    for line, found in sorted(by_line.items(), key=lambda item: first.index(item[0][:-1])):
        compared = by_line.get((*line[:-1], reference), {})
        pairs = [found[seed][value] - compared[seed][value] for seed in found if seed in compared]
        own = line[-1] == reference or not pairs
        cells = [*line, len(found), with_error([row[value] for row in found.values()], digits)]
        cells += ["" if own else with_error(pairs, digits, root=True, sign="+")]
        cells += [mean([row[name] for row in found.values()], digits) for name in more]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def mean(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.{digits}f}" if known else ""


def with_error(values: Sequence[float], digits: int, root: bool = False, sign: str = "") -> str:
    """Mean ± standard deviation, or with ``root`` ± standard error of the mean."""
    middle = f"{statistics.mean(values):{sign}.{digits}f}"
    if len(values) < 2:
        return middle
    return f"{middle} ± {statistics.stdev(values) / (math.sqrt(len(values)) if root else 1):.{digits}f}"


def made_by() -> str:
    """The command and the machine, as a sentence."""
    name = getattr(sys.modules["__main__"], "__spec__", None)
    command = f"python -m {name.name}" if name else f"python {sys.argv[0]}"
    return (
        f"Made by `{command} {shlex.join(sys.argv[1:])}` on {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores ({torch.get_num_threads()} threads used), Python {platform.python_version()}, torch "
        f"{torch.__version__}, lightning {L.__version__}."
    )


def publish(title: str, description: str | None, options: argparse.Namespace, *parts: str) -> None:
    """Print what a study has found, with how it was made, and write it to its file."""
    text = "\n\n".join([f"# {title}", (description or "").strip(), made_by(), *parts]) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)

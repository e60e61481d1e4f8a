"""Prune whole model zoos with lightning-prune and its peers, and let one judge check every result.

    python examples/benchmarks/zoo.py --suite torchvision --backend ours --out torchvision-ours.jsonl
    python examples/benchmarks/zoo.py --table *.jsonl --out examples/results/zoo.md
    python examples/benchmarks/zoo.py --self-check

Each model runs in its own process with a limit on time and memory. A run that was stopped goes on where it was: models
that the file already has with the same settings are skipped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from zoo_parts.backends import BACKENDS
from zoo_parts.selfcheck import self_check
from zoo_parts.suites import SUITES, model_names
from zoo_parts.tables import MOST_PARAMETERS, read_rows, table
from zoo_parts.worker import work

_PROCESSES = multiprocessing.get_context("forkserver")  # what takes seconds to import is imported once
_IDENTITY = ("suite", "backend", "model", "ratio", "norms", "seed")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--suite", choices=SUITES)
    p.add_argument("--backend", choices=list(BACKENDS))
    p.add_argument("--out", type=Path, help="JSON lines of a run, or Markdown of --table")
    p.add_argument("--models", help="only these, separated by commas")
    p.add_argument("--ratio", type=float, default=0.5, help="share of the channels of each group to remove")
    p.add_argument("--norms", choices=("exact", "approximate"), default="exact", help="for ours")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--timeout", type=int, default=300, help="CPU seconds for the pruning call")
    p.add_argument("--memory", type=float, default=14, help="GB for each process")
    p.add_argument("--max-params", type=int, default=MOST_PARAMETERS, help="larger models are skipped, by name")
    p.add_argument("--jobs", type=int, default=1, help="models at a time")
    p.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="make the table from these records")
    p.add_argument("--self-check", action="store_true", help="corrupt correct results; the judge must flag each")
    return p


def main() -> int:
    arguments = parser().parse_args()
    if arguments.self_check:
        return self_check(arguments.models.split(",") if arguments.models else None)
    if arguments.out is None:
        parser().error("--out is missing")
    if arguments.table:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(table(read_rows(arguments.table)))
        return 0
    if arguments.suite is None or arguments.backend is None:
        parser().error("--suite and --backend are needed")
    return run_suite(arguments)


def run_suite(arguments: argparse.Namespace) -> int:
    """Run every model that the file does not have yet."""
    names = arguments.models.split(",") if arguments.models else model_names(arguments.suite)
    shared = {key: getattr(arguments, key) for key in ("suite", "backend", "ratio", "norms", "seed")}
    limits = {key: getattr(arguments, key) for key in ("timeout", "memory", "max_params")}
    done = {tuple(row.get(key) for key in _IDENTITY) for row in read_rows([arguments.out])}
    todo = [{**shared, **limits, "model": name} for name in names]
    todo = [settings for settings in todo if tuple(settings[key] for key in _IDENTITY) not in done]
    print(f"{len(todo)} of {len(names)} models to run")
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    _PROCESSES.set_forkserver_preload(["torch._dynamo", "zoo_parts.worker", "zoo_parts.backends", arguments.suite])
    lock = Lock()

    def one(settings: dict[str, Any]) -> None:
        row = run_model(settings)
        with lock:
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(_line(row), flush=True)

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(one, todo))
    return 0


def run_model(settings: dict[str, Any]) -> dict[str, Any]:
    """The record of one model, measured in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        process = _PROCESSES.Process(target=work, args=(settings, path))
        process.start()
        wall = 4 * (4 * settings["timeout"] + 120)  # CPU seconds take longer on a busy machine
        process.join(wall)
        died = f"the process ended with code {process.exitcode}" if process.exitcode else None
        if process.exitcode is None:
            died = f"the process took more than {wall} seconds"
            process.kill()
            process.join()
        row = json.loads(path.read_text()) if path.exists() else {**settings, "verdict": "failed"}
        if died:
            row |= {"error": died, "error_type": "Died"}
            row["verdict"] = "failed" if row["verdict"] == "other" else row["verdict"]
        return row


def _line(row: dict[str, Any]) -> str:
    numbers = {
        key: f"{row[key]:.3g}"
        for key in ("relative_error", "change", "share_prunable", "share_removed")
        if row.get(key)
    }
    seconds = [row.get(key) for key in ("forward_seconds", "trace_seconds", "shrink_seconds")]
    times = "/".join("-" if value is None else f"{value:.2f}" for value in seconds)
    return f"{row['model']}: {row['verdict']} {numbers} {times}s train={row.get('train_step')} {row.get('error') or ''}"


if __name__ == "__main__":
    sys.exit(main())

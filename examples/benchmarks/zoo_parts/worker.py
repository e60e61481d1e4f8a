"""One model in its own process: build, prune, judge, train a step; the record is written after each stage."""

from __future__ import annotations

import copy
import gc
import json
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .backends import Pruned, Request, load, prune, versions
from .judge import PROVEN, judge
from .suites import Case, case

_REFUSALS_KEPT = 400
PARTIAL = 0.3


class OutOfTime(BaseException):
    """The pruning call took too long. Not an Exception, so that no library swallows it."""


class Journal:
    """A record that is on disk after each change."""

    def __init__(self, path: Path, record: dict[str, Any]):
        self.path, self.record = path, record

    def note(self, **values: Any) -> None:
        self.record.update(values)
        self.path.write_text(json.dumps(self.record))


def work(settings: dict[str, Any], path: Path) -> None:
    """Measure one model as the settings say and leave the record in a file."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    journal = Journal(path, {**settings, "versions": versions(), "verdict": "failed"})
    _limit(settings)
    try:
        _measure(settings, journal)
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        journal.note(
            verdict="timeout" if isinstance(error, OutOfTime) else "failed",
            error_type=type(error).__name__,
            error=f"{error}"[:1500],
            error_at=f"{Path(where.filename).name}:{where.name}",
        )


def _limit(settings: dict[str, Any]) -> None:
    memory = int(settings["memory"] * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    seconds = 4 * settings["timeout"] + 120
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))


def _measure(settings: dict[str, Any], journal: Journal) -> None:
    suite, name, seed = settings["suite"], settings["model"], settings["seed"]
    hints = settings["backend"].endswith("-hints")
    chosen = case(suite, name)
    journal.note(stage="build")
    original = chosen.fresh(seed, hints)
    parameters = sum(parameter.numel() for parameter in original.parameters())
    journal.note(parameters=parameters)
    if parameters > settings["max_params"]:
        journal.note(verdict="skipped", error=f"{parameters:,} parameters are more than --max-params")
        return
    model = copy.deepcopy(original)  # drawing the weights again would take longer than pruning
    torch.manual_seed(seed)
    inputs = chosen.inputs()
    # The model itself meets its pruning cold, as a fit does: what it caches at its first forward is not there yet.
    journal.note(stage="forward", forward_seconds=_forward_seconds(original, inputs))

    journal.note(stage="trace")
    result = Pruned()
    request = Request(suite, name, model, inputs, settings["ratio"], settings["norms"], seed)
    load(settings["backend"])
    peak = _PeakMemory()
    try:
        with _time_limit(settings["timeout"]):
            prune(settings["backend"], request, result)
    finally:
        journal.note(
            stage=result.stage,
            peak_extra_mb=peak.extra_mb(),
            traced=result.trace_seconds is not None,
            shrunk=result.shrink_seconds is not None,
            trace_seconds=result.trace_seconds,
            shrink_seconds=result.shrink_seconds,
            share_prunable=result.share_prunable,
            refusals=result.refusals[:_REFUSALS_KEPT],
            refusals_total=len(result.refusals),
        )
    left = sum(parameter.numel() for parameter in model.parameters())
    journal.note(share_removed=1 - left / max(1, parameters), stage="forward after")
    model.eval()
    with torch.no_grad():
        model(*inputs)
    journal.note(forward_runs=True, stage="judge", verdict="other", error="the check did not finish")
    verdict = judge(original, model, inputs, chosen.detector)
    removed = left < parameters
    journal.note(
        verdict=verdict.word if removed else "nothing removed",
        verified=verdict.word in PROVEN and removed,
        partial=verdict.word in PROVEN and removed and 1 - left / parameters < PARTIAL,
        relative_error=verdict.error,
        change=verdict.change,
        compared=verdict.compared,
        precision=verdict.precision,
        error=verdict.reason,
    )
    gc.collect()
    journal.note(**_later("retraced", result.check_retrace), stage="retrace")
    journal.note(**_train_step(chosen, original, model, seed), stage="done")


def _later(key: str, check: Any) -> dict[str, Any]:
    if check is None:
        return {}
    try:
        return {key: check()}
    except Exception as error:
        return {key: False, f"{key}_error": f"{type(error).__name__}: {error}"[:500]}


def _forward_seconds(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    """CPU seconds of a plain forward pass, the better of two after one to warm up."""
    taken = []
    with torch.no_grad():
        for _ in range(3):
            start = time.process_time()
            model(*inputs)
            taken.append(time.process_time() - start)
    return min(taken[1:])


def _train_step(chosen: Case, original: nn.Module, model: nn.Module, seed: int) -> dict[str, Any]:
    """Whether a step of training works after pruning where it worked before; None where it did not."""
    torch.manual_seed(seed)
    inputs = chosen.train_inputs()
    try:
        before = _gradients(original, inputs)
    except Exception as error:
        return {"train_step": None, "train_error": f"the original cannot: {type(error).__name__}: {error}"[:500]}
    try:
        after = _gradients(model, inputs)
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4).step()
        model.zero_grad()
        model.eval()
        with torch.no_grad():
            model(*inputs[:1] if chosen.detector else inputs)
    except Exception as error:
        return {"train_step": False, "train_error": f"{type(error).__name__}: {error}"[:500]}
    lost = sorted(before - after)
    return {"train_step": not lost, "train_error": f"no gradient any more: {', '.join(lost[:5])}" if lost else None}


def _gradients(model: nn.Module, inputs: tuple[Any, ...]) -> set[str]:
    """Names of the parameters that get a gradient in train mode."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    outputs = [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    sum(output.abs().mean() for output in outputs if output.numel()).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise OutOfTime(f"more than {seconds} CPU seconds")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


class _PeakMemory:
    """Peak resident memory above what was resident at the start."""

    def __init__(self) -> None:
        gc.collect()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present size
        self.start = _status_kb("VmRSS")

    def extra_mb(self) -> float:
        return round((_status_kb("VmHWM") - self.start) / 1024, 1)


def _status_kb(key: str) -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    return 0

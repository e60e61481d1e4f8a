"""Peak memory of an epoch, in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L

from .variants import VARIANTS, Widths, fit

STEPS = 5
EXACT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Settings of glibc under which resident memory is what is in use, not what was in use some time ago."""


class Peak(L.Callback):
    """Peak resident memory of the second epoch, in bytes."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            settle()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts afresh

    def on_train_end(self, *_: object) -> None:
        self.value = status("VmHWM")


def settle() -> None:
    """Give back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak(key: str, widths: Widths, batch_size: int) -> float:
    """Peak of an epoch of a variant above what the libraries take, in MB, measured in a new process (Linux only)."""
    script = Path(sys.argv[0]).resolve()
    command = [sys.executable, str(script), "--memory-of", key, "--batch-size", str(batch_size)]
    environment = {**os.environ, **EXACT}
    result = subprocess.run(
        command, input=json.dumps(widths), stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return float(result.stdout.strip().splitlines()[-1])


def print_peak(key: str, batch_size: int) -> None:
    """What the new process does."""
    widths = json.loads(sys.stdin.read())
    settle()
    before, measured = status("VmRSS"), Peak()
    fit(VARIANTS[key], widths, 2, STEPS, batch_size, measured)
    print((measured.value - before) / 1e6)

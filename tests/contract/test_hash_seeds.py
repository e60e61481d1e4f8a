"""The same fit is the same in every process, whatever order its sets have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.contract.ddp_methods import METHODS
from tests.fits import equal

ROOT = Path(__file__).parents[2]


def test_fits_do_not_depend_on_how_strings_are_hashed(tmp_path) -> None:
    command = [sys.executable, "-m", "tests.contract.hash_fits"]
    started = {
        seed: subprocess.Popen(
            [*command, str(tmp_path / seed)], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for seed in ("1", "2")
    }  # fmt: skip
    for process in started.values():
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
    first, second = (torch.load(tmp_path / seed, weights_only=True) for seed in started)
    assert first.keys() == {row.name for row in METHODS}
    assert [name for name in first if not equal(ageless(first[name]), ageless(second[name]))] == []


def ageless(state):
    """Without what was measured in seconds."""
    if isinstance(state, dict):
        return {key: ageless(value) for key, value in state.items() if "seconds" not in str(key)}
    return state

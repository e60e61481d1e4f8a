"""Two processes stay in step with every method."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.contract.ddp_methods import METHODS
from tests.fits import equal

pytestmark = pytest.mark.ddp
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the two processes wrote down: by name of the row, one dict for each process."""
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-m", "tests.contract.ddp_methods", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        row.name: [torch.load(folder / f"{row.name}-{rank}.pt", weights_only=True) for rank in range(2)]
        for row in METHODS
    }


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_both_processes_hold_the_same_after_every_step(results, row):
    first, second = results[row.name]
    assert len(first["pages"]) == len(second["pages"]) > 0
    for number, (one, other) in enumerate(zip(first["pages"], second["pages"], strict=True)):
        for what in one:
            assert equal(one[what], other[what]), f"{what} differ after batch {number}"
    assert first["reached"] == second["reached"]
    assert first["reached"] >= row.callback().goal - 0.06

"""Two processes that train one network together prune it alike, and stay in step afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.contract.ddp_fits import FITS, RESUMED, STOPPED, fit
from tests.fits import equal, widths

pytestmark = pytest.mark.ddp
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the two processes wrote down: by name of the fit, one dict for each process."""
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-m", "tests.contract.ddp_fits", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    names = [*FITS, *(f"{name}-resumed" for name in RESUMED)]
    return {name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)] for name in names}


@pytest.mark.parametrize("name", FITS)
def test_both_processes_hold_the_same_after_every_step(results, name):
    first, second = results[name]
    assert len(first["pages"]) == len(second["pages"]) > 0
    for number, (one, other) in enumerate(zip(first["pages"], second["pages"], strict=True)):
        for what in ("weights", "state", "masks", "rounds"):
            assert equal(one[what], other[what]), f"{what} differ after batch {number}"
    assert first["pages"][-1]["rounds"] >= 1
    assert first["widths"] == second["widths"]
    assert equal(first["scores"], second["scores"])
    assert equal(first["weights"].keys(), second["weights"].keys())
    assert first["history"] == second["history"]


@pytest.mark.parametrize("name", FITS)
def test_something_was_pruned(results, name):
    assert sum(results[name][0]["widths"]) < 60


@pytest.mark.parametrize("name", ["l1", "random"])
def test_widths_are_those_of_one_process_where_scores_depend_on_no_data(results, name):
    module, *_ = fit(name)
    assert results[name][0]["widths"] == widths(module)


def test_what_one_process_cannot_cut_stays_in_both(results):
    first, second = results["stiff"]
    assert first["widths"] == second["widths"]
    assert first["widths"][2] == 24


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", RESUMED)
def test_a_fit_of_two_processes_that_was_stopped_and_resumed_ends_like_one_that_was_not(results, name, rank):
    whole, resumed = results[name][rank], results[f"{name}-resumed"][rank]
    assert len(resumed["pages"]) == len(whole["pages"]) - STOPPED > 0
    for number, (one, other) in enumerate(zip(whole["pages"][STOPPED:], resumed["pages"], strict=True)):
        assert equal(one, other), f"they differ after batch {number} from the resume on"
    assert whole["widths"] == resumed["widths"]
    assert equal(whole["weights"], resumed["weights"])

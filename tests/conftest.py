"""What every test gets: one thread, a fixed seed, and a check that it leaves the process as it found it."""

from __future__ import annotations

import os

# Before torch is imported: two workers with two threads each would fight for the cores, and sums over a changing number
# of threads would not be reproducible. Child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from lightning.pytorch import seed_everything

torch.set_num_threads(1)

# Variables that libraries set by themselves, on import or when a run is seeded; put back, but no fault of a test.
WRITTEN_BY_LIBRARIES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "KMP_", "PYTORCH_NVML_", "TORCHINDUCTOR_", "TRITON_")


def environment():
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


def without_libraries(variables):
    return {name: value for name, value in variables.items() if not name.startswith(WRITTEN_BY_LIBRARIES)}


def restore_environment(before):
    for name in environment().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def global_flags():
    return {
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
        "torch.is_deterministic_algorithms_warn_only_enabled()": torch.is_deterministic_algorithms_warn_only_enabled(),
        "torch.backends.cudnn.deterministic": torch.backends.cudnn.deterministic,
        "torch.backends.cudnn.benchmark": torch.backends.cudnn.benchmark,
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.get_num_threads()": torch.get_num_threads(),
    }


def restore_global_flags(before):
    torch.use_deterministic_algorithms(
        before["torch.are_deterministic_algorithms_enabled()"],
        warn_only=before["torch.is_deterministic_algorithms_warn_only_enabled()"],
    )
    torch.backends.cudnn.deterministic = before["torch.backends.cudnn.deterministic"]
    torch.backends.cudnn.benchmark = before["torch.backends.cudnn.benchmark"]
    torch.set_default_dtype(before["torch.get_default_dtype()"])
    torch.set_grad_enabled(before["torch.is_grad_enabled()"])
    torch.set_num_threads(before["torch.get_num_threads()"])


def changes(before, after):
    names = sorted(before.keys() | after.keys())
    return [f"{name}: {before.get(name)} -> {after.get(name)}" for name in names if before.get(name) != after.get(name)]


@pytest.fixture(autouse=True)
def nothing_leaks():
    """Fail a test that leaves environment variables or global flags of torch changed, and put them back."""
    variables, flags = environment(), global_flags()
    yield
    leaked = changes(without_libraries(variables), without_libraries(environment()))
    leaked += changes(flags, global_flags())
    restore_environment(variables)
    restore_global_flags(flags)
    assert not leaked, f"this test changed the state of the whole process: {'; '.join(leaked)}"


@pytest.fixture(autouse=True)
def seeded(nothing_leaks):
    """Start each test from the same state of every random generator."""
    seed_everything(0, verbose=False)


@pytest.fixture
def deterministic(nothing_leaks, monkeypatch):
    """Deterministic algorithms for one test, which may also build ``Trainer(deterministic=True)``."""
    before = global_flags()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    restore_global_flags(before)

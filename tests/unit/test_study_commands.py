"""The studies in examples/ run from their command to their table, here on few and meaningless images."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("torchvision")

from torchvision.transforms.functional import to_pil_image

ONE_FIT = ["--tasks", "mnist-conv", "--epochs", "2"]
COMMANDS = {
    "channels": [*ONE_FIT, "--removed", "0.5", "--methods", "dense", "l2, post", "random, init"],
    "decision_patterns": ["--presets", "sound", "--start", "20", "--widths", "10", "--epochs", "4", "--cycle", "1",
                          "--search_epochs", "3", "--methods", "magnitude", "random"],
    "growth": [*ONE_FIT, "--removed", "0.5", "--methods", "grow and prune", "group lasso"],
    "memory": [*ONE_FIT, "--removed", "0.5", "--rounds", "2", "--methods", "bayesian", "l2, one shot, last"],
    "random_networks": ["--nets", "conv-4", "--epochs", "1", "--methods", "trained", "random", "--tune"],
    "reinitialisations": ["--tasks", "mnist-conv", "--units", "channels", "--epochs", "1", "--look", "3"],
    "scoring_net": ["--tasks", "mnist-conv", "--epochs", "2", "--modes", "init", "--steps", "3", "--adapt", "1",
                    "--parts", "stages", "transfer"],
    "small_weights": ["--tasks", "mnist-conv", "--epochs", "1", "--tuning", "1", "--sparsities", "0.5", "--methods",
                      "magnitude", "swaps", "genetic", "--sweeps", "1", "--batches", "2"],
    "structure_search": [*ONE_FIT, "--removed", "0.5", "--methods", "l1", "random, one fit", "--tuning", "1",
                         "--one_fit", "2"],
    "weights": ["--tasks", "lenet-300-100", "--epochs", "2", "--sparsities", "0.5", "--methods", "dense",
                "magnitude, gradual", "RigL, sparse from the start"],
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Seventy training images of each class, in the folders that the studies read."""
    folder, draw = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for name, shape in {"MNIST": (1, 28, 28), "CIFAR10": (3, 32, 32)}.items():
        for part, count in {"train": 70, "test": 5}.items():
            for label in range(10):
                (place := folder / name / part / str(label)).mkdir(parents=True)
                for number in range(count):
                    image = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
                    to_pil_image(image).save(place / f"{number}.png")
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_study_writes_its_table(name, pictures, tmp_path, monkeypatch):
    study = importlib.import_module(f"examples.studies.{name}")
    out = tmp_path / "results.md"
    shared = ["--data_dir", str(pictures), "--work", str(tmp_path / "work"), "--seeds", "0", "--out", str(out)]
    monkeypatch.setattr("sys.argv", [name, *shared, *COMMANDS[name]])
    study.main()
    title, *lines = out.read_text().splitlines()
    assert title.startswith("# ")
    assert any(line.startswith("Made by `") for line in lines)
    head = next(number for number, line in enumerate(lines) if line.startswith("|--"))
    assert lines[head + 1].startswith("| ")
    assert lines[head + 1].count("|") == lines[head - 1].count("|")

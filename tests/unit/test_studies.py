"""What the studies in examples/ are made of: their numbers against those worked out by hand."""

from __future__ import annotations

import argparse
import json

import lightning as L
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")


from examples.studies.common import (
    Cells,
    Classifier,
    Images,
    ShuffledWeights,
    Spent,
    fit,
    fit_arguments,
    grid,
    load,
    macs,
    paired_table,
    results,
)
from examples.studies.memory import areas_of
from examples.studies.structure_search import TrainedTwice
from lightning_prune import ChannelPruning, OneShot


def row(share, method, seed, accuracy, more=None):
    return {"removed": share, "method": method, "seed": seed, "accuracy": accuracy, "AUC": more}


def test_paired_table_by_hand():
    rows = [
        row(0.5, "ours", 0, 4.0, 0.9),
        row(0.9, "theirs", 0, 1.0),
        row(0.5, "theirs", 0, 3.0),
        row(0.5, "theirs", 1, 1.0),
        row(0.5, "ours", 1, 4.0, 0.7),
        row(0.5, "ours", 2, 7.0, 0.5),
    ]
    lines = paired_table(rows, ["removed"], "theirs", "accuracy", ["AUC"]).splitlines()
    assert lines[0] == (
        "| removed | method | seeds | accuracy, mean ± sd | minus theirs, mean ± standard error | AUC |"
    )
    assert lines[2:] == [
        "| 0.5 | ours | 3 | 5.00 ± 1.73 | +2.00 ± 1.00 | 0.70 |",  # seeds 0 and 1 have a pair: +1 and +3
        "| 0.5 | theirs | 2 | 2.00 ± 1.41 |  |  |",
        "| 0.9 | theirs | 1 | 1.00 |  |  |",
    ]


def test_finished_cells_are_not_done_again(tmp_path):
    done = []

    def work(key):
        done.append(key["method"])
        return {"accuracy": len(done)}

    options = argparse.Namespace(work=tmp_path / "new")
    first, second = {"method": "a", "setting": {"lr": 1}}, {"method": "b", "setting": {"lr": 1}}
    results([first], work, options)
    with (options.work / "cells.jsonl").open("a") as file:
        file.write('\n{"method": "b", "setting": {"lr": 1}, "accu')  # a process that was killed while it wrote
    found = results([second, first], work, options)
    assert done == ["a", "b"]
    assert found == [second | {"accuracy": 2}, first | {"accuracy": 1}]
    assert [json.dumps(one["accuracy"]) for one in Cells(options.work / "cells.jsonl")] == ["1", "2"]


def test_a_cell_that_fails_leaves_nothing(tmp_path):
    options = argparse.Namespace(work=tmp_path)
    with pytest.raises(ZeroDivisionError):
        results([{"method": "a"}], lambda key: {"accuracy": 1 / 0}, options)
    assert not list(Cells(tmp_path / "cells.jsonl"))


def test_grid_asks_for_the_dense_net_once():
    parser = fit_arguments("", ["dense", "l1"], ["small-conv"], epochs=3, train=10)
    options = parser.parse_args(["--data_dir", ".", "--work", ".", "--seeds", "4"])
    common = {"net": "small-conv", "seed": 4, "epochs": 3, "rate": 1e-3, "train": 10, "test": False}
    assert grid(options, "removed", [0.5, 0.7]) == [
        common | {"method": "dense", "removed": 0.0},
        common | {"method": "l1", "removed": 0.5},
        common | {"method": "l1", "removed": 0.7},
    ]


def test_rounds_without_a_prediction_or_a_choice_have_no_area():
    low, high = torch.tensor([0.2]), torch.tensor([0.8])
    none, all_ = torch.tensor([False]), torch.tensor([True])
    rounds = [
        {},
        {"a": {"predicted": low, "pruned": none}},
        {"a": {"predicted": low, "pruned": none}, "b": {"predicted": high, "pruned": all_}},
    ]
    assert areas_of(rounds) == [1.0]


def images(count: int) -> Images:
    pixels = torch.arange(4.0 * count).view(count, 1, 2, 2)
    return Images(pixels, torch.arange(count) % 2, torch.zeros(1, 1, 1), torch.ones(1, 1, 1), flip=False)


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def test_training_is_counted_at_the_widths_of_the_moment():
    module, spent = Classifier(net(), 1e-3), Spent()
    assert macs(module, torch.zeros(1, 1, 2, 2)) == 6 * (4 + 2)
    pruning = ChannelPruning("l2", 0.5, of="channels", schedule=OneShot(1, "epoch"))
    fit(module, images(10), 3, pruning, spent)
    assert spent.macs == 3 * 10 * (36 + 2 * 18)  # an epoch with six units, two with three


def test_random_floor_keeps_the_ratios():
    weights = {"a": torch.tensor([[3.0, -1.0], [0.0, 2.0]]), "b": torch.arange(8.0)}
    scores = ShuffledWeights().score(weights, None, torch.Generator().manual_seed(0))
    assert {name: sorted(score.flatten().tolist()) for name, score in scores.items()} == {
        "a": [0.0, 1.0, 2.0, 3.0],
        "b": list(range(8)),
    }
    assert scores["b"].tolist() != list(range(8))
    assert scores["a"].shape == (2, 2)


class Rates(L.Callback):
    def __init__(self):
        self.found = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.found.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_second_training_starts_at_the_full_rate():
    module, rates = TrainedTwice(net(), 1.0), Rates()
    module.first = 0.5
    fit(module, images(128 * 4), 1, rates)
    assert rates.found == pytest.approx([1.0, 0.5, 1.0, 0.5])


def test_digits_are_split_and_normalised(tmp_path):
    data = load("digits", tmp_path)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [1150, 287, 360]
    values, _ = data.train.__getitems__(range(1150))
    assert values.mean().item() == pytest.approx(0, abs=0.01)
    assert values.std().item() == pytest.approx(1, abs=0.01)
    few = load("digits", tmp_path, 100)
    assert len(few.train) == 100
    assert torch.equal(few.validation.images, data.validation.images)

"""Files of weights that hold no record of pruning load as far as their shapes tell."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

from lightning_prune import ConfigurationError, load_pruned
from tests.helpers import run

IMAGES = torch.rand(2, 2, 9, 9)


class Depthwise(L.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Conv2d(2, width, 3)
        self.multiplied = nn.Conv2d(width, 2 * width, 3, groups=width)
        self.transposed = nn.ConvTranspose2d(2 * width, 2 * width, 3, groups=2 * width)
        self.last = nn.Conv2d(2 * width, 4, 1)

    def forward(self, x):
        return self.last(self.transposed(self.multiplied(self.first(x))))


class Late(Depthwise):
    def __init__(self, width=8):
        L.LightningModule.__init__(self)
        self.width = width

    def configure_model(self):
        if not hasattr(self, "first"):
            Depthwise.__init__(self, self.width)


@pytest.mark.parametrize("wrapped", [True, False], ids=["in a checkpoint", "bare"])
@pytest.mark.parametrize("kind", [Depthwise, Late])
def test_groups_and_widths_are_derived(tmp_path, wrapped, kind):
    small = Depthwise(5).eval()
    weights = small.state_dict()
    torch.save({"state_dict": weights} if wrapped else weights, tmp_path / "small.pt")
    loaded = load_pruned(tmp_path / "small.pt", kind(8)).eval()
    assert torch.equal(run(loaded, IMAGES)[0], run(small, IMAGES)[0])
    assert (loaded.multiplied.groups, loaded.multiplied.in_channels, loaded.multiplied.out_channels) == (5, 5, 10)
    assert (loaded.transposed.groups, loaded.last.in_channels) == (10, 10)


def test_a_part_that_is_compiled_takes_names_without_it(tmp_path):
    small = Depthwise(5).eval()
    torch.save(small.state_dict(), tmp_path / "small.pt")
    compiled = Depthwise(8)
    compiled.last = torch.compile(compiled.last, backend="eager")
    loaded = load_pruned(tmp_path / "small.pt", compiled)
    assert torch.equal(loaded.last._orig_mod.weight, small.last.weight)


def test_without_hyperparameters_a_class_cannot_be_made(tmp_path):
    torch.save(Depthwise(5).state_dict(), tmp_path / "small.pt")
    with pytest.raises(ConfigurationError, match="no hyperparameters to make a Depthwise with: give an instance"):
        load_pruned(tmp_path / "small.pt", Depthwise)


def test_what_is_no_state_dict_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(ConfigurationError, match=r"other\.pt is neither a checkpoint of a LightningModule nor"):
        load_pruned(tmp_path / "other.pt", Depthwise())

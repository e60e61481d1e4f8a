"""What lies beyond a slice stays whole: the next batch may be longer than the one that the network was traced on."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_prune import ChannelPruning, OneShot
from lightning_prune.surgery import trace
from tests.helpers import Net

LONGEST, WIDTH, LENGTH = 64, 12, 8
TABLES = {
    "rows": lambda n, t: n.table[:t],
    "rows of a batch": lambda n, t: n.table.unsqueeze(0)[:, :t],
    "the last rows": lambda n, t: n.table[-t:],
    "every other row": lambda n, t: n.table[::2][:t],
    "columns": lambda n, t: n.table.t()[:, :t].t(),
    "rows of what is computed": lambda n, t: n.project(n.table)[:t],
    "rows the other way round": lambda n, t: n.table.flip(0)[:t],
    "a flat table": lambda n, t: n.table.flatten()[: t * WIDTH].view(t, WIDTH),
    "the first part": lambda n, t: n.table.tensor_split([t])[0],
    "the first of two parts": lambda n, t: n.table.split([t, LONGEST - t])[0],
    "normalised rows": lambda n, t: n.table.softmax(1)[:t],
}


class Sequences(L.LightningModule):
    """Features with positions, or attention under a mask; sequences of any length."""

    def __init__(self, positions=None):
        super().__init__()
        self.positions = positions
        self.first, self.project, self.last = nn.Linear(6, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.table = nn.Parameter(torch.randn(LONGEST, WIDTH))
        self.register_buffer("mask", torch.ones(1, LONGEST, LONGEST).tril().bool())

    def forward(self, x):
        h = self.first(x)
        if self.positions is None:
            allowed = self.mask[:, : x.shape[1], : x.shape[1]]
            h = (h @ h.mT).masked_fill(~allowed, -1e9).softmax(-1) @ h
        else:
            h = h + self.positions(self, x.shape[1])
        return self.last(h)

    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self(batch), batch.new_zeros(()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def long_dims(graph):
    return {(slot.tensor, slot.dim) for group in graph.groups.values() for slot in group.slots} & {
        ("table", 0), ("mask", 1), ("mask", 2)
    }  # fmt: skip


@pytest.mark.parametrize("positions", [*TABLES.values(), None], ids=[*TABLES, "a causal mask"])
def test_no_row_of_a_table_goes(positions):
    net = Sequences(positions)
    assert not long_dims(trace(net, torch.randn(2, LENGTH, 6)))


def test_pieces_that_are_all_read_can_go():
    """Also where each slice leaves out the others."""

    def forward(net, x):
        h, width = net.a(x), net.b.in_features
        return net.b(h[:, :width] * h[:, width : 2 * width]) + net.c(h[:, 2 * width :])

    graph = trace(Net(forward, a=nn.Linear(6, 12), b=nn.Linear(4, 3), c=nn.Linear(4, 3)), torch.randn(5, 6))
    assert sorted(group.width for group in graph.groups.values()) == [4, 4]
    assert not any(path.startswith("a.weight (dim 0") for path, _ in graph.refused)


def test_pieces_that_meet_in_a_product_can_go():
    """Nothing but one another reads them."""

    def forward(net, x):
        h, half = net.a(x), net.a.out_features // 2
        return h[:, :half] @ h[:, half:].mT

    graph = trace(Net(forward, a=nn.Linear(6, 12)), torch.randn(5, 6))
    assert [group.width for group in graph.groups.values()] == [6]


def test_longer_batches_than_the_first_find_their_positions(tmp_path):
    module = Sequences(TABLES["rows"])
    batches = [torch.randn(2, length, 6) for length in (6, 20, 9, 64)]
    callback = ChannelPruning(remove=0.5, of="channels", schedule=OneShot(1, "step"))
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_epochs=2, callbacks=[callback], accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert module.table.shape == (LONGEST, WIDTH // 2)

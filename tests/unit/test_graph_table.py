"""What ``print(graph)`` tells of a network."""

from __future__ import annotations

import torch
from torch import nn

from lightning_prune import trace


class Stream(nn.Module):
    """Several layers that add to one stream; their names may be long."""

    def __init__(self, layers, prefix="layer"):
        super().__init__()
        self.own = nn.Parameter(torch.randn(6, 4))
        for number in range(layers):
            self.add_module(f"{prefix}{number}", nn.Linear(4, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        added = [module(x) for name, module in self.named_children() if name != "head"]
        return self.head((sum(added) + x @ self.own.T).relu())


def test_the_table_names_all_makers_of_a_group():
    graph = trace(Stream(2), torch.randn(3, 4))
    (group,) = graph.groups.values()
    assert set(group.makers) == {"own", "layer0", "layer1"}
    assert group.name in group.makers
    header, row = graph.table().splitlines()[:2]
    assert header.endswith("also made by")
    assert set(row.split("  ")[-1].split(", ")) == set(group.makers) - {group.name}


def test_no_column_of_makers_where_every_group_has_one():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert "also made by" not in trace(net, torch.randn(3, 4)).table()


def test_many_makers_with_long_names_fit_100_columns():
    graph = trace(Stream(30, "a_layer_with_quite_a_long_name_that_goes_on_and_on_up_to_its_number_"), torch.randn(3, 4))
    lines = graph.table().splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[1].endswith(" and 29 more")

from __future__ import annotations

import time

import lightning as L
import pytest
import torch
from torch import nn

from lightning_prune import ChannelPruning, OneShot
from lightning_prune.cost import (
    CostModel,
    checkpoint_bytes,
    count_macs,
    count_parameters,
    measure_latency,
)
from lightning_prune.errors import PruneError
from lightning_prune.graph.channels import ChannelGraph, Extent, Operation

BATCH = 2


def fixed(*sizes: int) -> tuple[Extent, ...]:
    return tuple(Extent(size) for size in sizes)


def of(group: str, count: int = 1, plus: int = 0) -> Extent:
    return Extent(plus, ((group, count),))


def net(a: int, b: int) -> nn.Sequential:
    """Convolutions of widths a and b, the second one strided, then a linear layer over 4 x 4 positions."""
    return nn.Sequential(
        nn.Conv2d(3, a, 3, padding=1),
        nn.BatchNorm2d(a),
        nn.ReLU(),
        nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False),
        nn.ConvTranspose2d(b, b, 2, stride=2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(b * 16, 10),
    )


def graph_of_net() -> ChannelGraph:
    convolution = torch.ops.aten.convolution
    images, hidden, small = fixed(BATCH, 3, 8, 8), (Extent(BATCH), of("a"), *fixed(8, 8)), (of("b"), *fixed(4, 4))
    tensors = {
        "0.weight": (of("a"), *fixed(3, 3, 3)),
        "0.bias": (of("a"),),
        "1.weight": (of("a"),),
        "1.bias": (of("a"),),
        "1.running_mean": (of("a"),),
        "1.running_var": (of("a"),),
        "3.weight": (of("b"), of("a"), *fixed(3, 3)),
        "4.weight": (of("b"), of("b"), *fixed(2, 2)),
        "4.bias": (of("b"),),
        "7.weight": (Extent(10), of("b", 16)),
        "7.bias": fixed(10),
    }
    operations = (
        Operation(
            convolution,
            (images, tensors["0.weight"], tensors["0.bias"], [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
            hidden,
        ),
        Operation(
            convolution,
            (hidden, tensors["3.weight"], None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1),
            (Extent(BATCH), *small),
        ),
        Operation(
            convolution,
            ((Extent(BATCH), *small), tensors["4.weight"], tensors["4.bias"], [2, 2], [0, 0], [1, 1], True, [0, 0], 1),
            (Extent(BATCH), of("b"), *fixed(8, 8)),
        ),
        Operation(
            torch.ops.aten.addmm,
            (tensors["7.bias"], (Extent(BATCH), of("b", 16)), (of("b", 16), Extent(10))),
            fixed(BATCH, 10),
        ),
    )
    return ChannelGraph(groups={}, tensors=tensors, operations=operations, batch_size=BATCH)


@pytest.mark.parametrize(("a", "b"), [(8, 6), (5, 1), (1, 9)])
def test_the_prediction_equals_the_count_on_the_network_built_at_those_widths(a: int, b: int) -> None:
    built = net(a, b)
    model = CostModel(graph_of_net(), [name for name, _ in built.named_parameters()])
    assert model.parameters({"a": a, "b": b}) == count_parameters(built)
    images = torch.zeros(BATCH, 3, 8, 8)
    assert model.macs({"a": a, "b": b}) == count_macs(lambda: built.eval()(images), BATCH)


def test_macs_by_hand() -> None:
    model = CostModel(graph_of_net(), [])
    expected = 64 * 27 * 8 + 16 * 9 * 8 * 6 + 16 * 4 * 6 * 6 + 96 * 10
    assert model.macs({"a": 8, "b": 6}) == expected
    assert model.channels({"a": 8, "b": 6}) == 14
    assert model.parameters({"a": 8, "b": 6}) == 0


def test_hundreds_of_operators_are_cheap() -> None:
    small = graph_of_net()
    graph = ChannelGraph({}, (), small.tensors, small.operations * 100, BATCH)
    model = CostModel(graph, list(small.tensors))
    start = time.process_time()
    for width in range(1, 51):
        model.macs({"a": width, "b": width})
    assert time.process_time() - start < 2


def test_an_unknown_parameter_is_named() -> None:
    with pytest.raises(PruneError, match=r"no size for 9\.weight"):
        CostModel(graph_of_net(), ["9.weight"])


def test_an_operator_without_formula_is_named() -> None:
    graph = ChannelGraph({}, operations=(Operation(torch.ops.aten.relu, (fixed(2),), fixed(2)),))
    with pytest.raises(PruneError, match=r"aten\.relu"):
        CostModel(graph, [])


def test_shared_parameters_count_once() -> None:
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert count_parameters(tied) == 16


def test_latency_is_the_median_of_the_calls_after_warmup() -> None:
    delays = [0.2, 0.0, 0.06, 0.02]
    calls = iter(delays)
    assert 0.02 <= measure_latency(lambda: time.sleep(next(calls)), repeats=3, warmup=1) < 0.05


def test_checkpoint_bytes_equals_the_file(tmp_path) -> None:
    state = net(8, 6).state_dict()
    torch.save(dict(state), tmp_path / "file.pt")
    assert checkpoint_bytes(state) == pytest.approx((tmp_path / "file.pt").stat().st_size, rel=0.02)


class Taught(L.LightningModule):
    """Runs a teacher beside itself, and itself twice."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2))
        self.teacher = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 2)).requires_grad_(False)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self(batch) + self(-batch), self.teacher(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


@pytest.mark.parametrize(("example", "before", "reached"), [(None, 480, 0.5), (torch.zeros(3, 6), 80, 0.5)])
def test_macs_are_those_of_forward_where_there_is_an_example_of_its_input(example, before, reached, tmp_path):
    """By hand: 6 * 10 + 10 * 2 for the net, which the step runs twice, and 6 * 40 + 40 * 2 for the teacher."""
    module = Taught()
    module.example_input_array = example
    callback = ChannelPruning(remove=0.5, schedule=OneShot(1, "step"))
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_epochs=1, callbacks=[callback], accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(16, 6), batch_size=4))
    assert callback.report.before.macs == before
    assert callback.report.reached == pytest.approx(reached, abs=0.05)
    if example is not None:
        assert module.net[0].out_features == 5

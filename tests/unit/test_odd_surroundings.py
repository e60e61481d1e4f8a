"""Networks met in the middle of something: in inference mode, with inputs that are written to, under autocast."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_prune import ConfigurationError, shrink, trace
from lightning_prune.graph.one_way import decomposed
from tests.helpers import Net, random_keep


def layers(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *middle, nn.ReLU(), nn.Linear(8, 3))


def cut(model, *inputs):
    """The widths of the groups that are found and half removed."""
    graph = trace(model, inputs)
    shrink(model, graph, random_keep(graph))
    return list(graph.widths.values())


class Shifted(nn.Module):
    """Adds a buffer, or a tensor that is not registered."""

    def __init__(self, make, register=True):
        super().__init__()
        if register:
            self.register_buffer("shift", make())
        else:
            self.shift = make()

    def forward(self, x):
        return x + self.shift


@torch.inference_mode()
def in_a_validation():
    return torch.arange(8.0)


@pytest.mark.parametrize("register", [True, False])
def test_a_tensor_made_in_inference_mode_is_cut_along(register):
    model = layers(Shifted(in_a_validation, register))
    model[0].weight.grad = torch.ones(8, 4)
    assert cut(model, torch.randn(2, 4)) == [8]
    assert model[1].shift.shape == (4,)
    assert torch.equal(model[0].weight.grad, torch.ones(4, 4))


def test_an_expanded_buffer_is_no_obstacle():
    model = layers(Shifted(lambda: torch.zeros(1).expand(8)))
    trace(model, torch.randn(2, 4))
    assert model[1].shift.stride() == (0,)


def test_inputs_that_the_network_writes_to_stay_as_they_are():
    model = Net(lambda net, x: net.inner(x.div_(2)), inner=layers())
    x = torch.randn(2, 4)
    before = x.clone()
    assert cut(model, x) == [8]
    assert torch.equal(x, before)


def test_the_same_tensor_given_twice_is_the_same_in_each_run():
    model = Net(lambda net, x, y: net.inner(x if x is y else x[:, :0]), inner=layers())
    x = torch.randn(2, 4)
    assert cut(model, x, x) == [8]


def test_a_trace_under_autocast_finds_what_there_is():
    with torch.autocast("cpu", torch.bfloat16):
        model = layers()
        for _ in range(2):
            assert list(trace(model, torch.randn(2, 4)).widths.values()) == [8]


def test_a_parametrization_may_make_tensors_of_its_own():
    class Halved(nn.Module):
        def forward(self, weight):
            return weight * torch.full((weight.shape[1],), 0.5)

    model = layers()
    parametrize.register_parametrization(model[2], "weight", Halved())
    assert cut(model, torch.randn(2, 4)) == [8]
    assert model[2].weight.shape == (3, 4)


def test_a_parametrization_that_takes_one_width_alone_keeps_it():
    class Particular(nn.Module):
        def forward(self, weight):
            if weight.shape[1] != 8:
                raise ValueError("eight, please")
            return weight

    model = layers()
    parametrize.register_parametrization(model[2], "weight", Particular())
    assert list(trace(model, torch.randn(2, 4)).widths) == []


def test_batch_norms_that_would_ask_other_processes_are_followed():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8), nn.ReLU(), nn.Conv2d(8, 2, 2))
    model = Net(lambda net, x: net.layers(x) if net.training else net.alone(x), layers=layers, alone=nn.Conv2d(3, 2, 4))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match="SyncBatchNorm expected"):
            model(torch.randn(2, 3, 4, 4))
        assert list(trace(model, torch.randn(2, 3, 4, 4)).widths) == ["layers.0"]
    finally:
        torch.distributed.destroy_process_group()
    assert nn.SyncBatchNorm.forward is not nn.BatchNorm2d.forward


def test_outputs_are_compared_without_tensor_float_32():
    seen = []

    def forward(net, x):
        seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return net.inner(x)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        cut(Net(forward, inner=layers()), torch.randn(2, 4))
        assert set(seen) == {(True, "high"), (False, "highest")}
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (True, "high")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has the older settings only")
def test_so_they_are_where_the_newer_settings_were_used():
    seen = []
    convolutions = torch.backends.cudnn.conv

    def forward(net, x):
        seen.append(convolutions.fp32_precision)
        return net.inner(x)

    before, other = convolutions.fp32_precision, torch.backends.cudnn.rnn.fp32_precision
    convolutions.fp32_precision, torch.backends.cudnn.rnn.fp32_precision = "tf32", "ieee"
    try:
        cut(Net(forward, inner=layers()), torch.randn(2, 4))
        assert set(seen) == {"tf32", "ieee"}
        assert convolutions.fp32_precision == "tf32"
    finally:
        convolutions.fp32_precision, torch.backends.cudnn.rnn.fp32_precision = before, other


class Executed(TorchDispatchMode):
    """Takes down which operators run on which devices."""

    def __init__(self):
        super().__init__()
        self.operators = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        self.operators.setdefault(func._overloadpacket._qualified_op_name, set()).update(devices)
        return result


@pytest.mark.parametrize(
    "layer", [lambda: nn.LSTM(3, 4), lambda: nn.GRU(3, 4), lambda: nn.LSTMCell(3, 4), lambda: nn.RMSNorm(3)]
)
def test_what_has_a_kernel_of_its_own_on_a_gpu_is_followed_on_the_cpu(layer):
    """No GPU is needed: the tensors are fakes, which know where they are and what runs there."""

    class Nothing:
        def is_made_up(self, tensor):
            return False

    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        model, x = layer(), torch.empty(2, 3)
        with decomposed(Nothing()), Executed() as executed:
            result = tree_leaves(model(x))
    assert {leaf.device.type for leaf in result} == {"cuda"}
    assert not [name for name in executed.operators if "cudnn" in name or "fused" in name]


@pytest.mark.parametrize("tie", ["transposed", "data"])
def test_parameters_that_share_memory_stay_whole_and_tied(tie):
    encoder, decoder = nn.Linear(6, 8), nn.Linear(8, 6)
    if tie == "transposed":
        decoder.weight = nn.Parameter(encoder.weight.detach().t())
    else:
        decoder = nn.Linear(6, 8)
        decoder.weight.data = encoder.weight.data
    model = nn.Sequential(
        encoder, nn.ReLU(), *([nn.Linear(8, 6)] if tie == "data" else []), decoder, nn.Linear(decoder.out_features, 2)
    )
    graph = trace(model, torch.randn(2, 6))
    name = "3.weight" if tie == "data" else "2.weight"
    reasons = {refusal.path.partition(" ")[0]: refusal.reason for refusal in graph.refused}
    assert reasons["0.weight"].startswith(f"shares memory with {name}")
    assert all(slot.tensor not in ("0.weight", name) for group in graph.groups.values() for slot in group.slots)


def test_parameters_side_by_side_in_one_piece_of_memory_are_cut():
    model = layers()
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    for parameter in model.parameters():
        here, flat = flat[: parameter.numel()], flat[parameter.numel() :]
        parameter.data = here.view_as(parameter)
    assert cut(model, torch.randn(2, 4)) == [8]


def test_inputs_that_do_not_fit_are_refused_with_the_remedy():
    model = Net(lambda net, batch: net.inner(batch["x"]), inner=layers())
    with pytest.raises(
        ConfigurationError, match=r"Sequential\.forward does not take these example inputs.*wrap it: \(inputs,\)"
    ):
        trace(layers(), {"x": torch.randn(2, 4)})
    assert cut(model, {"x": torch.randn(2, 4)}) == [8]

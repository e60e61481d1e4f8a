"""Channels seen while the network runs, against what forward hooks see and against plain arithmetic."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_prune import PruneError, TraceError, trace
from lightning_prune.graph.activations import watch
from lightning_prune.graph.program import module_programs
from lightning_prune.probe import Probe
from tests.fits import Residual, surface
from tests.helpers import Net, randomise


def watched(model, traced, seen=None, norms="exact"):
    """Readings on ``seen`` of a model that was traced on other data."""
    graph, found = trace(model, traced, norms=norms), []
    watch(graph, module_programs(model, traced if seen is None else seen)[0], found.append)
    return graph, found


def residual_net():
    parts = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), Residual(6), Residual(6)]
    return nn.Sequential(*parts, nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))


def depthwise_net():
    depthwise = nn.Conv2d(4, 4, 3, groups=4)
    return nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU6(), depthwise, nn.ReLU6(), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1))


def mlp():
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))


def transformer_mlp():
    """Two blocks of the MLP half of a transformer, on sequences."""

    def block(net, x):
        for norm, into, out in ((net.n1, net.a1, net.b1), (net.n2, net.a2, net.b2)):
            x = x + out(nn.functional.gelu(into(norm(x))))
        return net.head(x)

    parts = {"n1": nn.LayerNorm(6), "a1": nn.Linear(6, 8), "b1": nn.Linear(8, 6)}
    parts |= {"n2": nn.LayerNorm(6), "a2": nn.Linear(6, 8), "b2": nn.Linear(8, 6), "head": nn.Linear(6, 2)}
    return Net(lambda net, x: block(net, net.into(x)), into=nn.Linear(3, 6), **parts)


IMAGES, VECTORS, SEQUENCES = torch.randn(5, 2, 10, 10), torch.randn(5, 3), torch.randn(5, 7, 3)
NETS = {
    "residual": (residual_net, IMAGES, "exact"),
    "depthwise": (depthwise_net, IMAGES, "exact"),
    "mlp": (mlp, VECTORS, "exact"),
    "transformer": (transformer_mlp, SEQUENCES, "exact"),
    "transformer-norms": (transformer_mlp, SEQUENCES, "approximate"),
}  # fmt: skip


def hooked(model, inputs, graph):
    """What the modules that own a consumer slot are given, as ``(group, tensor, channels)`` in order."""
    seen = []
    slots = [(name, slot) for name, group in graph.groups.items() for slot in group.with_role("consumer")]
    for name, slot in slots:

        def hook(module, given, name=name, slot=slot):
            data = given[0] if given[0].dim() == 4 else given[0].flatten(0, -2)
            units, entries = slot.index.shape
            channels = data[:, slot.index.flatten()].reshape(len(data), units, entries, -1).flatten(2)
            seen.append((name, slot.tensor, channels))

        model.get_submodule(slot.tensor.rpartition(".")[0]).register_forward_pre_hook(hook)
    with torch.no_grad():
        model.eval()(inputs)
    return seen


@pytest.mark.parametrize("kind", NETS)
def test_what_is_read_is_what_the_reading_modules_are_given(kind):
    build, inputs, norms = NETS[kind]
    model = randomise(build()).train()
    graph, readings = watched(model, inputs, norms=norms)
    expected = hooked(model, inputs, graph)
    assert {reading.group for reading in readings} == set(graph.groups)
    assert [(r.group, r.slot.tensor) for r in readings] == [(name, tensor) for name, tensor, _ in expected]
    for reading, (_, _, channels) in zip(readings, expected, strict=True):
        torch.testing.assert_close(reading.channels, channels)


def test_a_residual_stream_is_handed_out_to_all_of_its_readers():
    _, readings = watched(residual_net(), IMAGES)
    assert [r.slot.tensor for r in readings if r.group == "0"] == ["3.expand.weight", "4.expand.weight", "5.weight"]


def test_maps_keep_height_and_width_until_something_flattens_them():
    _, readings = watched(residual_net(), IMAGES)
    maps = {reading.slot.tensor: tuple(reading.maps.shape[1:]) for reading in readings}
    assert maps["3.project.weight"] == (12, 1, 10, 10)
    assert maps["8.weight"] == (4, 16)  # 16 positions of each unit in a flat vector


def test_raw_parameters_in_plain_functions_are_readers():
    def forward(net, x):
        hidden = torch.relu(net.first @ x.T)  # channels first, samples second
        return (net.second @ hidden).T

    model = Net(forward, first=nn.Parameter(torch.randn(4, 3)), second=nn.Parameter(torch.randn(2, 4)))
    _, (reading,) = watched(model, VECTORS)
    assert (reading.slot.tensor, reading.slot.dim, reading.response.shape) == ("second", 1, (2, 5))
    torch.testing.assert_close(reading.channels, torch.relu(VECTORS @ model.first.T)[:, :, None])
    weights = torch.randn(2, 5)
    expected = reading.channels[:, :, 0] * (weights.T @ model.second)
    torch.testing.assert_close(reading.contributions(weights), expected.detach())


def test_a_weight_that_is_worked_out_goes_by_its_parameter():
    masked = Net(
        lambda net, x: nn.functional.linear(net.first(x).relu(), net.mask * net.weight),
        first=nn.Linear(3, 4), mask=torch.ones(2, 4), weight=nn.Parameter(torch.randn(2, 4)),
    )  # fmt: skip
    _, (reading,) = watched(masked, VECTORS)
    assert reading.slot.tensor == "weight"
    _, (reading,) = watched(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), weight_norm(nn.Linear(4, 2))), VECTORS)
    assert reading.slot.tensor == "2.parametrizations.weight.original1"


def test_a_buffer_that_data_was_written_to_is_data():
    model = Net(
        lambda net, x: net.second(net.state.copy_(net.first(x))),
        first=nn.Linear(3, 4), state=torch.zeros(5, 4), second=nn.Linear(4, 2),
    )  # fmt: skip
    channels, graph, program = [], trace(model, VECTORS), module_programs(model, VECTORS)[0]
    watch(graph, program, lambda reading: channels.append(reading.channels[:, :, 0]))  # before the buffer is restored
    torch.testing.assert_close(channels, [model.first(VECTORS).detach()])


def test_a_recurrent_weight_reads_at_each_step():
    def forward(net, x):
        state = net.start(x[:, 0])
        for step in range(3):
            state = torch.tanh(net.into(x[:, step]) + net.onward(state))
        return net.out(state)

    parts = {"start": nn.Linear(3, 4), "into": nn.Linear(3, 4), "onward": nn.Linear(4, 4), "out": nn.Linear(4, 2)}
    graph, readings = watched(Net(forward, **parts), SEQUENCES)
    assert len(graph.groups) == 1
    assert [reading.slot.tensor for reading in readings] == ["onward.weight"] * 3 + ["out.weight"]


def test_what_no_parameter_reads_is_not_handed_out():
    def attention(net, x):
        return net.out(torch.softmax(net.query(x) @ net.key(x).mT, -1) @ net.value(x))

    parts = {name: nn.Linear(3, 4) for name in ("query", "key", "value")}
    graph, readings = watched(Net(attention, **parts, out=nn.Linear(4, 2)), SEQUENCES)
    assert [reading.group for reading in readings] == ["value"]
    assert len(graph.groups) == 2


def test_batches_of_another_size_are_read_too():
    model = randomise(residual_net())
    _, readings = watched(model, IMAGES, torch.randn(2, 2, 10, 10))
    assert len(readings) == len(watched(model, IMAGES)[1])
    assert {reading.channels.shape[0] for reading in readings} == {2}


def test_a_mean_over_images_with_channels_last_is_read_as_any_other():
    # There torch executes one operator more, for the strides alone, which the dry run of the trace does not see.
    parts = nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    model = nn.Sequential(*parts).to(memory_format=torch.channels_last)
    graph, readings = watched(model, IMAGES)
    _, others = watched(model.to(memory_format=torch.contiguous_format), IMAGES)
    assert list(graph.groups) == ["0"]
    torch.testing.assert_close([r.data for r in readings], [r.data for r in others])


@pytest.mark.parametrize("negative", [True, False])
def test_another_course_is_an_error(negative):
    def forward(net, x):
        hidden = net.first(x)
        if x.sum() > 0:
            hidden = hidden.relu()
        return net.second(hidden)

    model = Net(forward, first=nn.Linear(3, 4), second=nn.Linear(4, 2))
    inputs = torch.ones(5, 3)
    first, second = (inputs, -inputs) if negative else (-inputs, inputs)
    with pytest.raises(TraceError, match=r"forward \(evaluation mode\) takes another course on this batch.*'l2'"):
        watched(model, first, second)


def test_an_early_end_is_an_error():
    model = Net(lambda net, x: net.first(x) if x.sum() < 0 else net.second(net.first(x)), first=nn.Linear(3, 3))
    model.second = nn.Linear(3, 2)
    with pytest.raises(TraceError, match="ends before"):
        watched(model, torch.ones(5, 3), -torch.ones(5, 3))


def test_a_program_that_was_not_traced_is_an_error():
    graph = trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), VECTORS)
    program = module_programs(nn.Linear(3, 2), VECTORS)[0]
    object.__setattr__(program, "name", "predict (evaluation mode)")
    with pytest.raises(TraceError, match=r"predict \(evaluation mode\) could not be run when the network was traced"):
        watch(graph, program, print)


def test_a_failing_observer_is_not_taken_for_the_network():
    def observer(reading):
        raise KeyError("mine")

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(PruneError, match=r"channel group '0', where it is read with '1\.weight', failed with KeyError"):
        watch(trace(model, VECTORS), module_programs(model, VECTORS)[0], observer)


@pytest.mark.parametrize(
    ("reader", "shape"),
    [
        (nn.Conv2d(4, 3, 3, stride=2, padding=1), (2, 1, 6, 6)),
        (nn.ConvTranspose2d(4, 3, 3, stride=2), (2, 1, 6, 6)),
        (nn.Linear(4, 3), (2, 1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_contributions_are_what_is_missing_without_a_unit(reader, shape):
    maker = nn.Conv2d(1, 4, 1) if len(shape) == 4 else nn.Linear(1, 4)
    model, found = nn.Sequential(maker, nn.ReLU(), reader), []
    inputs = torch.randn(shape)
    weights = torch.randn(model(inputs).shape)
    graph = trace(model, inputs)
    program = module_programs(model, inputs)[0]
    watch(graph, program, lambda reading: found.append(reading.contributions(weights)))
    with torch.no_grad():
        hidden = model[:2](inputs)
        for unit in range(4):
            without = hidden.clone()
            without[:, unit] = 0
            missing = ((reader(hidden) - reader(without)) * weights).flatten(1).sum(1)
            torch.testing.assert_close(found[0][:, unit], missing)


class Noisy(L.LightningModule):
    example_input_array = torch.randn(4, 3)

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2))
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        return self.net(x) + torch.rand(())


def test_nothing_is_left_behind():
    module = Noisy().train()
    probe = Probe(None, module)
    graph = trace(module, module.example_input_array, *probe.programs())
    before = surface(module), {name: value.clone() for name, value in module.state_dict().items()}
    random_state = torch.get_rng_state()
    readings = []
    for program in probe.evaluations(3):
        watch(graph, program, lambda reading: readings.append(reading.contributions(torch.ones(4, 2))))
    assert len(readings) == 1
    assert surface(module) == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert module.net[2].training
    assert all(parameter.grad is None for parameter in module.parameters())

"""What goes is handed over to what stays: against closed forms, and where nothing may change at all."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_prune import shrink, trace
from lightning_prune.graph.channels import Slot
from lightning_prune.graph.program import module_programs
from lightning_prune.graph.tracer import named_leaves
from lightning_prune.surgery.mixing import Receiver
from lightning_prune.surgery.readers import observe
from lightning_prune.surgery.regression import Regression, regress, unexplained
from lightning_prune.surgery.reparameterise import absorb, hand_over, kernels, put_back
from tests.fits import Residual
from tests.helpers import HalfPrecision, Net, randomise, run

GONE = torch.tensor([False, True, False, True, False])


def moments(x):
    """Mean and mean products of ``[entries, units, samples]``."""
    return x.mean(2), x @ x.mT / x.shape[2]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_regression_is_the_least_squares_solution(centred, ridge):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 40, dtype=torch.float64) + torch.arange(5)[:, None]
    found = regress(*moments(x), GONE, ~GONE, ridge, centred)
    for entry in range(2):
        inputs, outputs = x[entry, ~GONE].T, x[entry, GONE].T
        shifts = (inputs.mean(0), outputs.mean(0)) if centred else (torch.zeros(3), torch.zeros(2))
        inputs, outputs = inputs - shifts[0], outputs - shifts[1]
        # A ridge is the same as more samples, on which each input alone is on and the output is zero.
        strength = (40 * ridge * inputs.square().mean()) ** 0.5
        rows = torch.cat([inputs, strength * torch.eye(3, dtype=torch.float64)])
        solution = torch.linalg.lstsq(rows, torch.cat([outputs, torch.zeros(3, 2, dtype=torch.float64)])).solution
        torch.testing.assert_close(found.slopes[entry], solution.T)
        torch.testing.assert_close(found.constants[entry], shifts[1] - solution.T.double() @ shifts[0].double())


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_what_all_others_leave_unexplained_is_the_residual_of_least_squares(centred, ridge):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 40, dtype=torch.float64) + torch.arange(5)[:, None]
    x[:, 1] += 2 * x[:, 0]
    x[1, 4] = 0  # never varies
    found = unexplained(*moments(x), ridge, centred)
    for entry in range(2):
        seen = x[entry] - x[entry].mean(1, keepdim=True) if centred else x[entry]
        strength = (40 * ridge * seen.square().mean()) ** 0.5
        for unit in range(5):
            others, own = seen[torch.arange(5) != unit].T, seen[unit]
            rows = torch.cat([others, strength * torch.eye(4, dtype=torch.float64)])
            aims = torch.cat([own, torch.zeros(4, dtype=torch.float64)])
            slopes = torch.linalg.lstsq(rows, aims[:, None], driver="gelsd").solution
            left = (rows @ slopes - aims[:, None]).square().sum() / own.square().sum()
            expected = left if own.any() else torch.ones(())
            torch.testing.assert_close(found[entry, unit], expected.double())


def test_units_that_never_vary_take_over_nothing_but_a_constant():
    x = torch.tensor([[[1.0, 1.0, 1.0], [2.0, 3.0, 4.0]]])
    found = regress(*moments(x), torch.tensor([False, True]), torch.tensor([True, False]))
    torch.testing.assert_close(found.slopes, torch.zeros(1, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(found.constants, torch.full((1, 1), 3.0, dtype=torch.float64))


def test_kernels_are_arranged_by_unit_entry_and_output():
    weight = torch.arange(2.0 * 6 * 3).reshape(2, 6, 3)  # outputs, units of two entries, positions
    slot = Slot("w", 1, torch.tensor([[0, 3], [1, 4], [2, 5]]), "consumer")
    found = kernels(weight, slot, [0])
    assert found.shape == (3, 2, 2, 3)
    torch.testing.assert_close(found[1, 0], weight[:, 1])
    torch.testing.assert_close(found[2, 1], weight[:, 5])


def test_absorption_by_hand():
    slot = Slot("w", 0, torch.tensor([[0], [1], [2]]), "consumer")
    tensors = {"w": torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]), "mean": torch.zeros(2)}
    gone = torch.tensor([False, False, True])
    known = Regression(torch.tensor([[[0.5, 2.0]]]), torch.ones(1, 1))
    absorb(tensors, slot, [1], Receiver("mean", -1), torch.tensor([1.0, 0.5]), gone, ~gone, known)
    assert tensors["w"].tolist() == [[51.0, 102.0], [210.0, 420.0], [100.0, 200.0]]
    assert tensors["mean"].tolist() == [-100.0, -100.0]


def dependent(layer):
    """Make the last unit of a layer twice the first minus the second, plus 0.5."""
    with torch.no_grad():
        layer.weight[-1] = 2 * layer.weight[0] - layer.weight[1]
        layer.bias[-1] = 2 * layer.bias[0] - layer.bias[1] + 0.5


def without_unit(model, inputs, group, unit=-1, handed=True):
    """Outputs before and after one unit of a group is removed."""
    graph = trace(model, inputs)
    keep = {group: torch.ones(graph.groups[group].width, dtype=torch.bool)}
    keep[group][unit] = False
    before = run(model, inputs)
    if handed:
        tensors = named_leaves(model)
        readers = observe(graph, module_programs(model, inputs)[:1], tensors)
        alive = {name: torch.ones(width, dtype=torch.bool) for name, width in graph.widths.items()}
        hand_over([tensors], readers, keep, alive, ridge=1e-12)
    shrink(model, graph, keep)
    return before[0], run(model, inputs)[0]


IMAGES, VECTORS, SEQUENCES = torch.randn(30, 2, 6, 6), torch.randn(200, 3), torch.randn(20, 9, 3)
CASES = {
    "convolution": (lambda: [nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 3, stride=2)], IMAGES),
    "transposed": (lambda: [nn.Conv2d(2, 4, 1), nn.ConvTranspose2d(4, 3, 1)], IMAGES),
    "linear": (lambda: [nn.Linear(3, 4), nn.Linear(4, 2)], VECTORS),
    "sequences": (lambda: [nn.Linear(3, 4), nn.Linear(4, 2)], SEQUENCES),
    "flattened": (lambda: [nn.Conv2d(2, 4, 4), nn.Flatten(), nn.Linear(36, 3)], IMAGES),
    "norm behind": (lambda: [nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 3, bias=False), nn.BatchNorm2d(3)], IMAGES),
    "norm between": (lambda: [nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 3, 3)], IMAGES),
    "vector norm behind": (lambda: [nn.Linear(3, 4), nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5)], VECTORS),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_to_remove_what_the_others_can_tell_changes_nothing(kind):
    torch.manual_seed(1)
    build, inputs = CASES[kind]
    model = randomise(nn.Sequential(*build())).double().eval()
    dependent(model[0])
    bare = copy.deepcopy(model)
    before, after = without_unit(model, inputs.double(), "0")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    before, after = without_unit(bare, inputs.double(), "0", handed=False)
    assert (after - before).abs().max() > 0.05


@pytest.mark.parametrize("kind", CASES)
def test_under_autocast_as_much_is_handed_over(kind):
    torch.manual_seed(1)
    build, shaped = CASES[kind]
    model, inputs = randomise(HalfPrecision(*build())).eval(), torch.randn(shaped.shape)
    dependent(model[0])
    bare = copy.deepcopy(model)
    before, after = without_unit(model, inputs, "0")
    handed = (after - before).abs().max()  # numbers are rounded to eight bits
    before, after = without_unit(bare, inputs, "0", handed=False)
    assert handed < 0.1 * (after - before).abs().max()


@pytest.mark.parametrize(
    "reader",
    [nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(4, 3, 3, padding=2, stride=2), nn.ConvTranspose2d(4, 3, 2, stride=2)],
    ids=["padding", "strides", "transposed"],
)
def test_of_a_constant_channel_the_mean_of_its_outputs_is_left(reader):
    model = nn.Sequential(nn.Conv2d(2, 4, 1), reader).double().eval()
    with torch.no_grad():
        model[0].weight[-1], model[0].bias[-1] = 0, 3.0
    before, after = without_unit(model, IMAGES.double(), "0")
    assert (after - before).abs().max() > 0.01  # it is not the same everywhere
    torch.testing.assert_close(after.mean((0, 2, 3)), before.mean((0, 2, 3)), rtol=0, atol=1e-5)


def test_a_copy_on_a_residual_stream_is_handed_over_in_all_of_its_readers():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), Residual(4), Residual(4), nn.Conv2d(4, 3, 3)).double().eval()
    with torch.no_grad():
        for layer in (model[0], model[1].project, model[2].project):
            layer.weight[3], layer.bias[3] = layer.weight[1], layer.bias[1]
    before, after = without_unit(model, IMAGES.double(), "0")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def watched(model, inputs):
    tensors = named_leaves(model)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    found = observe(trace(model, inputs), module_programs(model, inputs)[:1], tensors)
    assert all(torch.equal(tensors[name], value) for name, value in before.items())  # what is tried out is undone
    return {(tensor, dim): reader for (_, tensor, dim), reader in found.items()}


def test_what_takes_up_a_constant():
    parts = [nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU()]
    parts += [nn.ConvTranspose2d(5, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False), nn.ReLU(), nn.BatchNorm2d(3)]
    found = watched(nn.Sequential(*parts), IMAGES)
    assert {place: reader.receiver for place, reader in found.items()} == {
        ("2.weight", 1): Receiver("3.running_mean", -1),
        ("5.weight", 0): Receiver("5.bias", 1),
        ("7.weight", 1): None,  # what is behind the activation is none of its business
    }
    assert all(reader.exact for reader in found.values())


def test_a_bias_that_several_weights_count_on_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(2, 4))
            self.both = nn.Parameter(torch.randn(2))

        def forward(self, x):
            return nn.functional.linear(x, self.one, self.both) * nn.functional.linear(x, self.two, self.both)

    found = watched(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Twice()), VECTORS)
    assert [(reader.exact, reader.receiver) for reader in found.values()] == [(True, None)] * 2


def test_what_is_worked_out_before_it_reads_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), weight_norm(nn.Linear(4, 2)))
    (reader,) = watched(model, VECTORS).values()
    assert not reader.exact


@pytest.mark.parametrize("halved", [False, True])
def test_under_autocast_the_same_can_take_over(halved):
    parts = [nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU()]
    parts += [nn.Flatten(), weight_norm(nn.Linear(80, 6)), nn.ReLU(), nn.Linear(6, 3)]
    found = watched((HalfPrecision if halved else nn.Sequential)(*parts), IMAGES)
    assert [(reader.exact, reader.receiver and reader.receiver.tensor) for reader in found.values()] == [
        (True, "3.running_mean"),
        (False, None),
        (True, "8.bias"),
    ]


def test_a_tied_weight_that_makes_channels_elsewhere_is_left_alone():
    def forward(net, words):
        hidden = net.words(words) + net.inner(net.words(words))
        return nn.functional.linear(hidden, net.words.weight)

    model = Net(forward, words=nn.Embedding(7, 5), inner=nn.Linear(5, 5))
    found = watched(model, torch.randint(7, (20,)))
    assert {tensor: reader.exact for (tensor, _), reader in found.items()} == {
        "inner.weight": True,
        "words.weight": False,
    }


@pytest.mark.parametrize("how", ["regression", "scale"])
def test_what_was_handed_over_can_be_put_back_in_all_copies(how):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    average = copy.deepcopy(model)
    graph, copies = trace(model, VECTORS), [named_leaves(model), named_leaves(average)]
    readers = observe(graph, module_programs(model, VECTORS)[:1], copies[0], torch.Generator().manual_seed(0))
    keep, alive = {"0": torch.tensor([True, True, False, True])}, {"0": torch.tensor([True, True, True, False])}
    start = copy.deepcopy(model.state_dict())
    before = hand_over(copies, readers, keep, alive, ridge=1e-3, how=how)
    for other in (model, average):
        changed = other[2].weight != start["2.weight"]
        assert changed[:, :2].all()
        assert not changed[:, 2:].any()  # what goes waits for its end, what was off stays as it was
        assert (other[2].bias != start["2.bias"]).all() == (how == "regression")
    put_back(before)
    for other in (model, average):
        assert all(torch.equal(value, start[name]) for name, value in other.state_dict().items())


def test_all_that_is_known_of_a_reader_is_shared():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 3, padding=1))
    found = []
    for size in (4, 8):  # what two processes see
        x = torch.randn(2, 2, size, size)
        (reader,) = observe(trace(model, x), module_programs(model, x), named_leaves(model)).values()
        found.append(reader)
    one, other = ({k: v for k, v in vars(reader).items() if torch.is_tensor(v)} for reader in found)
    assert not torch.equal(one["reach"], other["reach"])
    twins = {id(value): other[name] for name, value in one.items()}
    expected = {name: (value + other[name]) / 2 for name, value in one.items()}
    found[0].share(lambda value: (value + twins.get(id(value), value)) / 2)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found[0], name), value, msg=name)

from __future__ import annotations

import copy
import random
import re
from collections import Counter, OrderedDict, deque
from dataclasses import replace as changed

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.errors import ConfigurationError, ShrinkError, TraceError
from lightning_prune.graph.channels import ChannelGraph
from lightning_prune.graph.labels import Plane
from lightning_prune.graph.program import Program
from lightning_prune.graph.rules import _USER_RULES, register_rule
from lightning_prune.surgery import Shrunk, keep_whole, resized, shrink, trace, trace_programs
from lightning_prune.surgery.symbols import Setting
from tests.helpers import Net, difference, disagreeing_attributes, masked_copy, random_keep, randomise, run


def small():
    """Two groups: ``a`` of 8 channels, grouped in fours under a norm, and ``b`` of 6."""
    network = nn.Sequential()
    network.add_module("a", nn.Conv2d(3, 8, 3, padding=1))
    network.add_module("norm", nn.BatchNorm2d(8))
    network.add_module("act", nn.ReLU(inplace=True))
    network.add_module("b", nn.Conv2d(8, 6, 1))
    network.add_module("drop", nn.Dropout2d(0.3))
    network.add_module("flat", nn.Flatten())
    network.add_module("out", nn.Linear(6 * 20, 3))
    return randomise(network)


INPUTS = (2, 3, 5, 4)
HALF = {"a": torch.tensor([0, 3, 5, 6]), "b": torch.tensor([1, 2, 4])}


def trained():
    """A network in train mode with gradients and an optimizer that has made two steps."""
    network, inputs = small().train(), torch.randn(INPUTS)
    optimizer = torch.optim.AdamW(network.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        network(inputs).square().sum().backward()
        optimizer.step()
    return network, inputs, optimizer


def everything(network, *optimizers):
    """All that can be seen of a network, its optimizers and the random generators."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    numpy_state = np.random.get_state()
    return {
        "objects": {name: id(tensor) for name, tensor in tensors.items()},
        "memory": {name: tensor.data_ptr() for name, tensor in tensors.items()},
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "strides": {name: tensor.stride() for name, tensor in tensors.items()},
        "gradients": {name: None if t.grad is None else (id(t.grad), t.grad.clone()) for name, t in tensors.items()},
        "attributes": {
            name: {k: (id(v), v if isinstance(v, (int, tuple, str)) else None) for k, v in vars(m).items()}
            for name, m in network.named_modules()
        },
        "hooks": {
            name: {key: len(value) for key, value in vars(m).items() if key.endswith("_hooks")}
            for name, m in network.named_modules()
        },
        "registered": {
            name: [list(m._parameters), list(m._buffers), list(m._modules)] for name, m in network.named_modules()
        },
        "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers],
        "random": (torch.get_rng_state(), random.getstate(), numpy_state[1].copy(), numpy_state[2]),
        "flags": (torch.is_grad_enabled(), torch.backends.mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()),
    }


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def assert_same(before, after):
    assert [key for key in before if not same(before[key], after[key])] == []


class TestTraceLeavesNoTrace:
    @pytest.mark.parametrize("training", [False, True])
    def test_on_a_network_in_use(self, training) -> None:
        network, inputs, optimizer = trained()
        network.train(training)
        network.norm.eval()
        network.a.register_forward_hook(lambda *_: None)
        network.a.bias.requires_grad_(False)
        before = everything(network, optimizer)
        trace(network, inputs)
        assert_same(before, everything(network, optimizer))

    def test_of_what_forward_changes(self) -> None:
        def forward(net, x):
            net.calls = net.calls + 1
            net.last = net.a(x)
            net.center.mul_(0.9).add_(net.last.mean(0), alpha=0.1)
            net.queue = torch.cat([net.queue[1:], net.last.detach()[:1]])
            noise = random.random() + np.random.rand() + torch.rand(1)
            return net.b(F.relu(net.last - net.center)) * noise

        buffers = {"center": torch.zeros(8), "queue": torch.zeros(5, 8)}
        network = Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3), **buffers, calls=0)
        inputs, before = torch.randn(5, 4), everything(network)
        graph = trace(network, inputs)
        assert_same(before, everything(network))
        assert graph.groups["a"].width == 8

    def test_of_what_fails(self) -> None:
        network = Net(lambda n, x: n.a(x) if x.sum() > 1e9 else n.b(n.a(x)), a=nn.Linear(4, 8), b=nn.Linear(7, 3))
        inputs, before = torch.randn(5, 4), everything(network)
        with pytest.raises(TraceError, match="mat1 and mat2 shapes cannot be multiplied"):
            trace(network, inputs)
        assert_same(before, everything(network))

    def test_of_a_shrink_that_is_tried_out(self) -> None:
        network, inputs, optimizer = trained()
        graph = trace(network, inputs)
        before = everything(network, optimizer)
        with pytest.raises(ZeroDivisionError), resized(network, graph, HALF):  # noqa: PT012 - the body is what is tried
            assert network.a.weight.shape == (4, 3, 3, 3)
            assert network.a.out_channels == 4
            assert network.eval()(inputs).shape == (2, 3)
            network.train()
            raise ZeroDivisionError
        with resized(network, graph, HALF):
            assert network.b.in_channels == 4
        assert_same(before, everything(network, optimizer))


class TestTrace:
    def test_lazy_parameters_are_told(self) -> None:
        with pytest.raises(TraceError, match=r"0\.weight is a lazy parameter that has no shape yet"):
            trace(nn.Sequential(nn.LazyLinear(3)), torch.randn(2, 4))

    def test_inputs_by_position_and_by_keyword(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 3)

            def forward(self, x, y):
                return self.c(F.relu(self.a(x) + self.b(y)))

        x, y = torch.randn(2, 4), torch.randn(2, 5)
        assert trace(Two(), (x, y)).widths == {"a": 8}
        assert trace(Two(), {"y": y, "x": x}).widths == {"a": 8}

    def test_what_only_train_mode_runs_is_seen(self) -> None:
        def forward(net, x):
            h = F.relu(net.a(x))
            return (net.b(h), net.aux(h)) if net.training else net.b(h)

        network = Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3), aux=nn.Linear(8, 2))
        graph = trace(network, torch.randn(5, 4))
        assert ("aux.weight", 1) in {(slot.tensor, slot.dim) for slot in graph.groups["a"].slots}
        shrink(network, graph, {"a": torch.arange(3)})
        assert [tuple(out.shape) for out in network.train()(torch.randn(5, 4))] == [(5, 3), (5, 2)]

    def test_a_train_mode_that_fails_is_told_and_left_out(self) -> None:
        graph = trace(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), torch.randn(1, 4))
        assert graph.widths == {"0": 8}
        assert any(path == "forward (train mode)" and "more than 1 value" in reason for path, reason in graph.refused)

    def test_a_network_with_nothing_to_prune(self) -> None:
        network = nn.Linear(4, 3)
        graph = trace(network, torch.randn(2, 4))
        assert graph.groups == {}
        assert dict(graph.refused)["weight (dim 0)"] == "is an output of the network"
        assert shrink(network, graph, {}) == Shrunk()

    def test_sizes_follow_the_widths(self) -> None:
        network, inputs = small(), torch.randn(INPUTS)
        graph = trace(network, inputs)
        widths = {name: len(units) for name, units in HALF.items()}
        expected = {name: tuple(e.size(widths) for e in extents) for name, extents in graph.tensors.items()}
        costs = [(str(o.function), [e.size(widths) for e in o.result]) for o in graph.operations]
        assert costs == [
            ("aten.convolution", [2, 4, 5, 4]),
            ("aten.convolution", [2, 3, 5, 4]),
            ("aten.addmm", [2, 3]),
        ]
        assert graph.batch_size == 2
        shrink(network, graph, HALF)
        assert {**{n: tuple(t.shape) for n, t in network.state_dict().items()}} == expected

    def test_patterns_are_equal_for_groups_of_the_same_make(self) -> None:
        network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
        groups = trace(network, torch.randn(2, 4)).groups
        assert groups["0"].pattern == groups["2"].pattern
        convs = trace(small(), torch.randn(INPUTS)).groups
        assert convs["a"].pattern != convs["b"].pattern


class TestShrink:
    def test_what_it_did_is_told(self) -> None:
        network, inputs, optimizer = trained()
        network.eval()
        graph = trace(network, inputs)
        masked = run(masked_copy(network, graph, HALF), inputs)
        objects = {name: id(parameter) for name, parameter in network.named_parameters()}
        result = shrink(network, graph, HALF, [optimizer])
        assert difference(masked, run(network, inputs)) == pytest.approx(result.error, abs=1e-6)
        assert objects == {name: id(parameter) for name, parameter in network.named_parameters()}
        assert result.settings == {
            Setting("a", "out_channels"): 4,
            Setting("norm", "num_features"): 4,
            Setting("b", "in_channels"): 4,
            Setting("b", "out_channels"): 3,
            Setting("out", "in_features"): 60,
        }
        assert {cut.dim: cut.positions.tolist() for cut in result.cuts["b.weight"]} == {0: [1, 2, 4], 1: [0, 3, 5, 6]}
        state = optimizer.state[network.b.weight]
        assert state["exp_avg"].shape == (3, 4, 1, 1)

    def test_a_mask_is_as_good_as_numbers(self) -> None:
        first, second = small(), None
        second, inputs = copy.deepcopy(first), torch.randn(INPUTS)
        shrink(first, trace(first, inputs), HALF)
        mask = torch.tensor([True, False, False, True, False, True, True, False])
        shrink(second, trace(second, inputs), {"a": mask, "b": [1, 2, 4]})
        assert same(first.state_dict(), second.state_dict())

    def test_keeping_everything_changes_nothing(self) -> None:
        network, inputs = small(), torch.randn(INPUTS)
        graph = trace(network, inputs)
        before = everything(network)
        assert shrink(network, graph, {"a": torch.arange(8), "b": torch.ones(6, dtype=torch.bool)}) == Shrunk()
        assert_same(before, everything(network))

    def test_without_verification_there_is_no_error(self) -> None:
        network, inputs = small(), torch.randn(INPUTS)
        assert shrink(network, trace(network, inputs), HALF, verify=False).error is None
        assert network.a.weight.shape == (4, 3, 3, 3)

    def test_again_and_again(self) -> None:
        network, inputs = small(), torch.randn(INPUTS)
        for width in (6, 5, 2, 1):
            graph = trace(network, inputs)
            keep = {"a": torch.arange(width)}
            masked = run(masked_copy(network, graph, keep), inputs)
            shrink(network, graph, keep)
            assert network.norm.num_features == width
            assert difference(masked, run(network, inputs)) <= 1e-5

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_other_precisions(self, dtype) -> None:
        network, inputs = small().to(dtype), torch.randn(INPUTS, dtype=dtype)
        error = shrink(network, trace(network, inputs), HALF).error
        assert error < (1e-12 if dtype is torch.float64 else 0.1)

    def test_autocast_inside_the_network(self) -> None:
        def forward(net, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return net.inner(x).float()

        network, inputs = Net(forward, inner=small()), torch.randn(INPUTS)
        graph = trace(network, inputs)
        assert graph.widths == {"inner.a": 8, "inner.b": 6}
        assert shrink(network, graph, {"inner.a": HALF["a"], "inner.b": HALF["b"]}).error < 0.1

    def test_channels_last_and_frozen_parameters(self) -> None:
        network, inputs = small().to(memory_format=torch.channels_last), torch.randn(INPUTS)
        network.b.weight.requires_grad_(False)
        shrink(network, trace(network, inputs.contiguous(memory_format=torch.channels_last)), HALF)
        assert network.a.weight.is_contiguous(memory_format=torch.channels_last)
        assert not network.a.weight.is_contiguous()
        assert not network.b.weight.requires_grad
        assert network.a.weight.requires_grad

    def test_attributes_are_solved_where_they_are_used(self) -> None:
        network = nn.Sequential(
            nn.Conv2d(3, 16, 1),
            nn.GroupNorm(8, 16),
            nn.Conv2d(16, 16, 3, groups=16),
            nn.Conv2d(16, 24, 1, groups=8),
            nn.ConvTranspose2d(24, 24, 2, groups=24),
            nn.ChannelShuffle(2),
            nn.Conv2d(24, 2, 1),
        )
        inputs = torch.randn(2, 3, 6, 5)
        graph = trace(network, inputs)
        keep = random_keep(graph)
        masked = run(masked_copy(network, graph, keep), inputs)
        shrink(network, graph, keep)
        assert difference(masked, run(network, inputs)) <= 1e-5
        assert disagreeing_attributes(network) == []
        groups = [network[1].num_groups, network[2].groups, network[3].groups, network[4].groups, network[5].groups]
        assert groups == [4, 8, 4, 12, 2]

    def test_a_setting_used_twice_has_one_value(self) -> None:
        def forward(net, x):
            first, second = net.a(x).split([net.width, net.rest], 1)
            return net.b(F.relu(first).view(-1, net.width)) + net.c(second)

        network = Net(forward, a=nn.Linear(4, 9), b=nn.Linear(5, 3), c=nn.Linear(4, 3), width=5, rest=4)
        inputs = torch.randn(2, 4)
        graph = trace(network, inputs)
        keep = {name: torch.arange(group.width - 2) for name, group in graph.groups.items()}
        masked = run(masked_copy(network, graph, keep), inputs)
        shrink(network, graph, keep)
        assert (network.width, network.rest) == (3, 2)
        assert difference(masked, run(network, inputs)) <= 1e-5

    def test_a_number_that_moved_on_since_the_trace_is_no_obstacle(self) -> None:
        network = Net(lambda n, x: n.b(F.relu(n.a(x))) * n.warmth, a=nn.Linear(4, 8), b=nn.Linear(8, 3), warmth=0.1)
        inputs = torch.randn(2, 4)
        graph = trace(network, inputs)
        network.warmth = 0.7
        masked = run(masked_copy(network, graph, {"a": torch.arange(3)}), inputs)
        shrink(network, graph, {"a": torch.arange(3)})
        assert difference(masked, run(network, inputs)) <= 1e-5

    def test_a_network_that_is_wired_otherwise_by_now_is_refused(self) -> None:
        skip = [0.0]
        network = Net(lambda n, x: n.b(F.relu(n.a(x)) + skip[0]), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
        graph = trace(network, torch.randn(2, 4))
        skip[0] = torch.arange(8.0)
        before = everything(network)
        with pytest.raises(ShrinkError, match="group 'a' is not what it was when the network was traced"):
            shrink(network, graph, {"a": torch.arange(3)})
        assert_same(before, everything(network))


@pytest.fixture
def rule():
    """Registers a rule for an operator of torch and takes it away again."""
    names = []

    def register(name, function):
        names.append(name)
        register_rule(name, function)

    yield register
    for name in names:
        _USER_RULES.pop(name, None)


def mirrored(call):
    """A wrong rule: the channels leave the operator in reverse order."""
    planes = call.planes(call.tensors[0])
    return [tuple(Plane(plane.ids.flip(1) if plane.ids.shape[1] > 1 else plane.ids, plane.zero) for plane in planes)]


class TestAllOrNothing:
    def test_a_wrong_rule_is_found_and_everything_put_back(self, rule) -> None:
        rule("aten::relu_", mirrored)
        network, inputs, optimizer = trained()
        graph = trace(network, inputs)
        assert graph.widths == {"a": 8, "b": 6}
        before = everything(network, optimizer)
        message = r"cutting a is not exact: the shrunk network differs from the masked one by .* Nothing was changed"
        with pytest.raises(ShrinkError, match=message):
            shrink(network, graph, HALF, [optimizer])
        assert_same(before, everything(network, optimizer))
        assert shrink(network, graph, {"b": HALF["b"]}, [optimizer]).error <= 1e-5

    def test_what_does_not_change_the_outputs_is_not_found_without_verification(self, rule) -> None:
        rule("aten::relu_", mirrored)
        network, inputs, _ = trained()
        assert shrink(network, trace(network, inputs), HALF, verify=False).error is None

    @pytest.mark.parametrize("verify", [True, False])
    def test_a_network_that_behaves_differently_at_one_width(self, verify) -> None:
        def forward(net, x):
            h = F.relu(net.a(x))
            return net.c(F.relu(net.b(-h if h.shape[1] == 2 else h)))

        network, inputs = Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 6), c=nn.Linear(6, 3)), torch.randn(5, 4)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        network(inputs).sum().backward()
        optimizer.step()
        graph = trace(network, inputs)
        before = everything(network, optimizer)
        with pytest.raises(ShrinkError, match=r"cutting a is not exact: .*executed neg where .* Exclude this group"):
            shrink(network, graph, {"a": torch.arange(2), "b": torch.arange(4)}, [optimizer], verify)
        assert_same(before, everything(network, optimizer))
        assert shrink(network, graph, {"a": torch.arange(4), "b": torch.arange(4)}, [optimizer], verify)

    def test_a_network_that_fails_at_one_width(self) -> None:
        def forward(net, x):
            if len(net.a.bias) == 2 and not torch.overrides._get_current_function_mode_stack():
                raise KeyError("two")
            return net.b(F.relu(net.a(x)))

        network, inputs = Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3)), torch.randn(5, 4)
        graph = trace(network, inputs)
        before = everything(network)
        with pytest.raises(ShrinkError, match=r"forward \(evaluation mode\) failed \(KeyError: 'two'\)"):
            shrink(network, graph, {"a": torch.arange(2)})
        assert_same(before, everything(network))

    def test_an_optimizer_that_breaks(self) -> None:
        class Broken(torch.optim.SGD):
            pass

        network, inputs, _ = trained()
        optimizer = Broken(network.parameters(), lr=0.1, momentum=0.9)
        network(inputs).sum().backward()
        optimizer.step()
        optimizer.state[network.b.weight]["odd"] = torch.ones(7)
        graph = trace(network, inputs)
        before = everything(network, optimizer)
        with pytest.warns(UserWarning, match=r"keeps state for b\.weight in a form that cannot be cut"):
            shrink(network, graph, HALF, [optimizer])
        assert before["optimizers"][0]["param_groups"] == optimizer.state_dict()["param_groups"]

    def test_an_interrupt(self) -> None:
        def forward(net, x):
            if len(net.a.bias) == 2:
                raise KeyboardInterrupt
            return net.b(F.relu(net.a(x)))

        network, inputs = Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3)), torch.randn(5, 4)
        graph = trace(network, inputs)
        before = everything(network)
        with pytest.raises(KeyboardInterrupt):
            shrink(network, graph, {"a": torch.arange(2)})
        assert_same(before, everything(network))


class TestKeepIsChecked:
    @pytest.fixture
    def traced(self):
        network = small()
        return network, trace(network, torch.randn(INPUTS))

    @pytest.mark.parametrize(
        ("keep", "message"),
        [
            ({"aa": [0]}, "no channel group is called 'aa'; did you mean 'a'?"),
            ({"nothing": [0]}, "no channel group is called 'nothing'; there are: a, b"),
            ({"a": []}, "what to keep of group 'a' must be a list of channel numbers or a bool mask"),
            ({"a": torch.zeros(0, dtype=torch.int64)}, "group 'a' would lose all of its 8 channels; keep at least one"),
            ({"a": torch.zeros(8, dtype=torch.bool)}, "group 'a' would lose all of its 8 channels; keep at least one"),
            ({"a": [0, 8]}, "group 'a' has channels 0 to 7, asked to keep [0, 8]"),
            ({"b": [-1, 2]}, "group 'b' has channels 0 to 5, asked to keep [-1, 2]"),
            ({"a": torch.ones(6, dtype=torch.bool)}, "the mask of group 'a' has length 6, but the group 8 channels"),
            ({"a": torch.ones(8)}, "what to keep of group 'a' must be a list of channel numbers or a bool mask"),
            ({"a": torch.ones(2, 4, dtype=torch.int64)}, "what to keep of group 'a' must be a list of channel numbers"),
        ],
    )
    def test_wrong_ones_are_named(self, traced, keep, message) -> None:
        network, graph = traced
        before = everything(network)
        for call in (shrink, lambda *args: resized(*args).__enter__()):
            with pytest.raises(ConfigurationError, match=re.escape(message)):
                call(network, graph, keep)
        assert_same(before, everything(network))

    def test_a_stale_graph(self) -> None:
        network = small()
        graph = trace(network, torch.randn(INPUTS))
        shrink(network, graph, {"a": torch.arange(4)})
        with pytest.raises(ConfigurationError, match=r"a\.weight was changed since the network was traced"):
            shrink(network, graph, {"b": torch.arange(3)})

    def test_replaced_parameters(self) -> None:
        network = small()
        graph = trace(network, torch.randn(INPUTS))
        network.b.weight = nn.Parameter(network.b.weight.detach().clone())
        with pytest.raises(ConfigurationError, match=r"b\.weight was changed since the network was traced"):
            shrink(network, graph, {"b": torch.arange(3)})

    def test_another_network(self) -> None:
        graph = trace(small(), torch.randn(INPUTS))
        with pytest.raises(ConfigurationError, match="was traced on another network"):
            shrink(small(), graph, {"b": torch.arange(3)})

    def test_a_graph_that_was_made_by_hand(self) -> None:
        network = small()
        traced = trace(network, torch.randn(INPUTS))
        for graph in (ChannelGraph({}), changed(traced, evidence=None)):
            with pytest.raises(ConfigurationError, match="only a traced graph can be shrunk"):
                shrink(network, graph, {"b": torch.arange(3)})


def test_programs_may_hand_out_less_than_they_return() -> None:
    """What stays inside is compared where it keeps its shape, and may change it."""
    network, inputs = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(2, 4)

    def both():
        with torch.no_grad():
            hidden = network[0](inputs)
            return {"hidden": hidden, "out": network[1](hidden)}

    assert trace_programs(network, [Program("step", both)]).groups == {}
    graph = trace_programs(network, [Program("step", both, handed_out=lambda result: result["out"])])
    assert graph.widths == {"0": 8}
    assert shrink(network, graph, {"0": torch.arange(5)}).error <= 1e-5


def test_no_program_at_all() -> None:
    with pytest.raises(TraceError, match="no program"):
        trace_programs(nn.Linear(2, 2), [])


class TestOperatorsAreTheRecordedOnes:
    def test_stride_and_padding_are_no_widths(self) -> None:
        """Half of stride and padding would give an image of the same size."""
        network = nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8), nn.Conv2d(8, 2, 1)
        )
        inputs = torch.randn(2, 3, 4, 5)
        graph = trace(network, inputs)
        assert graph.widths == {"0": 8}
        keep = {"0": torch.tensor([0, 3, 4, 7])}
        masked = run(masked_copy(network, graph, keep), inputs)
        shrink(network, graph, keep)
        assert difference(masked, run(network, inputs)) <= 1e-6
        assert (network[1].stride, network[1].padding, network[1].groups) == ((2, 2), (2, 2), 4)

    def test_an_output_that_loses_its_labels_keeps_its_shape(self) -> None:
        network = Net(lambda n, x: n.b(F.relu(n.a(x))).as_subclass(Tensor), a=nn.Linear(4, 8), b=nn.Linear(8, 2))
        assert trace(network, torch.randn(3, 4)).widths == {"a": 8}


class TestWhatTheTrialCutTaught:
    def test_a_number_is_right_before_it_is_used_in_a_check(self) -> None:
        """With the old number of first channels the check would fail, and nothing but an inequality says so."""

        def forward(net, x):
            y = net.a(x)
            if y.shape[1] - net.first <= 0:
                raise ValueError("too few channels")
            first, second = torch.split(y, [net.first, y.shape[1] - net.first], 1)
            return net.b(first) + net.c(second)

        network = Net(forward, first=6, a=nn.Linear(4, 36), b=nn.Linear(6, 2), c=nn.Linear(30, 2))
        inputs = torch.randn(5, 4)
        graph = trace(network, inputs)
        assert sorted(graph.widths.values()) == [6, 30]
        keep = {name: torch.arange(4 if width == 6 else 1) for name, width in graph.widths.items()}
        masked = run(masked_copy(network, graph, keep), inputs)
        shrink(network, graph, keep)
        assert difference(masked, run(network, inputs)) <= 1e-6
        assert network.first == 4


class TestCoupledWidths:
    def test_a_width_that_code_takes_from_another_layer_goes_along(self) -> None:
        """The width of the heads is taken from the stream, so heads and stream lose the same channels."""

        def forward(net, x):
            stream = net.stem(x)
            batch, length, width = stream.shape
            q, k, v = net.qkv(stream).reshape(batch, length, 3, net.heads, width // net.heads).permute(2, 0, 3, 1, 4)
            mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
            return net.head(stream + net.out(mixed.transpose(1, 2).reshape(batch, length, width)))

        layers = {
            "stem": nn.Linear(5, 12),
            "qkv": nn.Linear(12, 36),
            "out": nn.Linear(12, 12),
            "head": nn.Linear(12, 2),
        }
        network, inputs = Net(forward, heads=4, **layers), torch.randn(2, 6, 5)
        graph = trace(network, inputs)
        assert list(graph.widths.values()) == [4]
        keep = {name: torch.tensor([0, 2, 3]) for name in graph.groups}
        masked = run(masked_copy(network, graph, keep), inputs)
        shrink(network, graph, keep)
        assert difference(masked, run(network, inputs)) <= 1e-6
        assert (network.heads, network.stem.out_features, network.qkv.out_features) == (3, 9, 27)


class TestApproximateNorms:
    @pytest.mark.parametrize(
        "norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(1, 8), nn.LayerNorm([8, 4])], ids=str
    )
    def test_the_kept_channels_are_normalised_by_themselves(self, norm) -> None:
        """By hand: the norm of the kept channels alone, with the kept part of its weight and bias."""
        spatial = isinstance(norm, nn.GroupNorm) or norm.normalized_shape == (8, 4)
        first, last = (nn.Conv1d(5, 8, 1), nn.Conv1d(8, 3, 1)) if spatial else (nn.Linear(5, 8), nn.Linear(8, 3))
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.uniform_(0.5, 1.5)
        network = nn.Sequential(first, norm, last)
        inputs = torch.randn(2, 5, 4) if spatial else torch.randn(7, 5)
        assert trace(network, inputs).groups == {}
        graph = trace(network, inputs, norms="approximate")
        assert graph.widths == {"0": 8}
        assert graph.groups["0"].approximate
        kept = torch.tensor([1, 2, 5])
        part, dims = first(inputs)[:, kept], (1, 2) if spatial else (1,)
        centred = part if isinstance(norm, nn.RMSNorm) else part - part.mean(dims, keepdim=True)
        scaled = centred / (centred.square().mean(dims, keepdim=True) + (norm.eps or 1.2e-7)).sqrt()
        shape = (1, 3, 1) if isinstance(norm, nn.GroupNorm) else (3, 4) if spatial else (3,)
        weighted = scaled * norm.weight[kept].reshape(shape)
        weighted = weighted + norm.bias[kept].reshape(shape) if hasattr(norm, "bias") else weighted
        reads = last.weight[:, kept]
        expected = F.conv1d(weighted, reads, last.bias) if spatial else F.linear(weighted, reads, last.bias)
        expected = expected.detach()
        result = shrink(network, graph, {"0": kept})
        assert result.error <= 1e-6
        assert difference([expected], run(network, inputs)) <= 1e-5

    def test_a_wrong_part_of_the_norm_is_found(self) -> None:
        """The proof must not take the word of the shrunk network for what was kept."""
        network, inputs = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(7, 5)
        graph = trace(network, inputs, norms="approximate")
        with torch.no_grad():
            network[1].weight.copy_(torch.arange(8.0))
        slots = [changed(s, index=s.index.flip(0)) if s.tensor == "1.weight" else s for s in graph.groups["0"].slots]
        graph.evidence.groups["0"] = changed(graph.groups["0"], slots=tuple(slots))
        with pytest.raises(ShrinkError, match="differs from the masked one"):
            shrink(network, graph, {"0": torch.tensor([0, 1, 5])})


class TestTensorsThatAreNotRegistered:
    def test_a_plain_tensor_is_cut_along(self) -> None:
        network = Net(lambda n, x: n.b(F.relu(n.a(x)) + n.table[0]), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
        network.table = [torch.arange(8.0)]
        inputs = torch.randn(5, 4)
        graph = trace(network, inputs)
        keep = {"a": torch.tensor([1, 2, 6])}
        masked = run(masked_copy(network, graph, keep), inputs)
        shrink(network, graph, keep)
        assert difference(masked, run(network, inputs)) <= 1e-6
        assert network.table[0].tolist() == [1, 2, 6]

    def test_a_cache_is_not_filled_by_tracing(self) -> None:
        def forward(net, x):
            net.cache.setdefault("bias", net.b.weight.detach().sum(0))
            return net.b(F.relu(net.a(x)) + net.cache["bias"])

        network = Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3))
        network.cache = {}
        trace(network, torch.randn(5, 4))
        assert network.cache == {}

    @pytest.mark.parametrize("container", [OrderedDict, lambda: deque(maxlen=3), Counter])
    def test_no_container_keeps_what_tracing_put_into_it(self, container) -> None:
        def forward(net, x):
            net.seen.append(1) if isinstance(net.seen, deque) else net.seen.update(a=1)
            return net.b(F.relu(net.a(x)))

        network = Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3))
        network.seen = container()
        trace(network, torch.randn(5, 4))
        assert not network.seen

    def test_hooks_that_the_first_forward_installs_are_not_there_twice_later(self) -> None:
        def forward(net, x):
            if not net.hooked:
                net.a.register_forward_hook(lambda module, args, output: 2 * output)
                net.hooked = True
            return net.b(F.relu(net.a(x)))

        network, inputs = Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3)), torch.randn(5, 4)
        network.hooked = False
        expected = F.relu(2 * F.linear(inputs, network.a.weight, network.a.bias)) @ network.b.weight.T + network.b.bias
        graph = trace(network, inputs)
        assert not network.a._forward_hooks
        torch.testing.assert_close(network(inputs), expected)
        keep = {"a": torch.arange(5)}
        masked = run(masked_copy(network, graph, keep), inputs)
        shrink(network, graph, keep)
        assert difference(masked, run(network, inputs)) <= 1e-6

    def test_a_cache_that_a_change_of_mode_empties_is_emptied(self) -> None:
        class Cached(Net):
            def train(self, mode=True):
                self.cache = {}
                return super().train(mode)

        def forward(net, x):
            net.cache.setdefault("bias", net.scale.detach() * 2)
            return net.b(F.relu(net.a(x)) + net.cache["bias"])

        network = Cached(forward, a=nn.Linear(4, 8), scale=nn.Parameter(torch.rand(8)), b=nn.Linear(8, 3)).eval()
        inputs = torch.randn(5, 4)
        network(inputs)
        graph = trace(network, inputs)
        keep = {"a": torch.arange(5)}
        masked = run(masked_copy(network, graph, keep), inputs)
        shrink(network, graph, keep)
        assert difference(masked, [network(inputs)]) <= 1e-6


class TestSelections:
    def test_a_network_that_picks_rows_by_their_numbers_is_cut(self) -> None:
        def forward(net, x):
            hidden = F.relu(net.a(x))
            best = hidden.sum(1).topk(4).indices
            rows = net.b(hidden[best])
            return rows[rows[:, 0] > 0]

        network = Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3))
        inputs = torch.randn(40, 4)
        graph = trace(network, inputs)
        assert graph.widths == {"a": 8}
        shrink(network, graph, {"a": torch.tensor([0, 3, 4])})
        assert network(inputs).shape[1] == 3

    def test_a_number_made_from_a_size_is_still_found(self) -> None:
        def forward(net, x):
            hidden = F.relu(net.a(x))
            return net.b(hidden / torch.tensor(float(hidden.shape[1])))

        network = Net(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 3))
        graph = trace(network, torch.randn(5, 4))
        assert "a" not in graph.groups


def test_a_slice_that_reaches_the_very_end_after_the_cut_is_solved_all_the_same() -> None:
    def forward(net, x):
        h = F.relu(net.a(x))
        return net.b(h[:, : net.size]) + net.c(h[:, net.size :])

    network = Net(forward, a=nn.Linear(4, 10), b=nn.Linear(8, 3), c=nn.Linear(2, 3), size=8)
    inputs = torch.randn(3, 4)
    graph = trace(network, inputs)
    graph.evidence.laws.clear()  # else what the trial cut taught would say it
    first = next(name for name, width in graph.widths.items() if width == 8)
    masked = run(masked_copy(network, graph, {first: torch.arange(6)}), inputs)
    shrink(network, graph, {first: torch.arange(6)})  # 6 + 2 channels are left: as many as the slice was long
    assert network.size == 6
    assert difference(masked, run(network, inputs)) <= 1e-5


def test_a_group_that_is_kept_whole_afterwards_leaves_the_others_to_be_cut() -> None:
    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(8, 6), "c": nn.Linear(6, 3)}
    network = Net(lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x))))), **layers)
    inputs = torch.randn(2, 4)
    graph = keep_whole(trace(network, inputs), {"a": "because it shall", "unknown": "is passed over"})
    assert graph.widths == {"b": 6}
    assert any(path == "a.weight (dim 0)" and reason == "because it shall" for path, reason in graph.refused)
    keep = {"b": torch.arange(3)}
    masked = run(masked_copy(network, graph, keep), inputs)
    shrink(network, graph, keep)
    assert difference(masked, run(network, inputs)) <= 1e-5


class Halves(nn.Module):
    """Three layers side by side, told apart again by a width that the module remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = 16
        self.stem, self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 16), nn.Linear(4, 10), nn.Linear(4, 6)
        self.out = nn.Linear(32, 2)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([self.a(x), self.b(x), self.c(x)], 1)
        first, rest = x[:, : self.first], x[:, self.first :]
        return self.out(torch.cat([first.sin(), rest.tan()], 1))


def test_a_slice_that_comes_to_nothing_at_some_widths_is_solved_all_the_same() -> None:
    network, x = Halves(), torch.randn(4, 3)
    graph = trace(network, (x,))
    assert graph.widths == {"stem": 4, "a": 16, "b": 10, "c": 6}
    keep = {"a": torch.arange(6), "b": torch.arange(8), "c": torch.arange(2)}  # 16 in all, as many as `first` says
    expected = run(masked_copy(network, graph, keep), x)
    shrink(network, graph, keep)
    assert network.first == 6
    assert difference(expected, run(network, x)) < 1e-5


def test_a_part_of_a_dimension_that_stays_whole_is_told_too() -> None:
    network = Net(
        lambda net, x: (net.a(x)[:, :3], net.out(net.a(x)[:, 3:].tanh())), a=nn.Linear(3, 8), out=nn.Linear(5, 2)
    )
    refused = {refusal.path: refusal.reason for refusal in trace(network, (torch.randn(4, 3),)).refused}
    assert refused["a.weight (dim 0, 3 of 8)"] == "is an output of the network"

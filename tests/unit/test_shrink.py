from __future__ import annotations

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune import ConfigurationError, ShrinkError, TraceError, register_rule, shrink, trace
from lightning_prune.graph import rules
from lightning_prune.graph.channels import ChannelGraph
from lightning_prune.surgery import Shrunk, resized
from lightning_prune.surgery.verify import Output, largest_difference
from tests.helpers import difference, masked_copy, random_keep, randomise, run


@torch.library.custom_op("lightning_prune_tests::centre", mutates_args=())
def centre(x: torch.Tensor) -> torch.Tensor:
    """Every channel depends on all of them."""
    return x - x.mean(1, keepdim=True) + 1


centre.register_fake(torch.empty_like)
centre.register_autograd(lambda ctx, gradient: gradient - gradient.mean(1, keepdim=True))


@pytest.fixture
def lying_rule(monkeypatch):
    """Claims that an operator treats each channel by itself, which it does not."""
    monkeypatch.setattr(rules, "_USER_RULES", {})
    register_rule("lightning_prune_tests::centre", lambda call: [call.planes(call.tensors[0])])


class Centred(nn.Module):
    """One harmless group, and one that goes through the operator with the lying rule."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second, self.third = (
            nn.Linear(4, 6),
            nn.BatchNorm1d(6),
            nn.Linear(6, 8),
            nn.Linear(8, 2),
        )

    def forward(self, x):
        return self.third(centre(self.second(self.norm(self.first(x)).relu())))


class Narrow(nn.Module):
    """Does something else once its first layer has two channels or fewer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        hidden = self.first(x)
        hidden = hidden.relu() if hidden.shape[1] > 2 else hidden.tanh()
        return self.third(self.second(hidden).relu())


class Moody(nn.Module):
    """What becomes of its hidden channels depends on flags."""

    def __init__(self):
        super().__init__()
        self.first, self.beside, self.second = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)
        self.normalise, self.saturate, self.add = False, False, False

    def forward(self, x):
        hidden = self.first(x) + self.beside(x) if self.add else self.first(x)
        hidden = hidden.tanh() if self.saturate else hidden.relu()
        return self.second(hidden.softmax(1) if self.normalise else hidden)


def conv_net():
    return randomise(
        nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 3),
        )
    )


def images():
    return torch.randn(4, 2, 4, 4)


def one_step(model, inputs, build=torch.optim.Adam):
    """An optimizer with state; the gradients stay."""
    optimizer = build(model.parameters())
    model(inputs).square().mean().backward()
    optimizer.step()
    return optimizer


class Snapshot:
    """Everything there is to know of a model and its optimizer: which objects, and what is in them."""

    def __init__(self, model, *optimizers):
        self.objects = [dict(vars(module)) for module in model.modules()]
        self.members = [(dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in model.modules()]
        self.plain = [
            {k: copy.copy(v) for k, v in vars(m).items() if isinstance(v, (int, float, str, tuple, list, type(None)))}
            for m in model.modules()
        ]
        self.hooks = [{k: len(v) for k, v in vars(m).items() if "_hooks" in k} for m in model.modules()]
        self.tensors = [*model.parameters(), *model.buffers()]
        self.values = [tensor.detach().clone() for tensor in self.tensors]
        self.pointers = [tensor.data_ptr() for tensor in self.tensors]
        self.gradients = [p.grad for p in model.parameters()]
        self.gradient_values = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        self.optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
        self.random = (torch.get_rng_state(), random.getstate(), np.random.get_state())


def same(a, b):
    """Bit for bit, in nested containers; objects of other kinds must be the same object."""
    if isinstance(a, torch.Tensor):
        return a is b or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or a == b


def touched(before, after):
    """Names of what is not as it was."""
    changed = [name for name in vars(before) if not same(getattr(before, name), getattr(after, name))]
    same_objects = [
        all(x is y for x, y in zip(getattr(before, name), getattr(after, name), strict=True))
        for name in ("tensors", "gradients")
    ]
    return changed if all(same_objects) else [*changed, "identity"]


class TestExact:
    def test_the_shrunk_network_computes_what_the_masked_one_does(self):
        model, inputs = conv_net(), images()
        graph = trace(model, inputs)
        keep = random_keep(graph)
        expected = run(masked_copy(model, graph, keep), inputs)
        shrunk = shrink(model, graph, keep)
        assert difference(expected, run(model, inputs)) < 1e-5
        assert 0 <= shrunk.error < 1e-5
        assert [model[0].weight.shape[0], model[4].weight.shape[0]] == [len(keep["0"]), len(keep["4"])]

    def test_indices_masks_and_lists_say_the_same(self):
        results = []
        for keep in (torch.tensor([5, 1, 1, 2]), torch.tensor([0, 1, 1, 0, 0, 1, 0, 0], dtype=torch.bool), [1, 2, 5]):
            torch.manual_seed(1)
            model, inputs = conv_net(), images()
            before = model[0].weight.detach().clone()
            shrink(model, trace(model, inputs), {"0": keep})
            assert torch.equal(model[0].weight, before[[1, 2, 5]])
            results.append(model.state_dict())
        assert same(results[0], results[1])
        assert same(results[0], results[2])

    def test_keeping_all_does_nothing(self):
        model = conv_net()
        graph = trace(model, images())
        before = Snapshot(model)
        assert shrink(model, graph, {"0": torch.ones(8, dtype=torch.bool)}) == Shrunk()
        assert touched(before, Snapshot(model)) == []

    def test_weights_may_move_between_trace_and_shrink(self):
        model, inputs = conv_net(), images()
        graph = trace(model, inputs)
        one_step(model, inputs, torch.optim.SGD)
        randomise(model)
        keep = random_keep(graph)
        expected = run(masked_copy(model, graph, keep), inputs)
        shrink(model, graph, keep)
        assert difference(expected, run(model, inputs)) < 1e-5

    def test_a_program_that_moved_on_is_compared_afresh(self):
        """Another activation, as wide as the old one: the groups are what they were."""
        model, inputs = Moody(), torch.randn(3, 4)
        graph = trace(model, inputs)
        model.saturate = True
        keep = {"first": torch.tensor([0, 3, 4])}
        expected = run(masked_copy(model, graph, keep), inputs)
        shrink(model, graph, keep)
        assert difference(expected, run(model, inputs)) < 1e-5


class TestAllOrNothing:
    def refused(self, model, inputs, keep, words, **arguments):
        graph = trace(model, inputs)
        optimizer = one_step(model, inputs)
        before = Snapshot(model, optimizer)
        with pytest.raises(ShrinkError) as raised:
            shrink(model, graph, keep, [optimizer], **arguments)
        assert [word for word in words if word not in str(raised.value)] == []
        assert touched(before, Snapshot(model, optimizer)) == []
        one_step(model, inputs)

    @pytest.mark.usefixtures("lying_rule")
    def test_a_lying_rule_is_caught_by_the_numbers(self):
        keep = {"first": torch.tensor([0, 1, 4]), "second": torch.tensor([0, 2, 3])}
        words = ["cutting second is not exact", "differs from the masked one by", "Nothing was changed", "this group"]
        self.refused(Centred(), torch.randn(5, 4), keep, words)

    @pytest.mark.usefixtures("lying_rule")
    def test_the_other_group_can_be_cut(self):
        model, inputs = Centred(), torch.randn(5, 4)
        shrink(model, trace(model, inputs), {"first": torch.tensor([0, 1, 4])})
        assert model.first.weight.shape == (3, 4)

    @pytest.mark.usefixtures("lying_rule")
    def test_without_verification_the_numbers_are_not_compared(self):
        model, inputs = Centred(), torch.randn(5, 4)
        shrunk = shrink(model, trace(model, inputs), {"second": torch.tensor([0, 2, 3])}, verify=False)
        assert shrunk.error is None
        assert model.second.weight.shape == (3, 6)

    @pytest.mark.parametrize("verify", [True, False])
    def test_another_program_is_caught_with_and_without_verification(self, verify):
        keep = {"first": torch.tensor([1, 2]), "second": torch.tensor([0, 5])}
        words = ["cutting first is not exact", "executed tanh where the full network executes relu", "test_shrink.py"]
        self.refused(Narrow(), torch.randn(5, 4), keep, words, verify=verify)

    @pytest.mark.parametrize("flag", ["normalise", "add"])
    def test_a_network_that_is_wired_otherwise_by_now(self, flag):
        """The channels may not go any more, or only together with others."""
        model, inputs = Moody(), torch.randn(5, 4)
        graph = trace(model, inputs)
        setattr(model, flag, True)
        optimizer = one_step(model, inputs)
        before = Snapshot(model, optimizer)
        with pytest.raises(ShrinkError, match=r"group 'first' is not what it was .* trace it again"):
            shrink(model, graph, {"first": torch.tensor([1, 2])}, [optimizer])
        assert touched(before, Snapshot(model, optimizer)) == []

    def test_an_optimizer_that_fails_undoes_the_cut(self):
        model, inputs = conv_net(), images()
        graph, optimizer = trace(model, inputs), one_step(model, inputs)
        optimizer.state[model[0].weight]["odd"] = torch.ones(3)
        before = Snapshot(model, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="starts afresh"):
                shrink(model, graph, {"0": torch.tensor([1, 2])}, [optimizer])
        assert touched(before, Snapshot(model, optimizer)) == []


class TestKeepIsChecked:
    @pytest.mark.parametrize(
        ("keep", "words"),
        [
            ({"frist": torch.tensor([0])}, "no channel group is called 'frist'; did you mean 'first'?"),
            ({"xyz": torch.tensor([0])}, "no channel group is called 'xyz'; there are: first, second"),
            ({"first": torch.tensor([], dtype=torch.long)}, "'first' would lose all of its 8 channels"),
            ({"first": torch.zeros(8, dtype=torch.bool)}, "'first' would lose all of its 8 channels"),
            ({"first": torch.tensor([0, 8])}, r"has channels 0 to 7, asked to keep \[0, 8\]"),
            ({"first": torch.tensor([-1, 2])}, r"has channels 0 to 7, asked to keep \[-1, 2\]"),
            (
                {"first": torch.ones(7, dtype=torch.bool)},
                "mask of group 'first' has length 7, but the group 8 channels",
            ),
            ({"first": torch.tensor([0.0, 1.0])}, "must be a list of channel numbers or a bool mask"),
            ({"first": torch.ones(8)}, "must be a list of channel numbers or a bool mask"),
            ({"first": torch.tensor([[0, 1]])}, "must be a list of channel numbers or a bool mask"),
            ({"first": torch.tensor(3)}, "must be a list of channel numbers or a bool mask"),
        ],
    )
    @pytest.mark.parametrize(
        "act", [shrink, lambda *arguments: resized(*arguments).__enter__()], ids=["shrink", "resized"]
    )
    def test_wrong_keep_is_refused_in_words(self, act, keep, words):
        model = Narrow()
        graph = trace(model, torch.randn(3, 4))
        before = Snapshot(model)
        with pytest.raises(ConfigurationError, match=words):
            act(model, graph, {"second": torch.tensor([0, 1]), **keep})
        assert touched(before, Snapshot(model)) == []

    def test_a_graph_serves_for_one_shrink(self):
        model, inputs = Narrow(), torch.randn(3, 4)
        graph = trace(model, inputs)
        shrink(model, graph, {"second": torch.tensor([0, 1])})
        with pytest.raises(ConfigurationError, match=r"second\.weight was changed since .* trace it again"):
            shrink(model, graph, {"first": torch.tensor([0, 1, 2])})
        shrink(model, trace(model, inputs), {"first": torch.tensor([0, 1, 2])})
        assert model.second.weight.shape == (2, 3)

    def test_a_new_parameter_makes_the_graph_stale(self):
        model = Narrow()
        graph = trace(model, torch.randn(3, 4))
        model.first.weight = nn.Parameter(torch.randn(8, 4))
        with pytest.raises(ConfigurationError, match=r"first\.weight was changed since"):
            shrink(model, graph, {"first": torch.tensor([0, 1, 2])})

    def test_the_graph_of_another_network(self):
        graph = trace(Narrow(), torch.randn(3, 4))
        with pytest.raises(ConfigurationError, match="traced on another network"):
            shrink(Narrow(), graph, {"first": torch.tensor([0, 1, 2])})

    def test_a_graph_without_evidence(self):
        with pytest.raises(ConfigurationError, match="not made by trace"):
            shrink(Narrow(), ChannelGraph({}), {"first": torch.tensor([0])})


class Attention(nn.Module):
    """Remembers its number of heads, and sizes that follow from it."""

    def __init__(self, width=8, heads=4):
        super().__init__()
        self.heads, self.shape = heads, (heads, width // heads)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(batch, length, self.shape[0] * self.shape[1]))


class TestAttributes:
    def shrunk(self, model, inputs, keep):
        randomise(model)
        graph = trace(model, inputs)
        expected = run(masked_copy(model, graph, keep), inputs)
        shrink(model, graph, keep)
        assert difference(expected, run(model, inputs)) < 1e-5
        return model

    def test_depthwise_convolution(self):
        layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)]
        net = self.shrunk(nn.Sequential(*layers), torch.randn(2, 3, 8, 8), {"0": torch.tensor([0, 2, 3, 6, 7])})
        assert (net[0].in_channels, net[0].out_channels, net[0].groups) == (3, 5, 1)
        assert (net[1].in_channels, net[1].out_channels, net[1].groups) == (5, 5, 5)
        assert net[2].num_features == 5
        assert (net[3].in_channels, net[3].out_channels, net[3].groups) == (5, 4, 1)

    def test_grouped_convolution_loses_whole_groups(self):
        """Four groups of two channels in and three out; the first and the last one stay."""
        layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 4, 1)]
        before = layers[1].weight.detach().clone()
        net = self.shrunk(nn.Sequential(*layers), torch.randn(2, 3, 8, 8), {"0": torch.tensor([0, 3])})
        assert net[0].out_channels == 4
        assert (net[1].in_channels, net[1].out_channels, net[1].groups) == (4, 6, 2)
        assert torch.equal(net[1].weight, before[[0, 1, 2, 9, 10, 11]])
        assert net[3].in_channels == 6

    def test_group_norm_loses_whole_groups(self):
        layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 4, 1)]
        net = self.shrunk(nn.Sequential(*layers), torch.randn(2, 3, 8, 8), {"0": torch.tensor([0, 1, 3])})
        assert (net[1].num_groups, net[1].num_channels) == (3, 6)
        assert net[3].in_channels == 6

    def test_a_number_of_heads_that_a_view_uses(self):
        model = self.shrunk(Attention(), torch.randn(2, 5, 8), {"qkv": torch.tensor([0, 2, 3])})
        assert model.heads == 3
        assert model.shape == (3, 2)
        assert type(model.shape) is tuple
        assert {type(model.heads), type(model.shape[0]), type(model.qkv.out_features)} == {int}
        assert (model.qkv.out_features, model.out.in_features, model.out.out_features) == (18, 6, 8)

    def test_the_result_lists_what_was_rewritten(self):
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        shrunk = shrink(model, trace(model, torch.randn(3, 4)), {"0": torch.tensor([1, 4])})
        assert {tuple(setting): value for setting, value in shrunk.settings.items()} == {
            ("0", "out_features", None): 2,
            ("2", "in_features", None): 2,
        }
        assert {name: [(c.dim, c.positions.tolist()) for c in cuts] for name, cuts in shrunk.cuts.items()} == {
            "0.weight": [(0, [1, 4])],
            "0.bias": [(0, [1, 4])],
            "2.weight": [(1, [1, 4])],
        }


class Restless(nn.Module):
    """Caches, counts and draws random numbers of every kind in its forward pass."""

    def __init__(self):
        super().__init__()
        self.net, self.calls, self.cache = conv_net(), 0, None
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.cache = x
        self.seen += 1
        return self.net(x) + torch.rand(1) + random.random() + np.random.rand()


class TestNoTrace:
    @pytest.mark.parametrize("build", [conv_net, Restless])
    def test_trace_leaves_the_model_as_it_was(self, build):
        model, inputs = build(), images()
        optimizer = one_step(model, inputs)
        next(iter(model.children())).eval()
        next(iter(model.parameters())).requires_grad_(False)
        handle = model.register_forward_hook(lambda *_: None)
        flags = [p.requires_grad for p in model.parameters()]
        before = Snapshot(model, optimizer)
        trace(model, inputs)
        assert touched(before, Snapshot(model, optimizer)) == []
        assert [p.requires_grad for p in model.parameters()] == flags
        handle.remove()

    def test_so_does_a_trace_that_fails(self):
        model, too_large = conv_net(), torch.randn(4, 2, 5, 5)
        optimizer = one_step(model, images())
        before = Snapshot(model, optimizer)
        with pytest.raises(TraceError):
            trace(model, too_large)
        assert touched(before, Snapshot(model, optimizer)) == []

    def test_shrink_draws_no_random_numbers_and_keeps_modes(self):
        model, inputs = Restless(), images()
        graph = trace(model, inputs)
        model.net[1].eval()
        modes, state = [m.training for m in model.modules()], Snapshot(model).random
        calls, seen, norm = model.calls, model.seen.clone(), model.net[1].num_batches_tracked.clone()
        shrink(model, graph, {"net.0": torch.tensor([0, 1])})
        assert [m.training for m in model.modules()] == modes
        assert same(Snapshot(model).random, state)
        assert (model.calls, model.seen, model.net[1].num_batches_tracked) == (calls, seen, norm)


class TestResized:
    def test_inside_small_afterwards_as_before(self):
        model, inputs = conv_net(), images()
        graph, optimizer = trace(model, inputs), one_step(model, inputs)
        before = Snapshot(model, optimizer)
        keep = {"0": torch.tensor([0, 3]), "4": torch.tensor([1, 2, 5])}
        expected = run(masked_copy(model, graph, keep), inputs)
        with resized(model, graph, keep):
            assert (model[0].out_channels, model[1].num_features, model[4].in_channels) == (2, 2, 2)
            assert model[7].weight.shape == (3, 48)
            assert difference(expected, run(model, inputs)) < 1e-5
        assert touched(before, Snapshot(model, optimizer)) == []

    def test_an_error_inside_restores_too(self):
        model = conv_net()
        graph, before = trace(model, images()), Snapshot(model)
        with pytest.raises(KeyboardInterrupt), resized(model, graph, {"0": torch.tensor([0, 3])}):
            raise KeyboardInterrupt
        assert touched(before, Snapshot(model)) == []

    def test_widths_that_cannot_be_run(self):
        model, before_cut = Narrow(), torch.randn(3, 4)
        graph, before = trace(model, before_cut), Snapshot(model)
        with (
            pytest.raises(ShrinkError, match="cannot be run with these widths"),
            resized(model, graph, {"first": torch.tensor([0])}),
        ):
            pytest.fail("the body must not run")
        assert touched(before, Snapshot(model)) == []

    def test_nothing_to_cut(self):
        model = conv_net()
        graph, before = trace(model, images()), Snapshot(model)
        with resized(model, graph, {"0": torch.arange(8)}):
            assert touched(before, Snapshot(model)) == []


class Branching(nn.Module):
    """Hands out minus infinity for every class that is not allowed."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(self.first(x).relu()).masked_fill(torch.tensor([False, True, False]), float("-inf"))


NAN, INF = float("nan"), float("inf")


class TestDifference:
    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    def test_what_is_not_finite_in_both_does_not_count(self, value):
        a, b = torch.tensor([1.0, value, 4.0]), torch.tensor([1.0, value, 4.0002])
        assert largest_difference([Output(a, 1e-4)], [Output(b, 1e-4)]) == pytest.approx(5e-5, rel=1e-2)

    @pytest.mark.parametrize(("masked", "shrunk"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (-INF, INF), (INF, NAN)])
    def test_what_is_not_finite_in_one_of_them_does(self, masked, shrunk):
        a, b = torch.tensor([2.0, masked]), torch.tensor([2.0, shrunk])
        with pytest.raises(ShrinkError, match="differs from the masked one"):
            largest_difference([Output(a, 1e-4)], [Output(b, 1e-4)])

    def test_too_large_a_difference(self):
        a, b = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 4.002])
        with pytest.raises(ShrinkError, match=r"by 0\.0005 of the largest output"):
            largest_difference([Output(a, 1e-4)], [Output(b, 1e-4)])

    def test_imaginary_parts_count(self):
        a, b = torch.tensor([1 + 1j]), torch.tensor([1 + 2j])
        with pytest.raises(ShrinkError, match="differs from the masked one"):
            largest_difference([Output(a, 1e-4)], [Output(b, 1e-4)])

    def test_a_complex_network_can_be_shrunk(self):
        model = nn.Sequential(nn.Linear(4, 8, dtype=torch.complex64), nn.Linear(8, 2, dtype=torch.complex64))
        inputs = torch.randn(3, 4, dtype=torch.complex64)
        shrunk = shrink(model, trace(model, inputs), {"0": torch.tensor([0, 2, 3, 5, 7])})
        assert model[1].weight.shape == (2, 5)
        assert shrunk.error < 1e-5

    def test_zeros_are_compared_absolutely(self):
        zero = Output(torch.zeros(3), 1e-4)
        assert largest_difference([zero], [zero]) == 0
        with pytest.raises(ShrinkError):
            largest_difference([zero], [Output(torch.full((3,), 0.1), 1e-4)])

    def test_other_tensors_than_before(self):
        one = Output(torch.zeros(3), 1e-4)
        with pytest.raises(ShrinkError, match="hands out 2 tensors, the masked one 1"):
            largest_difference([one], [one, one])

    def test_a_network_that_hands_out_infinities_can_be_shrunk(self):
        model, inputs = Branching(), torch.randn(3, 4)
        shrunk = shrink(model, trace(model, inputs), {"first": torch.tensor([0, 5])})
        assert shrunk.error < 1e-5
        assert model(inputs)[:, 1].tolist() == [-INF] * 3

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import shrink, trace
from lightning_prune.graph.channels import ChannelGroup, Slot
from lightning_prune.surgery.resize import Cut, plan_cuts, read, replace, resize, resize_optimizers, restore

ROWS, COLUMNS = [0, 2, 5], [1, 3]


def cut(dim, positions):
    return Cut(dim, torch.tensor(positions))


def layer():
    """A linear layer of shape [6, 4], and the cut that leaves rows ``ROWS`` and columns ``COLUMNS`` of it."""
    linear = nn.Linear(4, 6)
    cuts = {"weight": [cut(0, ROWS), cut(1, COLUMNS)], "bias": [cut(0, ROWS)]}
    return linear, dict(linear.named_parameters()), cuts


class TestRead:
    def test_reads_positions_along_each_dimension(self):
        tensor = torch.arange(24.0).reshape(6, 4)
        expected = torch.tensor([[1.0, 3.0], [9.0, 11.0], [21.0, 23.0]])
        assert torch.equal(read(tensor, [cut(0, ROWS), cut(1, COLUMNS)]), expected)
        assert torch.equal(tensor, torch.arange(24.0).reshape(6, 4))

    def test_repeated_positions_widen(self):
        tensor = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        expected = torch.tensor([[1.0, 2.0], [3.0, 4.0], [3.0, 4.0], [1.0, 2.0]])
        assert torch.equal(read(tensor, [cut(0, [0, 1, 1, 0])]), expected)

    def test_result_does_not_share_memory_or_need_gradients(self):
        parameter = nn.Parameter(torch.ones(3, 2))
        for cuts in ([cut(0, [0, 1, 2])], [cut(0, [0])]):
            result = read(parameter, cuts)
            assert not result.requires_grad
            assert result.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr()

    @pytest.mark.parametrize(
        ("shape", "layout"), [((6, 4, 3, 3), torch.channels_last), ((6, 4, 2, 3, 3), torch.channels_last_3d)]
    )
    def test_channels_last_stays(self, shape, layout):
        tensor = torch.randn(shape).contiguous(memory_format=layout)
        result = read(tensor, [cut(0, ROWS), cut(1, COLUMNS)])
        assert result.is_contiguous(memory_format=layout)
        assert not result.is_contiguous()
        assert torch.equal(result, tensor[ROWS][:, COLUMNS])

    def test_the_default_layout_stays_too(self):
        result = read(torch.randn(6, 4, 3, 3), [cut(1, COLUMNS)])
        assert result.is_contiguous()
        assert not result.is_contiguous(memory_format=torch.channels_last)

    def test_sparse_tensor_is_cut_as_a_sparse_one(self):
        embedding = nn.Embedding(5, 4, sparse=True)
        (embedding(torch.tensor([1, 3, 3])) * torch.arange(4.0)).sum().backward()
        dense = embedding.weight.grad.to_dense()
        result = read(embedding.weight.grad, [cut(1, COLUMNS)])
        assert result.is_sparse
        assert torch.equal(result.to_dense(), dense[:, COLUMNS])


class TestReplace:
    def test_the_parameter_is_the_same_object(self):
        linear = nn.Linear(4, 6)
        parameter, value = linear.weight, torch.randn(3, 4)
        gradient = torch.randn(3, 4)
        replace(parameter, value, gradient)
        assert linear.weight is parameter
        assert isinstance(parameter, nn.Parameter)
        assert parameter.requires_grad
        assert parameter.is_leaf
        assert torch.equal(parameter, value)
        assert parameter.grad is gradient

    def test_an_old_gradient_goes(self):
        parameter = nn.Parameter(torch.ones(3))
        parameter.sum().backward()
        replace(parameter, torch.ones(2))
        assert parameter.grad is None

    @pytest.mark.parametrize("trainable", [True, False])
    def test_it_is_trained_or_not_as_before(self, trainable):
        parameter = nn.Parameter(torch.ones(3), requires_grad=trainable)
        replace(parameter, torch.ones(2))
        assert parameter.requires_grad == trainable


class TestResize:
    def test_tensors_and_gradients_are_cut_in_place(self):
        linear, tensors, cuts = layer()
        linear(torch.randn(5, 4)).square().sum().backward()
        before = {name: (p.detach().clone(), p.grad.clone()) for name, p in tensors.items()}
        weight, bias = linear.weight, linear.bias
        resize(tensors, cuts)
        assert linear.weight is weight
        assert linear.bias is bias
        assert torch.equal(weight, before["weight"][0][ROWS][:, COLUMNS])
        assert torch.equal(weight.grad, before["weight"][1][ROWS][:, COLUMNS])
        assert torch.equal(bias, before["bias"][0][ROWS])
        assert torch.equal(bias.grad, before["bias"][1][ROWS])

    def test_widens_where_positions_repeat(self):
        linear, tensors, _ = layer()
        before = linear.bias.detach().clone()
        resize(tensors, {"bias": [cut(0, [0, 1, 2, 3, 4, 5, 5, 0])]})
        assert torch.equal(linear.bias, torch.cat([before, before[[5, 0]]]))

    def test_backward_works_although_an_old_graph_is_alive(self):
        """An old graph keeps the gradient accumulator alive, and that one remembers the old size."""
        linear, tensors, cuts = layer()
        old_loss = linear(torch.randn(5, 4)).sum()
        resize(tensors, cuts)
        inputs = torch.randn(5, 2)
        linear(inputs).sum().backward()
        torch.testing.assert_close(linear.weight.grad, inputs.sum(0).expand(3, 2))
        assert torch.equal(linear.bias.grad, torch.full((3,), 5.0))
        assert old_loss.grad_fn is not None

    def test_new_gradients_add_to_the_cut_ones(self):
        linear, tensors, cuts = layer()
        old_loss = linear(torch.randn(5, 4)).sum()
        old_loss.backward(retain_graph=True)
        stale = linear.bias.grad[ROWS].clone()
        resize(tensors, cuts)
        linear(torch.randn(7, 2)).sum().backward()
        assert torch.equal(linear.bias.grad, stale + 7)

    def test_buffers_are_cut_too(self):
        norm = nn.BatchNorm1d(6)
        norm.running_mean.copy_(torch.arange(6.0))
        running = norm.running_mean
        resize(dict(norm.named_buffers()), {"running_mean": [cut(0, ROWS)]})
        assert norm.running_mean is running
        assert running.tolist() == [0.0, 2.0, 5.0]

    def test_restore_puts_everything_back(self):
        linear, tensors, cuts = layer()
        linear(torch.randn(5, 4)).sum().backward()
        before = {name: (p, p.detach().clone(), p.grad, p.grad.clone(), p.data_ptr()) for name, p in tensors.items()}
        restore(resize(tensors, cuts))
        for name, (parameter, value, gradient, content, pointer) in before.items():
            assert getattr(linear, name) is parameter
            assert torch.equal(parameter, value)
            assert parameter.grad is gradient
            assert torch.equal(gradient, content)
            assert parameter.data_ptr() == pointer
        linear(torch.randn(5, 4)).sum().backward()

    def test_all_or_nothing(self):
        linear, tensors, cuts = layer()
        linear(torch.randn(5, 4)).sum().backward()
        before = {name: (p.detach().clone(), p.grad, p.grad.clone()) for name, p in tensors.items()}
        with pytest.raises((IndexError, RuntimeError)):
            resize(tensors, {"weight": cuts["weight"], "bias": [cut(0, [0, 6])]})
        for name, (value, gradient, content) in before.items():
            assert torch.equal(tensors[name], value)
            assert tensors[name].grad is gradient
            assert torch.equal(gradient, content)


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
        self.right.weight = self.left.weight

    def forward(self, x):
        return self.head(self.left(x).relu() + self.right(x).tanh())


def test_tied_weights_are_cut_once():
    model = Tied()
    weight, before = model.left.weight, model.left.weight.detach().clone()
    shrunk = shrink(model, trace(model, torch.randn(3, 4)), {"left": torch.tensor(ROWS)})
    assert model.left.weight is weight
    assert model.right.weight is weight
    assert torch.equal(weight, before[ROWS])
    assert [name for name in shrunk.cuts if name.endswith("t.weight")] == ["left.weight"]


class TestPlan:
    def test_groups_side_by_side_in_one_dimension_are_cut_together(self):
        """Two groups of three and two channels make up the five inputs of a layer, two inputs for each channel."""
        first = ChannelGroup("a", (Slot("w", 1, torch.tensor([[0, 5], [1, 6], [2, 7]]), "consumer"),), ())
        second = ChannelGroup("b", (Slot("w", 1, torch.tensor([[3, 8], [4, 9]]), "consumer"),), ())
        keep = {"a": torch.tensor([0, 2]), "b": torch.tensor([1])}
        cuts = plan_cuts({"a": first, "b": second}, {"w": torch.zeros(2, 10)}, keep)
        assert [(c.dim, c.positions.tolist()) for c in cuts["w"]] == [(1, [0, 2, 4, 5, 7, 9])]

    def test_what_no_group_owns_stays(self):
        group = ChannelGroup("a", (Slot("w", 0, torch.tensor([[1], [3]]), "producer"),), ())
        cuts = plan_cuts({"a": group}, {"w": torch.zeros(5, 2), "v": torch.zeros(5)}, {"a": torch.tensor([1])})
        assert list(cuts) == ["w"]
        assert cuts["w"][0].positions.tolist() == [0, 2, 3, 4]

    def test_nothing_is_planned_where_all_is_kept(self):
        group = ChannelGroup("a", (Slot("w", 0, torch.tensor([[0], [1]]), "producer"),), ())
        assert plan_cuts({"a": group}, {"w": torch.zeros(2, 2)}, {"a": torch.tensor([0, 1])}) == {}


OPTIMIZERS = {
    "SGD": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), {"momentum_buffer"}),
    "Adam": (lambda p: torch.optim.Adam(p, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "AdamW-foreach": (lambda p: torch.optim.AdamW(p, foreach=True), {"exp_avg", "exp_avg_sq"}),
    "AdamW-fused": (lambda p: torch.optim.AdamW(p, fused=True), {"exp_avg", "exp_avg_sq"}),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, 0.1), {"sum"}),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9), {"square_avg", "grad_avg"}),
    "Adadelta": (lambda p: torch.optim.Adadelta(p), {"square_avg", "acc_delta"}),
    "NAdam": (lambda p: torch.optim.NAdam(p), {"exp_avg", "exp_avg_sq"}),
    "Adafactor": (lambda p: torch.optim.Adafactor(p), {"row_var", "col_var"}),
}


def sliced(value, shape, rows, columns):
    """What the state of a parameter of the given shape is after the cut, by plain indexing."""
    if not isinstance(value, Tensor) or value.dim() != len(shape):
        return value
    if value.shape[0] == shape[0]:
        value = value[rows]
    return value[:, columns] if value.dim() > 1 and value.shape[1] == shape[1] else value


def same_state(found, expected):
    """Whether two states of one parameter are equal bit for bit."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value
        for key, value in expected.items()
    )


class TestOptimizers:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_state_is_cut_like_the_parameter_and_training_goes_on(self, name):
        build, keys = OPTIMIZERS[name]
        linear, tensors, cuts = layer()
        optimizer = build(linear.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            linear(torch.randn(5, 4)).square().sum().backward()
            optimizer.step()
        assert keys <= optimizer.state[linear.weight].keys()
        before = copy.deepcopy([optimizer.state[p] for p in (linear.weight, linear.bias)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resize_optimizers([optimizer], tensors, cuts, resize(tensors, cuts))
        expected = [
            {key: sliced(value, shape, ROWS, COLUMNS) for key, value in state.items()}
            for state, shape in zip(before, [(6, 4), (6,)], strict=True)
        ]
        assert same_state(optimizer.state[linear.weight], expected[0])
        assert same_state(optimizer.state[linear.bias], expected[1])
        optimizer.zero_grad()
        linear(torch.randn(5, 2)).square().sum().backward()
        optimizer.step()
        assert linear.weight.shape == (3, 2)

    def test_factored_state_of_adafactor_is_cut_along_what_it_has(self):
        linear, tensors, cuts = layer()
        optimizer = torch.optim.Adafactor(linear.parameters())
        linear(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        resize_optimizers([optimizer], tensors, cuts, resize(tensors, cuts))
        state = optimizer.state[linear.weight]
        assert (tuple(state["row_var"].shape), tuple(state["col_var"].shape)) == ((3, 1), (1, 2))

    def test_channels_last_state_stays(self):
        conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(conv.parameters())
        conv(torch.randn(2, 4, 5, 5)).sum().backward()
        optimizer.step()
        tensors, cuts = dict(conv.named_parameters()), {"weight": [cut(0, ROWS)]}
        resize_optimizers([optimizer], tensors, cuts, resize(tensors, cuts))
        for tensor in (conv.weight, conv.weight.grad, optimizer.state[conv.weight]["exp_avg"]):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            assert not tensor.is_contiguous()

    def test_parameters_that_were_not_cut_keep_their_state(self):
        linear, tensors, cuts = layer()
        optimizer = torch.optim.Adam(linear.parameters())
        linear(torch.randn(5, 4)).sum().backward()
        optimizer.step()
        state, first = optimizer.state[linear.bias], optimizer.state[linear.bias]["exp_avg"]
        del cuts["bias"]
        resize_optimizers([optimizer], tensors, cuts, resize(tensors, cuts))
        assert optimizer.state[linear.bias] is state
        assert state["exp_avg"] is first

    def test_lbfgs_starts_afresh_and_says_so(self):
        linear, tensors, cuts = layer()
        optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=2)

        def closure(inputs):
            optimizer.zero_grad()
            loss = linear(inputs).square().sum()
            loss.backward()
            return loss.detach()

        optimizer.step(lambda: closure(torch.randn(5, 4)))
        with pytest.warns(UserWarning, match="LBFGS keeps its history .* starts afresh") as caught:
            resize_optimizers([optimizer], tensors, cuts, resize(tensors, cuts))
        assert len(caught) == 1
        assert not optimizer.state
        inputs = torch.randn(5, 2)
        before = float(closure(inputs))
        optimizer.step(lambda: closure(inputs))
        assert float(closure(inputs)) < before

    def test_a_fresh_lbfgs_has_nothing_to_lose(self):
        linear, tensors, cuts = layer()
        optimizer = torch.optim.LBFGS(linear.parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resize_optimizers([optimizer], tensors, cuts, resize(tensors, cuts))

    @pytest.mark.parametrize(
        "odd",
        [torch.ones(3), torch.ones(6, 6), [torch.ones(6, 4)], {"inner": torch.ones(2)}],
        ids=["vector", "square", "list", "dict"],
    )
    def test_odd_state_is_dropped_for_that_parameter_with_one_warning(self, odd):
        linear, tensors, cuts = layer()
        optimizer = torch.optim.Adam(linear.parameters())
        linear(torch.randn(5, 4)).sum().backward()
        optimizer.step()
        optimizer.state[linear.weight].update(odd=odd, other=odd)
        bias = optimizer.state[linear.bias]["exp_avg"].clone()
        with pytest.warns(UserWarning, match="Adam keeps state for weight .* starts afresh") as caught:
            resize_optimizers([optimizer], tensors, cuts, resize(tensors, cuts))
        assert len(caught) == 1
        assert not optimizer.state[linear.weight]
        assert torch.equal(optimizer.state[linear.bias]["exp_avg"], bias[ROWS])
        optimizer.zero_grad()
        linear(torch.randn(5, 2)).sum().backward()
        optimizer.step()

    def test_plain_numbers_and_flags_in_the_state_stay(self):
        linear, tensors, cuts = layer()
        optimizer = torch.optim.SGD(linear.parameters(), 0.1)
        plain = {"calls": 7, "name": "w", "history": [1, 2, 3], "scale": torch.tensor(2.0)}
        optimizer.state[linear.weight].update(plain)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resize_optimizers([optimizer], tensors, cuts, resize(tensors, cuts))
        assert same_state(optimizer.state[linear.weight], plain)

    def test_all_or_nothing(self):
        """Whoever turns warnings into errors finds no optimizer changed."""
        linear, tensors, cuts = layer()
        first, second = torch.optim.Adam(linear.parameters()), torch.optim.Adam(linear.parameters())
        linear(torch.randn(5, 4)).sum().backward()
        first.step()
        second.step()
        second.state[linear.bias]["odd"] = torch.ones(4)
        before = copy.deepcopy([[o.state[p] for p in (linear.weight, linear.bias)] for o in (first, second)])
        saved = resize(tensors, cuts)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="starts afresh"):
                resize_optimizers([first, second], tensors, cuts, saved)
        for optimizer, states in zip((first, second), before, strict=True):
            for parameter, state in zip((linear.weight, linear.bias), states, strict=True):
                assert same_state(optimizer.state[parameter], state)


def small_net(first, second):
    return nn.Sequential(
        nn.Conv2d(2, first, 3, padding=1),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * 16, 3),
    )


FIRST, SECOND = [0, 3, 4, 7], [1, 2, 5]
SIXTEENTHS = [channel * 16 + pixel for channel in SECOND for pixel in range(16)]
EVERYTHING = slice(None)
KEPT = {
    "0.weight": (FIRST, EVERYTHING),
    "0.bias": (FIRST, EVERYTHING),
    "1.weight": (FIRST, EVERYTHING),
    "1.bias": (FIRST, EVERYTHING),
    "1.running_mean": (FIRST, EVERYTHING),
    "1.running_var": (FIRST, EVERYTHING),
    "3.weight": (SECOND, FIRST),
    "3.bias": (SECOND, EVERYTHING),
    "6.weight": (EVERYTHING, SIXTEENTHS),
}
"""Rows and columns that stay of each tensor, by hand."""


def by_hand(name, tensor):
    rows, columns = KEPT.get(name, (EVERYTHING, EVERYTHING))
    return tensor[rows][:, columns].clone() if tensor.dim() > 1 else tensor[rows].clone() if tensor.dim() else tensor


def small_copy(model, build, optimizer):
    """A small network and an optimizer that never knew a shrink, with hand-sliced state loaded."""
    small = small_net(len(FIRST), len(SECOND))
    small.load_state_dict({name: by_hand(name, tensor) for name, tensor in model.state_dict().items()})
    loaded = build(small.parameters())
    state = copy.deepcopy(optimizer.state_dict())
    for number, (name, parameter) in enumerate(model.named_parameters()):
        for key, value in state["state"][number].items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state["state"][number][key] = by_hand(name, value)
    loaded.load_state_dict(state)
    return small, loaded


def train(model, optimizer, batches):
    losses = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), id="SGD"),
        pytest.param(lambda p: torch.optim.Adam(p, 0.01), id="Adam"),
        pytest.param(lambda p: torch.optim.AdamW(p, 0.01, foreach=True), id="AdamW-foreach"),
        pytest.param(lambda p: torch.optim.AdamW(p, 0.01, fused=True), id="AdamW-fused"),
    ],
)
def test_training_goes_on_bit_for_bit_as_in_a_network_that_was_always_small(build):
    batches = [(torch.randn(5, 2, 4, 4), torch.randint(3, (5,))) for _ in range(6)]
    model = small_net(8, 6)
    optimizer = build(model.parameters())
    graph = trace(model, batches[0][0])
    train(model, optimizer, batches[:3])
    small, loaded = small_copy(model, build, optimizer)
    shrink(model, graph, {"0": torch.tensor(FIRST), "3": torch.tensor(SECOND)}, [optimizer])
    assert torch.equal(train(model, optimizer, batches[3:]), train(small, loaded, batches[3:]))
    expected = small.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    for ours, theirs in zip(model.parameters(), small.parameters(), strict=True):
        assert same_state(optimizer.state[ours], loaded.state[theirs])

"""What criteria of single weights learn of a network, and what whole fits make of it."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from lightning_prune import (
    ConfigurationError,
    Cubic,
    Movement,
    OneShot,
    PruneError,
    SynFlow,
    TraceError,
    Wanda,
    WeightPruning,
)
from lightning_prune.probe import Probe
from lightning_prune.probe.source import ProbeSource
from lightning_prune.weight_budget import select_weights
from tests.fits import SmallNet, equal, fit, small_net, surface

AT_THE_START = OneShot(0, "step")


class Net(L.LightningModule):
    """Any layers under a squared error.

    Args:
        layers: The layers.
        how: ``"forward"`` calls the module itself, ``"parts"`` only its children.
        manual: Whether the step runs its backward pass itself, in two parts.
    """

    def __init__(self, *layers, how="forward", manual=False):
        super().__init__()
        self.body, self.head = nn.Sequential(*layers[:-1]), layers[-1]
        self.how, self.automatic_optimization = how, not manual

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        output = self(x) if self.how == "forward" else self.head(self.body(x))
        loss = functional.mse_loss(output, y, reduction="sum")
        if self.automatic_optimization:
            return loss
        self.manual_backward(0.25 * loss, retain_graph=True)
        self.manual_backward(0.75 * loss)
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def probe(module, *batches):
    """A probe that has seen these batches of training."""
    result = Probe(None, module)
    for batch in batches:
        result.observe(batch)
    return result


def source(module, *batches):
    weights = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    return ProbeSource(probe(module, *batches), weights, lambda value: value, {})


def linear(rows, bias=False):
    values = torch.tensor(rows)
    layer = nn.Linear(values.shape[1], values.shape[0], bias=bias)
    layer.weight.data.copy_(values)
    return layer


def pairs(count, inputs, outputs, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(5, inputs, generator=draw), torch.randn(5, outputs, generator=draw)) for _ in range(count)]


class TestHessian:
    def test_of_two_weights_by_hand(self):
        # The loss (a b - 1)^2 at a = 2, b = 3: its gradient is 2 (a b - 1) (b, a) = (30, 20), and its Hessian
        # [[2 b^2, 4 a b - 2], [4 a b - 2, 2 a^2]] = [[18, 22], [22, 8]].
        net = Net(linear([[2.0]]), linear([[3.0]]))
        asked = source(net, (torch.ones(1, 1), torch.ones(1, 1)))
        gradients = asked.gradients(1)
        assert [g.item() for g in gradients.values()] == [30.0, 20.0]
        products = asked.hessian_vector(gradients, 1)
        assert [p.item() for p in products.values()] == [18 * 30 + 22 * 20, 22 * 30 + 8 * 20]

    @pytest.mark.parametrize("manual", [False, True])
    def test_is_that_of_autograd_summed_over_batches(self, manual):
        torch.manual_seed(0)
        net = Net(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), manual=manual)
        batches, names = pairs(2, 4, 3), [name for name, _ in net.named_parameters()]
        vectors = {name: torch.randn_like(p) for name, p in net.named_parameters() if p.dim() > 1}

        def loss(*values):
            with_values = dict(zip(names, values, strict=True))
            return sum(((functional_call(net, with_values, (x,)) - y) ** 2).sum() for x, y in batches)

        full = tuple(vectors.get(name, torch.zeros_like(p)) for name, p in net.named_parameters())
        _, expected = torch.autograd.functional.hvp(loss, tuple(net.parameters()), full)
        found = source(net, *batches).hessian_vector(vectors, 2)
        for name, value in zip(names, expected, strict=True):
            if name in vectors:
                torch.testing.assert_close(found[name], value)
        assert all(p.grad is None for p in net.parameters())

    def test_of_attention(self):
        class Attention(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.mix = nn.MultiheadAttention(4, 2, batch_first=True)

            def training_step(self, batch, batch_idx):
                return self.mix(batch, batch, batch, need_weights=False)[0].square().sum()

        products = source(Attention(), torch.randn(2, 3, 4))
        vectors = {name: torch.ones_like(p) for name, p in products._weights.items()}
        assert all(value.abs().sum() > 0 for value in products.hessian_vector(vectors, 1).values())

    def test_of_a_linear_loss_is_zero(self):
        class Mean(Net):
            def training_step(self, batch, batch_idx):
                return self.head(batch[0]).sum()

        asked = source(Mean(nn.Identity(), nn.Linear(2, 1)), *pairs(1, 2, 1))
        assert asked.hessian_vector(asked.gradients(1), 1)["head.weight"].tolist() == [[0.0, 0.0]]

    def test_of_a_function_without_second_derivative_is_an_error(self):
        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return 2 * x

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, gradient):
                return 2 * gradient

        class Odd(Net):
            def forward(self, x):
                return Once.apply(super().forward(x))

        asked = source(Odd(nn.Identity(), nn.Linear(2, 1)), *pairs(1, 2, 1))
        with pytest.raises(PruneError, match=r"cannot be differentiated twice: .*once_differentiable.*\"snip\""):
            asked.hessian_vector(asked.gradients(1), 1)

    def test_of_a_step_without_a_loss_is_an_error(self):
        class Lossless(SmallNet):
            def training_step(self, batch, batch_idx):
                return None

        for criterion in ("grasp", "snip"):
            with pytest.raises(PruneError, match=r"training_step of Lossless returned no loss.*needs no gradients"):
                fit(WeightPruning(criterion, remove=0.5, schedule=AT_THE_START), module=Lossless())

    def test_weights_that_grasp_removes_leave_a_larger_gradient(self):
        torch.manual_seed(0)
        net = Net(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 5)).double()
        batches = [(x.double(), y.double()) for x, y in pairs(4, 10, 5)]
        asked = source(net, *batches)
        gradients = asked.gradients(4)
        products = asked.hessian_vector(gradients, 4)
        scores = {name: (asked._weights[name] * products[name]).detach() for name in products}

        def squared_norm_without(keep):
            masked = copy.deepcopy(net)
            for name, mask in keep.items():
                masked.get_parameter(name).data.mul_(mask)
            return sum(g.square().sum().item() for g in source(masked, *batches).gradients(4).values())

        lowest = squared_norm_without(select_weights(scores, {}, 0.02))
        highest = squared_norm_without(select_weights({name: -s for name, s in scores.items()}, {}, 0.02))
        assert lowest > squared_norm_without({}) > highest


class TestFlow:
    BATCH = torch.randn(3, 2), torch.zeros(3, 2)

    @pytest.mark.parametrize("how", ["forward", "parts"])
    def test_by_hand(self, how):
        # Paths of |W2| |W1|: [5 6; 7 8] [1 2; 3 4], each of three samples counted.
        net = Net(linear([[1.0, -2.0], [-3.0, 4.0]]), linear([[5.0, 6.0], [7.0, -8.0]]), how=how)
        flow = source(net, self.BATCH).synaptic_flow()
        assert flow["body.0.weight"].tolist() == [[36.0, 36.0], [42.0, 42.0]]
        assert flow["head.weight"].tolist() == [[9.0, 21.0], [9.0, 21.0]]
        assert all(value.dtype == torch.double for value in flow.values())

    def test_an_example_input_is_preferred(self):
        net = Net(linear([[1.0, -2.0]]), linear([[3.0]]))
        net.example_input_array = torch.zeros(1, 2)
        assert source(net, self.BATCH).synaptic_flow()["head.weight"].tolist() == [[3.0]]

    def test_is_that_of_a_positive_copy_in_evaluation_mode(self):
        net = small_net()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        positive = copy.deepcopy(net).double().eval()
        for value in positive.state_dict().values():
            value.abs_()
        positive(torch.ones(4, 2, 6, 6, dtype=torch.double)).sum().backward()
        flow = source(net, (torch.randn(4, 2, 6, 6), torch.arange(4) % 3)).synaptic_flow()
        for name, value in flow.items():
            torch.testing.assert_close(value, positive.get_parameter(name).grad)

    def test_of_a_recurrent_layer(self):
        class Recurrent(Net):
            def forward(self, x):
                return self.head(self.body[0](x[:, None])[0][:, 0])

        flow = source(Recurrent(nn.LSTM(2, 4), nn.Linear(4, 2)), self.BATCH).synaptic_flow()
        assert all((value > 0).any() for value in flow.values())

    def test_an_output_that_another_part_reads_does_not_count_twice(self):
        once = Net(linear([[1.0, 2.0]]), linear([[3.0]]), how="parts")
        assert source(once, self.BATCH).synaptic_flow()["body.0.weight"].tolist() == [[9.0, 9.0]]

    @pytest.mark.parametrize("fails", [False, True])
    def test_nothing_is_left_behind(self, fails):
        class Watchful(Net):
            def forward(self, x):
                if fails and bool((x == 1).all()):
                    raise ZeroDivisionError("ones")
                return super().forward(x)

        net = Watchful(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        parameters = list(net.parameters())
        before, hanging, modes = copy.deepcopy(net.state_dict()), surface(net), [m.training for m in net.modules()]
        asked = source(net, self.BATCH)
        if fails:
            with pytest.raises(TraceError, match=r"input of ones of Watchful failed with ZeroDivisionError: ones"):
                asked.synaptic_flow()
        else:
            asked.synaptic_flow()
        assert equal(net.state_dict(), before)
        assert surface(net) == hanging
        assert [m.training for m in net.modules()] == modes
        assert all(one is other for one, other in zip(net.parameters(), parameters, strict=True))
        assert all(p.grad is None and p.dtype == torch.float32 for p in parameters)

    def test_a_weight_outside_of_all_outputs_is_named(self):
        class Aside(Net):
            def __init__(self, *layers):
                super().__init__(*layers)
                self.table = nn.Parameter(torch.ones(2, 2))

            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) + (batch[0] @ self.table).sum()

        with pytest.raises(PruneError, match=r"no output of Aside depends on table"):
            source(Aside(nn.Linear(2, 2), nn.Linear(2, 2)), self.BATCH).synaptic_flow()

    @pytest.mark.parametrize(("rounds", "collapses"), [(100, False), (1, True)])
    def test_many_rounds_keep_a_deep_network_from_collapsing(self, rounds, collapses):
        torch.manual_seed(0)
        net = Net(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8), nn.Linear(8, 4))
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 64), torch.randn(4, 4)), 2)
        pruning = WeightPruning(SynFlow(rounds), remove=0.98, schedule=AT_THE_START, floor=1, shrink="never")
        fit(pruning, module=net, data=data, max_steps=1)
        total = sum(p.numel() for p in net.parameters() if p.dim() > 1)
        assert sum(int(mask.sum()) for mask in pruning._record["weights"].values()) == round(0.02 * total)
        masks = [pruning._record["weights"][f"{name}.weight"] for name in ("body.0", "body.2", "body.4", "head")]
        paths = torch.ones(64)
        for mask in masks:
            paths = mask.float() @ paths
        assert bool((paths > 0).any()) != collapses


class TestInputs:
    def test_of_linear_layers_by_hand(self):
        net = Net(linear([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), linear([[1.0, 1.0, 1.0]]))
        batches = [(torch.tensor([[3.0, 0.0], [4.0, 1.0]]), torch.zeros(2, 1)), (torch.zeros(1, 2), torch.zeros(1, 1))]
        norms = source(net, *batches).input_norms(2)
        assert norms["body.0.weight"].tolist() == [[5.0, 1.0]] * 3
        assert norms["head.weight"][0].tolist() == pytest.approx([5.0, 2.0, (9 + 25) ** 0.5])

    @pytest.mark.parametrize("groups", [1, 2])
    def test_of_a_convolution_is_that_of_its_patches(self, groups):
        class Images(Net):
            def forward(self, x):
                return self.head(x).mean((2, 3))

        conv, images = nn.Conv2d(4, 6, (2, 3), stride=2, padding=1, groups=groups), torch.randn(3, 4, 7, 6)
        found = source(Images(conv), (images, torch.zeros(3, 6))).input_norms(1)["head.weight"]
        patches = functional.unfold(images, (2, 3), stride=2, padding=1)  # [samples, channel and kernel, positions]
        of_groups = patches.square().sum((0, 2)).sqrt().view(groups, 4 // groups, 2, 3)
        torch.testing.assert_close(found, of_groups.repeat_interleave(6 // groups, 0))

    def test_of_other_ways_to_multiply(self):
        class Ways(L.LightningModule):
            def __init__(self):
                super().__init__()
                self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
                self.remember = nn.LSTM(4, 3, batch_first=True)
                self.left, self.right = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(4, 5))
                self.many = nn.Parameter(torch.randn(2, 4, 3))
                self.table = nn.Embedding(7, 4)

            def training_step(self, batch, batch_idx):
                x = batch
                mixed = self.mix(x, x, x)[0].sum() + self.remember(x)[0].sum() + self.table(torch.tensor([1])).sum()
                half = x[0].to(torch.bfloat16) @ self.right.to(torch.bfloat16)
                return mixed + (self.left @ x[0].T).sum() + half.sum() + torch.bmm(x, self.many).sum()

        x = torch.randint(-2, 3, (2, 6, 4)).float()
        norms = source(Ways(), x).input_norms(1)
        of_all, of_first = x.square().sum((0, 1)).sqrt(), x[0].square().sum(0).sqrt()
        torch.testing.assert_close(norms["mix.in_proj_weight"], of_all.expand(12, 4))
        torch.testing.assert_close(norms["remember.weight_ih_l0"], of_all.expand(12, 4))
        torch.testing.assert_close(norms["left"], of_first.expand(5, 4))
        torch.testing.assert_close(norms["right"], of_first[:, None].expand(4, 5))
        torch.testing.assert_close(norms["many"], x.square().sum(1).sqrt()[..., None].expand(2, 4, 3))
        assert bool((norms["table.weight"] == 1).all())
        assert norms["mix.out_proj.weight"].shape == (4, 4)

    def test_wanda_compares_weights_of_one_output(self):
        callback = WeightPruning("wanda", remove=0.5, schedule=AT_THE_START, shrink="never")
        assert callback.scope == "row"
        assert WeightPruning(Wanda(), scope="global").scope == "global"
        fit(callback, max_steps=1)
        for name, mask in callback._record["weights"].items():
            rows = mask.flatten(1).sum(1)
            assert rows.max() - rows.min() <= 1, name

    def test_wanda_takes_a_pattern(self):
        out = ["net.0", "net.3.depthwise"]
        callback = WeightPruning("wanda", 0.5, AT_THE_START, pattern=(2, 4), exclude=out, shrink="never")
        fit(callback, max_steps=1)
        for mask in callback._record["weights"].values():
            assert bool((mask.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all())
        with pytest.raises(ConfigurationError, match=r"'net\.0\.weight' of shape .* cannot take a 2:4 pattern"):
            fit(WeightPruning("wanda", 0.5, AT_THE_START, pattern=(2, 4)))


class TestRows:
    def test_every_row_keeps_its_share(self):
        scores = {"a": torch.tensor([[1.0, 2.0, 3.0, 4.0], [50.0, 60.0, 70.0, 80.0]]), "b": torch.ones(3, 2, 2)}
        kept = select_weights(scores, {}, 0.5, "row")
        assert kept["a"].tolist() == [[False, False, True, True]] * 2
        assert kept["b"].flatten(1).sum(1).tolist() == [2, 2, 2]

    def test_the_budget_is_exact_where_rows_do_not_divide(self):
        scores = {"a": torch.rand(3, 3, generator=torch.Generator().manual_seed(0))}
        kept = select_weights(scores, {}, 1 - 5 / 9, "row")["a"]
        assert kept.sum(1).tolist() == [2, 2, 1]

    def test_a_row_that_has_lost_more_gives_way_to_the_others(self):
        off = {"a": torch.tensor([[True, False, False, False], [True, True, True, True]])}
        kept = select_weights({"a": torch.ones(2, 4)}, off, 0.5, "row")["a"]
        assert kept.sum(1).tolist() == [1, 3]


class TestMovement:
    def test_the_sum_is_that_over_the_steps_of_the_fit(self):
        class Steps(L.Callback):
            """The sum of -g w as seen from outside."""

            def __init__(self):
                self.sum = 0

            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                weight = pl_module.net[4].weight
                self.sum = self.sum - weight.detach() * weight.grad

        seen = Steps()
        callback = WeightPruning("movement", remove=0.5, schedule=OneShot(5, "step"), shrink="never")
        fit(callback, seen, epochs=1, max_steps=6)
        torch.testing.assert_close(callback.learnt["watched"]["net.4.weight"], seen.sum)

    def test_weights_may_come_back(self):
        class Masks(L.Callback):
            def __init__(self):
                self.pages = []

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                self.pages.append({name: p != 0 for name, p in pl_module.named_parameters() if p.dim() > 1})

        def back(criterion):
            masks = Masks()
            fit(masks, WeightPruning(criterion, 0.5, Cubic(4, 16, 1, "step"), shrink="never", floor=0))
            pages = zip(masks.pages, masks.pages[1:], strict=False)
            return sum(int((page[n] & ~last[n]).sum()) for last, page in pages for n in page)

        assert back(Movement()) > 0
        assert back(Movement(regrow=False)) == 0

    def test_it_needs_steps_of_training(self):
        with pytest.raises(PruneError, match="movement has seen no optimizer step yet"):
            fit(WeightPruning("movement", schedule=AT_THE_START))

    def test_only_the_weights_of_the_stepping_optimizer_move(self):
        class Two(Net):
            def __init__(self):
                super().__init__(linear([[1.0]]), linear([[2.0]]), manual=True)

            def training_step(self, batch, batch_idx):
                self.head(self.body(batch[0])).sum().backward()
                for optimizer in self.optimizers():
                    optimizer.step()

            def configure_optimizers(self):
                return [torch.optim.SGD(part.parameters(), lr=0.0) for part in (self.body, self.head)]

        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(1, 1), torch.ones(1, 1)))
        callback = WeightPruning("movement", schedule=OneShot(1, "step"), remove=0.1, shrink="never", floor=1)
        fit(callback, module=Two(), data=data, epochs=1, max_steps=2)
        assert {name: value.item() for name, value in callback.learnt["watched"].items()} == {
            "body.0.weight": -2.0, "head.weight": -2.0,
        }  # fmt: skip

    def test_a_second_fit_of_a_network_that_became_smaller_starts_afresh(self):
        module = small_net()
        callback = WeightPruning("movement", 0.7, Cubic(0.2, 0.6, 0.2, "fraction"))
        fit(callback, module=module)
        assert any(v.shape != module.get_parameter(n).shape for n, v in callback.learnt["watched"].items())
        fit(callback, module=module, epochs=1)
        assert all(v.shape == module.get_parameter(n).shape for n, v in callback.learnt["watched"].items())

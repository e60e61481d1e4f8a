"""Linear branches: their algebra against branches that are really run side by side, and in whole fits."""

from __future__ import annotations

import copy
import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations

from lightning_prune import ConfigurationError, GrowAndPrune
from lightning_prune.branches import descend, fold, no_branches
from tests.fits import BATCHES, CLASSES, SmallNet, equal, fit, images, loader, small_net, widths
from tests.helpers import difference, run

SAMPLES = images(seed=5).tensors[0]
CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "padded": nn.Conv2d(4, 4, 3, padding=1),
    "strided": nn.Conv2d(4, 4, 3, stride=2, padding=1),
    "uneven": nn.Conv2d(4, 4, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(2, 1)),
    "dilated": nn.Conv2d(4, 4, 3, padding=2, dilation=2),
    "grouped": nn.Conv2d(6, 4, 3, padding=1, groups=2),
    "grouped, as many": nn.Conv2d(6, 6, 3, padding=1, groups=3),
    "depthwise": nn.Conv2d(4, 4, 5, padding=2, groups=4),
    "depthwise, more": nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4, dilation=2),
    "pointwise": nn.Conv2d(4, 4, 1, stride=1, groups=2),
    "even": nn.Conv2d(4, 4, 4, padding="same"),
    "little padding": nn.Conv2d(4, 4, 5, padding=1),
    "much padding": nn.Conv2d(4, 4, 3, padding=4, groups=2),
    "around": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    "mirrored": nn.Conv2d(4, 4, 5, padding=2, padding_mode="reflect"),
    "of sequences": nn.Conv1d(4, 4, 3, stride=1, padding=1, groups=2),
    "of volumes": nn.Conv3d(4, 4, 3, padding=1),
}


def random_branches(convolution, dtype):
    identity = convolution.in_channels == convolution.out_channels and set(convolution.stride) == {1}
    branches = no_branches(convolution.weight.to(dtype), convolution.groups, identity)
    return {name: torch.randn(factor.shape, dtype=dtype) for name, factor in branches.items()}


def padded(convolution, x):
    """The input with its border, as torch itself sees it."""
    return functional.pad(x, convolution._reversed_padding_repeated_twice, {"zeros": "constant"}.get(
        convolution.padding_mode, convolution.padding_mode))  # fmt: skip


def side_by_side(convolution, x, kernel, branches):
    """What a kernel and its branches compute, each one run for itself."""
    dims = len(convolution.kernel_size)
    convolve, groups, ones = CONVOLVE[dims], convolution.groups, (1,) * dims
    how = {"stride": convolution.stride, "dilation": convolution.dilation, "groups": groups}
    x = padded(convolution, x)
    result = convolve(x, kernel, **how)
    hidden = convolve(x, branches["first"].unflatten(1, (-1, *ones)), groups=groups)
    result = result + convolve(hidden, branches["last"], **how)
    for dim, (size, taps) in enumerate(zip(result.shape[2:], convolution.kernel_size, strict=True)):
        begin = (taps - 1) // 2 * convolution.dilation[dim]
        places = torch.arange(size) * convolution.stride[dim] + begin
        x = x.index_select(dim + 2, places)
    if "point" in branches:
        result = result + convolve(x, branches["point"].unflatten(1, (-1, *ones)), groups=groups)
    if "identity" in branches:
        result = result + x * branches["identity"].view(-1, *ones)
    return result


class TestFold:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=str)
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_one_kernel_computes_what_the_branches_do(self, name, dtype, tolerance):
        torch.manual_seed(0)
        convolution = copy.deepcopy(CONVOLUTIONS[name]).to(dtype)
        convolution.bias = None
        x = torch.randn(2, convolution.in_channels, *[9] * len(convolution.kernel_size), dtype=dtype)
        kernel, branches = convolution.weight.detach().clone(), random_branches(convolution, dtype)
        expected = side_by_side(convolution, x, kernel, branches)
        convolution.weight.data = kernel + fold(branches)
        assert difference([expected], run(convolution, x)) <= tolerance

    def test_a_centre_under_padding_that_keeps_the_size_is_the_input_itself(self):
        for name in ("padded", "dilated", "grouped, as many", "depthwise", "around", "mirrored", "pointwise", "even"):
            convolution = CONVOLUTIONS[name]
            branches = no_branches(convolution.weight, convolution.groups, identity=True)
            branches["identity"] += torch.arange(1.0, convolution.out_channels + 1)
            copied = copy.deepcopy(convolution)
            copied.weight.data, copied.bias = fold(branches), None
            x = torch.randn(2, convolution.in_channels, 9, 9)
            assert difference([x * branches["identity"].view(-1, 1, 1)], run(copied, x)) <= 1e-6

    def test_branches_that_are_new_compute_nothing_and_can_learn(self):
        for convolution in CONVOLUTIONS.values():
            branches = no_branches(convolution.weight, convolution.groups)
            assert torch.count_nonzero(fold(branches)) == 0
            velocities = {name: torch.zeros_like(factor) for name, factor in branches.items()}
            change = descend(branches, velocities, torch.ones_like(convolution.weight), 0.1)
            assert bool((change < 0).all())

    @pytest.mark.parametrize("name", ["uneven", "grouped, as many", "depthwise, more", "even", "pointwise"])
    def test_a_step_is_that_of_sgd_on_the_branched_network(self, name):
        torch.manual_seed(0)
        convolution = CONVOLUTIONS[name]
        kernel = convolution.weight.detach().double()
        branches = random_branches(convolution, torch.float64)
        really = {factor: value.clone().requires_grad_() for factor, value in branches.items()}
        optimizer = torch.optim.SGD(really.values(), lr=0.02, momentum=0.9)
        velocities = {factor: torch.zeros_like(value) for factor, value in branches.items()}
        x = torch.randn(2, convolution.in_channels, 9, 9, dtype=torch.float64)
        for _ in range(3):
            before = fold(branches)
            folded = (kernel + before).requires_grad_()
            output = CONVOLVE[2](padded(convolution, x), folded, None, convolution.stride, 0, convolution.dilation,
                                 convolution.groups)  # fmt: skip
            (gradient,) = torch.autograd.grad(output.tanh().mean(), folded)
            change = descend(branches, velocities, gradient, 0.02)
            assert torch.allclose(change, fold(branches) - before, atol=1e-14)
            optimizer.zero_grad()
            side_by_side(convolution, x, kernel, really).tanh().mean().backward()
            optimizer.step()
        for factor, value in branches.items():
            assert torch.allclose(value, really[factor], atol=1e-13)
            assert torch.allclose(velocities[factor], optimizer.state[really[factor]]["momentum_buffer"], atol=1e-13)


class Watch(L.Callback):
    """Calls a function at the start of each batch, after the callbacks before it."""

    def __init__(self, look):
        self.look = look

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.look(trainer, pl_module, batch)


def branching(**arguments):
    """Only branches grow; rounds at the starts of the batches of the second epoch, the last at that of the third."""
    defaults = {"remove": 0.5, "of": "params", "unit": "step", "start": BATCHES, "end": 2 * BATCHES, "interval": 1}
    return GrowAndPrune(**{"expand": 1, "branches": True, **defaults, **arguments})


class Plain(SmallNet):
    """Without weight decay, which would not fall on the same parameters; in double precision."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0].double()), batch[1])


def plain():
    torch.manual_seed(0)
    return Plain().double()


class Branched(nn.Module):
    """A convolution with its branches, as modules of its own would compute them."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution
        same = convolution.in_channels == convolution.out_channels and set(convolution.stride) == {1}
        self.branches = nn.ParameterDict(no_branches(convolution.weight, convolution.groups, same))

    def forward(self, x):
        bias = 0 if self.convolution.bias is None else self.convolution.bias.view(-1, 1, 1)
        return side_by_side(self.convolution, x, self.convolution.weight, self.branches) + bias


def branched(module):
    for name, child in module.named_children():
        setattr(module, name, Branched(child) if isinstance(child, nn.Conv2d) else branched(child))
    return module


class TestFits:
    @pytest.mark.parametrize(("expand", "widest"), [(1, [12, 24, 24]), (1.5, [18, 36, 36])])
    def test_the_network_computes_the_same_before_the_first_step_and_keeps_its_keys(self, expand, widest):
        module = small_net()
        expected, keys, seen = run(module, SAMPLES), set(module.state_dict()), []

        def look(trainer, pl_module, batch):
            assert set(pl_module.state_dict()) == keys
            if trainer.global_step == 0:
                seen.append((widths(pl_module), difference(expected, run(pl_module, SAMPLES))))

        fit(branching(expand=expand), Watch(look), module=module)
        assert seen[0][0] == widest
        assert seen[0][1] <= 1e-5

    def test_the_folded_network_trains_like_the_branched_one(self):
        steps, found = 5, []

        def look(trainer, pl_module, batch):
            if trainer.global_step == steps:
                found.extend(run(pl_module, SAMPLES.double()))

        fit(branching(strength=0.0), Watch(look), module=plain())
        really = branched(plain())
        settings = really.configure_optimizers()
        for _, batch in zip(range(steps), loader(), strict=False):
            settings["optimizer"].zero_grad()
            really.training_step(batch, 0).backward()
            settings["optimizer"].step()
            settings["lr_scheduler"]["scheduler"].step()
        expected = run(really, SAMPLES.double())
        assert difference(expected, found) <= 1e-10
        fit_without = plain()
        fit(branching(strength=0.0, branches=False), Watch(look), module=fit_without)
        assert difference(expected, found[1:]) > 1e-2  # so that branches made a difference

    def test_under_gates_branches_get_the_gradients_of_the_gated_branched_network(self):
        callback, checked = branching(strength=0.0), []

        def slopes(pl_module, batch):
            """By autograd, through gates and branches, of the loss of this batch."""
            learnt, dense = callback.learnt["branches"], callback.learnt["dense"]
            now = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}
            factors = {n: {f: v.clone().requires_grad_() for f, v in h["branches"].items()} for n, h in learnt.items()}
            for name, branches in factors.items():
                behind = dense.get(name, now[name])
                gate = torch.where(behind != 0, now[name] / behind, 1.0)
                now[name] = (behind - fold(learnt[name]["branches"]) + fold(branches)) * gate
            loss = cross_entropy(functional_call(pl_module, now, (batch[0].double(),)), batch[1])
            leaves = [value for branches in factors.values() for value in branches.values()]
            return dict(zip([(n, f) for n in factors for f in factors[n]], torch.autograd.grad(loss, leaves),
                            strict=True))  # fmt: skip

        class Compare(L.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                self.expected = None
                if "gates" in callback.per_unit:
                    self.expected = slopes(pl_module, batch)
                    self.before = copy.deepcopy(callback.learnt["branches"])

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                for (name, factor), slope in (self.expected or {}).items():
                    velocity = callback.learnt["branches"][name]["velocities"][factor]
                    found = velocity - 0.9 * self.before[name]["velocities"][factor]
                    assert torch.allclose(found, slope, atol=1e-12), (name, factor)
                    checked.append(float(slope.abs().max()))

        fit(callback, Compare(), module=plain())
        assert len(checked) == BATCHES * (3 + 2 + 4 + 2 + 3)
        assert min(checked) < 1e-12 < max(checked)  # the first factor has none before the last one has moved

    def test_branches_follow_the_kernels_and_go_with_the_last_round(self):
        callback, seen = branching(), []

        def look(trainer, pl_module, batch):
            learnt = callback.learnt.get("branches", {})
            for name, held in learnt.items():
                assert held["branches"]["last"].shape == pl_module.get_parameter(name).shape
            seen.append({name: id(held["branches"]["last"]) for name, held in learnt.items()})

        fit(callback, Watch(look))
        assert [len(held) for held in seen] == [5] * 2 * BATCHES + [0] * BATCHES
        assert seen[1] == seen[BATCHES - 1]  # none begins anew between rounds

    def test_what_is_masked_stays_off(self):
        callback, shares = branching(shrink="end"), []

        class Look(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                off = ~callback._network.masks.keep["net.0"]
                assert torch.count_nonzero(pl_module.net[4].weight[:, off]) == 0
                shares.append(float(off.float().mean()))

        fit(callback, Look())
        assert shares[0] == 0 < shares[BATCHES + 3]

    def test_nothing_moves_in_a_step_that_the_optimizer_leaves_out(self):
        class Careful(torch.optim.SGD):
            def step(self, closure=None):
                with torch.enable_grad():
                    closure()
                gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
                if all(bool(gradient.isfinite().all()) for gradient in gradients):
                    super().step()

        class Overflowing(SmallNet):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                return loss * math.inf if batch_idx == 2 else loss

            def configure_optimizers(self):
                return Careful(self.parameters(), lr=0.05)

        callback, seen = branching(), {}

        def look(trainer, pl_module, batch):
            seen[trainer.global_step] = copy.deepcopy(
                {name: held["branches"] for name, held in callback.learnt["branches"].items()}
                if "branches" in callback.learnt else {}
            )  # fmt: skip

        fit(callback, Watch(look), module=Overflowing())
        assert equal(seen[2], seen[3])
        assert not equal(seen[3], seen[4])

    def test_frozen_weights_stay_as_they_are(self):
        module = small_net()
        module.net[4].weight.requires_grad_(False)
        before, seen = module.net[4].weight.clone(), []

        def look(trainer, pl_module, batch):
            if trainer.global_step == BATCHES - 1:
                seen.append(equal(pl_module.net[4].weight.data, before.data))

        fit(branching(), Watch(look), module=module)
        assert seen == [True]

    def test_only_convolutions_with_a_weight_of_their_own_have_branches(self):
        class Odd(SmallNet):
            def __init__(self):
                super().__init__()
                tied, other = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
                other.weight = tied.weight
                normed = parametrizations.weight_norm(nn.Conv2d(12, 12, 3, padding=1))
                self.net.insert(3, nn.Sequential(tied, other, normed, nn.ConvTranspose2d(12, 12, 3, padding=1)))

        callback, seen = branching(remove=0.2), []
        fit(callback, Watch(lambda *_: seen.append(set(callback.learnt.get("branches", ())))), module=Odd())
        paths = ("net.0", "net.4.expand", "net.4.depthwise", "net.4.project", "net.5")
        assert seen[0] == {f"{path}.weight" for path in paths}

    @pytest.mark.parametrize(
        ("layers", "expand", "said"),
        [
            ((nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, CLASSES)), 1.5, "no convolution of Other"),
            ((nn.Flatten(), nn.Linear(72, CLASSES)), 1, "nothing in this network can grow"),
        ],
        ids=["widens", "rigid"],
    )
    def test_a_network_without_convolutions_is_refused_as_it_is(self, layers, expand, said):
        class Other(SmallNet):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(*copy.deepcopy(layers))

        module = Other()
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(ConfigurationError, match=said):
            fit(branching(expand=expand), module=module)
        assert equal(module.state_dict(), before)

"""Methods that prepare the network for the round in real fits: penalties, growing regularisation, soft filters."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_prune import (
    BatchNormISTA,
    ChannelLotteryTicket,
    ChannelPenalty,
    ChannelPruning,
    ConfigurationError,
    GReg,
    GroupLasso,
    GroupNormDecay,
    Linear,
    OneShot,
    RegularisedPruning,
    Slimming,
    SoftFilterPruning,
)
from tests.fits import BATCHES, SmallNet, equal, fit, loader, small_net, trainer, widths

STEPS = 3 * BATCHES
LATE = OneShot(STEPS - 1, "step")


class Without(SmallNet):
    """No norm, so no scale."""

    def __init__(self):
        super().__init__(optimizer="sgd")
        self.net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))


class Chain(SmallNet):
    """Two convolutions of 1x1 on maps of 6x6."""

    def __init__(self):
        super().__init__(optimizer="sgd")
        layers = [nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


class ByHand(SmallNet):
    """Two optimizers, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[:9].parameters(), lr=0.02), torch.optim.Adam(self.net[9].parameters(), lr=0.1)]


class Counting(ChannelPenalty):
    """Takes note of what it is asked to push."""

    def __init__(self):
        self.before, self.after, self.rates, self.groups = 0, 0, [], set()

    def acts_on(self, group):
        return True

    def before_step(self, step):
        self.before += 1
        self.rates.append({name.split(".")[1]: rate for name, rate in step.rates.items()})
        self.groups |= set(step.groups)

    def after_step(self, step):
        self.after += 1


def sgd_net():
    return small_net(optimizer="sgd")


# Penalties -----------------------------------------------------------------------------------------------------------


class AtTheRound(L.Callback):
    """Remembers the weights at the last round, as the penalty left them."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == STEPS - 1:
            self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}


def before_the_round(callback):
    """The network of a fit as it was at its last round, which removes nothing."""
    seen = AtTheRound()
    module, _ = fit(callback, seen, module=sgd_net())
    module.load_state_dict(seen.state)
    return module.requires_grad_(False)


@pytest.fixture(scope="module")
def reference():
    """The same fit without any penalty."""
    return before_the_round(ChannelPruning("l2", 0.0, schedule=LATE))


def under(penalty, **arguments):
    """The network of a fit under a penalty."""
    return before_the_round(RegularisedPruning(penalty, remove=0.0, schedule=LATE, **arguments))


def scales(module):
    return torch.cat([module.net[1].weight, module.net[3].norm.weight, module.net[5].weight])


def test_slimming_makes_scales_small(reference):
    assert scales(under(Slimming(0.2))).abs().sum() < 0.6 * scales(reference).abs().sum()


def test_bn_ista_makes_scales_zero_but_for_channels_that_stay(reference):
    found = under(BatchNormISTA(2.0), exclude=["net.4"])
    assert not (scales(reference) == 0).any()
    assert (found.net[1].weight == 0).any()
    assert not (found.net[5].weight == 0).any()


def test_group_lasso_makes_whole_channels_zero(reference):
    def zero(module):
        rows = (module.net[4].weight.flatten(1) == 0).all(1)
        columns = (module.net[9].weight == 0).all(0)
        assert torch.equal(rows, columns)
        return int(rows.sum())

    assert zero(reference) == 0
    assert 0 < zero(under(GroupLasso(0.1))) < 24


def test_group_norm_drives_channels_apart(reference):
    def spread(module):
        parts = [module.net[4].weight.flatten(1), module.net[9].weight.t(), module.net[5].weight[:, None]]
        norms = torch.cat([*parts, module.net[5].bias[:, None]], 1).norm(dim=1)
        return float(norms.max() / norms.min())

    assert spread(under(GroupNormDecay(0.05))) > 1.5 * spread(reference)


def test_a_penalty_acts_from_its_start_to_the_last_round_on_what_may_go():
    penalty = Counting()
    rounds = Linear(0.5, 0.8, 0.3, "fraction")
    fit(RegularisedPruning(penalty, 1 / 3, remove=0.3, of="channels", schedule=rounds, exclude=["net.4"]))
    assert (penalty.before, penalty.after) == (9, 9)  # the rounds are before steps 9 and 15, it starts before step 6
    assert penalty.groups == {"net.0", "net.3.expand"}


def test_each_of_several_optimizers_brings_its_parameters_and_rates():
    penalty = Counting()
    schedule = OneShot(8, "step")
    fit(RegularisedPruning(penalty, remove=0.5, of="channels", schedule=schedule), module=ByHand(), epochs=1)
    body = {"0": 0.02, "1": 0.02, "3": 0.02, "4": 0.02, "5": 0.02}
    assert penalty.rates == [body, {"9": 0.1}] * 4


def test_the_cost_of_a_channel_is_what_one_less_saves():
    callback = RegularisedPruning("bn_ista", remove=0.5, of="macs", schedule=OneShot(2, "step"))
    fit(callback, module=Chain(), epochs=1)
    first, second = 36 * (2 + 8), 36 * 4 + 3  # MACs that a channel of each takes part in
    mean = (first + second) / 2
    assert callback.learnt["costs"] == pytest.approx({"net.0": first / mean, "net.3": second / mean})


def test_in_a_budget_of_channels_all_cost_the_same():
    callback = RegularisedPruning("bn_ista", remove=0.5, of="channels", schedule=OneShot(2, "step"))
    fit(callback, module=Chain(), epochs=1)
    assert callback.learnt["costs"] == {"net.0": 1.0, "net.3": 1.0}


def refused(callback, match, module=None, **arguments):
    """The fit is refused before anything has changed."""
    module = module or small_net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ConfigurationError, match=match):
        fit(callback, module=module, **arguments)
    assert equal(dict(module.state_dict()), before)


@pytest.mark.parametrize("penalty", ["slimming", "bn_ista"])
def test_a_network_without_scales_cannot_be_slimmed(penalty):
    refused(RegularisedPruning(penalty), r"none of the channel groups net\.0: none of them has a scale", Without())


@pytest.mark.parametrize(
    ("start", "schedule"),
    [(0.3, OneShot(0.3)), (0.5, OneShot(1, "epoch")), (0.0, OneShot(0, "step")), (-0.1, LATE), (1.0, LATE)],
)
def test_a_penalty_that_would_never_act_is_refused(start, schedule) -> None:
    refused(RegularisedPruning(penalty_start=start, schedule=schedule), "penalty_start must be a share of the fit")


def test_a_share_of_a_fit_without_a_known_end_is_refused():
    callback = RegularisedPruning(penalty_start=0.3, schedule=OneShot(20, "step"))
    refused(callback, r"penalty_start=0\.3 is a share of the fit", epochs=-1, max_time={"seconds": 2})
    penalty = Counting()
    endless = {"epochs": -1, "max_time": {"seconds": 2}}
    fit(RegularisedPruning(penalty, schedule=OneShot(2, "step")), **endless)
    assert penalty.before == 2


def test_a_finished_network_trains_on_without_the_penalty():
    penalty = Counting()
    callback = RegularisedPruning(penalty, remove=0.5, of="channels", schedule=OneShot(2, "step"))
    module, _ = fit(callback, epochs=1)
    fit(callback, module=module, epochs=1)
    assert penalty.before == 2


# Growing regularisation ----------------------------------------------------------------------------------------------


class Pushes(L.Callback):
    """What a callback before it in the list adds to the gradient of the scales of ``net.4``, in multiples of them."""

    def __init__(self):
        self.before, self.found, self.scales = Before(self), [], None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.scales = pl_module.net[5].weight.detach().clone()
        self.found.append((pl_module.net[5].weight.grad - self.gradient) / self.scales)


class Before(L.Callback):
    def __init__(self, pushes):
        self.pushes = pushes

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.pushes.gradient = pl_module.net[5].weight.grad.clone()


def greg(**arguments):
    """The network of a fit under growing regularisation, and by how much it pushed the scales at each step."""
    settings = {"at": 14, "unit": "step", "every": 2, "of": "channels", "scope": "group", "shrink": "never"}
    pushes = Pushes()
    module, _ = fit(pushes.before, GReg(**{**settings, **arguments}), pushes, module=sgd_net())
    return module, [[round(value, 4) for value in row.tolist()] for row in pushes.found]


def test_greg_1_presses_what_it_chose_at_the_start_ever_harder_and_then_removes_it():
    filters = sgd_net().net[4].weight.detach().abs().sum((1, 2, 3))
    weakest = filters.argsort()[:12].sort().values
    module, found = greg(ceiling=0.7)
    assert len(found) == STEPS
    going = torch.zeros(24)
    going[weakest] = 1
    for step, row in enumerate(found):
        coefficient = 0.1 * (step // 2 + 1) if step < 14 else 0.0
        assert row == pytest.approx((coefficient * going).tolist(), abs=1e-3), step
    off = (module.net[9].weight == 0).all(0)
    assert torch.equal(off, going.bool())


def test_greg_makes_small_what_is_to_go():
    module, _ = greg(ceiling=4.0, at=STEPS - 1)
    sizes = module.net[4].weight.detach().flatten(1).norm(dim=1)
    off = (module.net[9].weight == 0).all(0)
    assert int(off.sum()) == 12
    assert sizes[off].max() < 0.3 * sizes[~off].min()


def test_greg_2_lets_it_grow_on_all_before_it_chooses():
    module, found = greg(variant=2, first_ceiling=0.3, ceiling=1.1)
    off = (module.net[9].weight == 0).all(0).float()
    assert int(off.sum()) == 12
    for step, coefficient in enumerate([0.1, 0.1, 0.2, 0.2, 0.3, 0.3]):
        assert found[step] == pytest.approx([coefficient] * 24, abs=1e-3), step
    for step, coefficient in enumerate([0.5, 0.5, 0.7, 0.7, 0.9, 0.9, 1.1, 1.1, 0, 0, 0, 0], start=6):
        assert found[step] == pytest.approx((coefficient * off).tolist(), abs=1e-3), step


def test_greg_keeps_to_a_given_delta_and_lets_the_rest_settle_at_the_ceiling():
    _, found = greg(delta=0.25, ceiling=0.5)
    assert [max(row) for row in found] == pytest.approx([0.25] * 2 + [0.5] * 12 + [0.0] * 4, abs=1e-3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"delta": 1e-4},
        {"variant": 2, "first_delta": 1e-3},
        {"variant": 2, "delta": 0.3, "every": 3},
        {"every": 20},
        {"at": 0, "unit": "step"},
    ],
)
def test_phases_that_do_not_fit_are_refused(arguments) -> None:
    refused(GReg(**arguments), "optimizer steps, but only .* are known to be there")


def test_without_a_known_length_the_round_must_be_at_a_step():
    refused(GReg(), "unit='step'", ByHand())
    callback = GReg(at=8, unit="step", of="channels")
    fit(callback, module=ByHand())
    assert callback.report.reached == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("arguments", [{"every": 0}, {"delta": -1.0}, {"ceiling": 0.0}, {"first_ceiling": 2.0}])
def test_a_coefficient_that_does_not_grow_is_refused(arguments) -> None:
    refused(GReg(variant=2, **arguments), "growing coefficient needs")


def test_an_unknown_variant_is_refused():
    with pytest.raises(ConfigurationError, match="variant must be the number 1 or 2, but is 3"):
        GReg(variant=3)
    with pytest.raises(ConfigurationError, match="variant must be the number 1 or 2, but is '1'"):
        GReg(variant="1")


# Soft filters --------------------------------------------------------------------------------------------------------


class Zeros(L.Callback):
    """Which channels of ``net.4`` are zero where they are read, and their scales, at the start of each batch."""

    def __init__(self):
        self.seen, self.scales = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((pl_module.net[9].weight == 0).all(0))
        self.scales.append(pl_module.net[5].weight.detach().abs().clone())


def test_soft_filters_zeroes_the_weakest_after_each_epoch_and_lets_them_come_back():
    zeros = Zeros()
    callback = SoftFilterPruning(0.5, "channels", "bn_scale", at=0.9, scope="group")
    module, _ = fit(callback, zeros, epochs=4)
    starts = [BATCHES, 2 * BATCHES, 3 * BATCHES]
    for batch, (off, sizes) in enumerate(zip(zeros.seen[:22], zeros.scales[:22], strict=True)):
        if batch in starts:
            assert off.nonzero().flatten().tolist() == sizes.argsort()[:12].sort().values.tolist(), batch
        else:
            assert not off.any(), batch
    assert widths(module) == [6, 12, 12]
    assert len(callback.report.history) == 1


def test_soft_filters_zeroes_as_often_as_it_is_told():
    zeros = Zeros()
    fit(SoftFilterPruning(0.5, "channels", every=2, at=0.9, shrink="never"), zeros, epochs=4)
    assert [batch for batch, off in enumerate(zeros.seen[:21]) if off.any()] == [2 * BATCHES]


@pytest.mark.parametrize("arguments", [{"at": 1, "unit": "epoch"}, {"at": 0.2}, {"every": 3}])
def test_a_round_before_anything_was_zeroed_is_refused(arguments) -> None:
    refused(SoftFilterPruning(**arguments), "zeroed for the first time after epoch")


def test_an_impossible_number_of_epochs_is_refused():
    with pytest.raises(ConfigurationError, match="every is a number of epochs"):
        SoftFilterPruning(every=0)


def test_where_the_length_is_not_known_soft_filters_go_by_epochs():
    used = trainer(SoftFilterPruning(at=2, unit="epoch", of="channels"), epochs=3)
    module = ByHand()
    used.fit(module, loader())
    assert sum(widths(module)) <= 31


OTHERS = {
    "RegularisedPruning": partial(RegularisedPruning, "group_lasso", of="channels", schedule=OneShot(1, "epoch")),
    "GReg": partial(GReg, of="channels", at=1, unit="epoch", every=1),
    "ChannelLotteryTicket": partial(ChannelLotteryTicket, of="channels", rounds=1),
}


@pytest.mark.parametrize("kind", list(OTHERS))
def test_what_any_channel_pruning_can_be_told_they_can_be_told_too(kind):
    module, _ = fit(OTHERS[kind](remove=0.3, scope="group", round_to=8), epochs=3)
    assert widths(module) == [8, 16, 16]
    module, _ = fit(OTHERS[kind](remove=0.3, scope="group", min_channels=12), epochs=3)
    assert widths(module) == [12, 15, 15]
    module, _ = fit(OTHERS[kind](ratios={"net.0": 0.5, "*.expand": 0.25, "net.4": 0.25}), epochs=3)
    assert widths(module) == [6, 18, 18]


@pytest.mark.parametrize("kind", ["RegularisedPruning", "GReg"])
def test_they_repair_what_stays(kind):
    def after(repair):
        callback, losses = OTHERS[kind](remove=0.5, repair=repair), []

        class Losses(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, *_):
                losses.append(float(outputs["loss"]))

        fit(callback, Losses(), epochs=2)
        return losses

    plain, repaired = after("none"), after("regression")
    assert plain[:BATCHES] == repaired[:BATCHES]
    assert repaired[BATCHES] < plain[BATCHES]

"""Single weights are switched off, stay off, and go physically where a whole channel has died."""

from __future__ import annotations

import copy
import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune import (
    BudgetError,
    ChannelLotteryTicket,
    ConfigurationError,
    LotteryTicket,
    OneShot,
    WeightCriterion,
    WeightPruning,
    load_pruned,
)
from tests.fits import BATCHES, SmallNet, equal, fit, images, loader, small_net, trainer, widths
from tests.helpers import difference, run

IMAGES = torch.randn(4, 2, 6, 6)


def zeros(module):
    """Share of zeros among the weights of two or more dimensions."""
    weights = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


class Steps(L.Callback):
    """Copies of the weights after every batch."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_fused"])
def test_the_smallest_weights_go_and_stay_away(optimizer):
    steps, start = Steps(), small_net(optimizer=optimizer)
    before = {name: p.detach().clone() for name, p in start.named_parameters() if p.dim() > 1}
    flat = torch.cat([value.abs().flatten() for value in before.values()])
    threshold = flat.kthvalue(round(0.6 * len(flat))).values
    callback = WeightPruning(remove=0.6, schedule=OneShot(0, "step"), shrink="never")
    fit(steps, callback, module=start)
    for weights in steps.weights:
        for name, value in before.items():
            assert torch.equal(weights[name] == 0, value.abs() <= threshold), name
    assert callback.report.reached == pytest.approx(0.6, abs=1e-3)
    assert any("dense kernels compute with them all the same" in note for note in callback.report.notes)


def test_biases_and_norms_are_left_alone():
    callback = WeightPruning(remove=0.9, schedule=OneShot(0, "step"), shrink="never")
    module, _ = fit(callback)
    matrices = {name for name, parameter in module.named_parameters() if parameter.dim() > 1}
    assert {row.name for row in callback.report.weights} == matrices


class Readers(WeightCriterion):
    """Wants nothing that reads the first six channels of the last convolution, and everything else."""

    def score(self, weights, gradients, generator):
        scores = {name: torch.ones_like(weight) for name, weight in weights.items()}
        scores["net.9.weight"][:, :6] = 0
        return scores


def test_channels_that_nothing_reads_any_more_are_removed_when_training_ends(tmp_path):
    callback = WeightPruning(
        Readers(), remove=18 / 3636, floor=1, schedule=OneShot(1, "epoch"), directory=str(tmp_path)
    )
    module = small_net()
    total = sum(p.numel() for p in module.parameters() if p.dim() > 1)
    callback.remove = 18 / total
    fit(callback, module=module)
    assert widths(module) == [12, 24, 18]
    assert callback.report.reached == pytest.approx((18 + 6 * 12 * 9) / total)
    loaded = load_pruned(tmp_path / "pruned.ckpt", SmallNet)
    assert equal(run(loaded, IMAGES), run(module, IMAGES))


def test_no_channel_is_removed_if_told_so():
    callback = WeightPruning("magnitude", remove=0.98, schedule=OneShot(1, "epoch"), shrink="never", floor=1)
    module, _ = fit(callback)
    assert widths(module) == [12, 24, 24]
    assert zeros(module) == pytest.approx(0.98, abs=1e-3)


def test_include_and_exclude_name_parameters_or_modules():
    callback = WeightPruning(
        remove=0.5, include=["net.3.*", "net.4.weight"], exclude=["net.3.depthwise"], shrink="never",
        schedule=OneShot(1, "epoch"),
    )  # fmt: skip
    module, _ = fit(callback)
    touched = {name for name, p in module.named_parameters() if (p == 0).any()}
    assert touched == {"net.3.expand.weight", "net.3.project.weight", "net.4.weight"}


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"criterion": "magnitud"}, ConfigurationError, "did you mean 'magnitude'"),
        ({"scope": "globl"}, ConfigurationError, "did you mean 'global'"),
        ({"shrink": "rounds"}, ConfigurationError, "unknown shrink 'rounds'"),
        ({"exclude": ["*"]}, ConfigurationError, "leave no weight to prune"),
        ({"remove": 1.0}, ConfigurationError, "remove"),
        ({"include": ["net.44"]}, ConfigurationError, "unknown parameter in include 'net.44'"),
        ({"remove": 0.9, "floor": 0.5}, BudgetError, "floor"),
        (
            {"pattern": (2, 4), "remove": 0.5},
            ConfigurationError,
            r"'net\.0\.weight' of shape .* cannot take a 2:4 pattern",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_changes(arguments, error, words):
    module = small_net()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=words):
        fit(WeightPruning(**arguments), module=module)
    assert equal(module.state_dict(), before)


class Diary(L.Callback):
    """What a ticket is, right before the batch at a step."""

    def __init__(self, *steps):
        self.steps, self.pages = steps, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.steps:
            page = pl_module.state_dict(), trainer.optimizers[0].state_dict(), trainer.lr_scheduler_configs[0].scheduler
            self.pages[trainer.global_step] = copy.deepcopy((*page[:2], page[2].state_dict()))


@pytest.mark.parametrize("step", [0, 2])
def test_a_ticket_goes_back_to_where_it_was_but_for_what_is_off(step):
    early, late = Diary(step), Diary(BATCHES, 2 * BATCHES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(early, LotteryTicket(remove=0.75, rounds=2, rewind_to=step, shrink="never"), late, epochs=3)
    weights, state, schedule = early.pages[step]
    for number, kept in ((1, 0.5), (2, 0.25)):
        ticket, rewound, again = late.pages[number * BATCHES]
        alive = sum(int((ticket[name] != 0).sum()) for name, w in weights.items() if w.dim() > 1)
        assert alive == pytest.approx(kept * sum(w.numel() for w in weights.values() if w.dim() > 1), abs=1)
        for name, value in weights.items():
            on = ticket[name] != 0 if value.dim() > 1 else torch.ones_like(value, dtype=torch.bool)
            assert torch.equal(ticket[name][on], value[on]), name
        assert again == schedule
        assert [g["lr"] for g in rewound["param_groups"]] == [g["lr"] for g in state["param_groups"]]
        assert rewound["state"].keys() == state["state"].keys()
        for index, slots in state["state"].items():
            assert equal(rewound["state"][index]["step"], slots["step"])


def test_a_ticket_of_channels_is_removed_at_the_end():
    module, _ = fit(ChannelLotteryTicket(remove=0.5, of="channels", scope="group", rounds=2))
    assert widths(module) == [6, 12, 12]


def test_rewinding_to_a_step_after_the_first_round_is_refused():
    class Unmeasured(IterableDataset):
        def __iter__(self):
            return iter(images())

    with pytest.raises(ConfigurationError, match=r"first round is at step 6, before step 9 that it should rewind to"):
        fit(LotteryTicket(rounds=2, rewind_to=9), data=DataLoader(Unmeasured(), batch_size=8))


@pytest.mark.parametrize("method", [LotteryTicket, ChannelLotteryTicket])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rounds": 2, "rewind_to": 1000}, "first round is at step 6 of the 18 of this fit, before step 1000"),
        ({"rounds": 2, "rewind_to": 7}, "before step 7 that it should rewind to"),
        ({"rounds": 100}, "100 rounds divide the 18 optimizer steps of this fit into 101 parts"),
        ({"rounds": 18}, "less than one step each. Train longer or have fewer rounds"),
    ],
)
def test_a_fit_too_short_for_a_ticket_is_refused_before_training(method, arguments, words):
    module = small_net()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ConfigurationError, match=words):
        fit(method(**arguments), module=module)
    assert equal(module.state_dict(), before)


def test_the_tightest_ticket_fits():
    callback = LotteryTicket(remove=0.5, rounds=2, rewind_to=6)
    fit(callback)
    assert len(callback.report.history) == 2
    callback = LotteryTicket(remove=0.5, rounds=17)
    fit(callback)
    assert len(callback.report.history) == 17


@pytest.mark.parametrize("method", [LotteryTicket, ChannelLotteryTicket])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rounds": 0}, "rounds must be a whole number of at least 1, but is 0"),
        ({"rounds": 2.5}, "rounds must be a whole number of at least 1, but is 2.5"),
        ({"rewind_to": -1}, "rewind_to must be a whole number of at least 0, but is -1"),
        ({"rewind_to": 0.1}, "rewind_to must be a whole number of at least 0, but is 0.1"),
    ],
)
def test_a_ticket_with_wrong_arguments_is_refused(method, arguments, words):
    with pytest.raises(ConfigurationError, match=words):
        method(**arguments)


def test_masked_weights_are_rebuilt_from_a_checkpoint(tmp_path):
    callback = WeightPruning(remove=0.8, schedule=OneShot(1, "epoch"), shrink="never", directory=str(tmp_path))
    module, _ = fit(callback)
    again, resumed = WeightPruning(remove=0.8, schedule=OneShot(1, "epoch"), shrink="never"), small_net(seed=4)
    trainer(again, epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / "pruned.ckpt")
    for (name, old), (_, new) in zip(module.named_parameters(), resumed.named_parameters(), strict=True):
        if old.dim() > 1:
            assert torch.equal(old == 0, new == 0), name
    assert difference(run(module, IMAGES), run(resumed, IMAGES)) > 0


def test_a_network_without_matrices_trains_on():
    class Scales(SmallNet):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten())

    with pytest.warns(UserWarning, match="nothing in Scales can be pruned"):
        fit(WeightPruning(), module=Scales())


@pytest.mark.parametrize("reinit", ["random", "rewind"])
def test_a_reinitialisation_leaves_alone_what_is_frozen(reinit):
    step, module = BATCHES + 2, small_net()
    module.net[:2].requires_grad_(False)
    before, after = Diary(step), Diary(step)
    callback = WeightPruning(exclude=["net.0"], schedule=OneShot(step, "step"), reinit=reinit, shrink="never")
    fit(before, callback, after, module=module)
    (old, *_), (new, *_) = before.pages[step], after.pages[step]
    replaced = {name for name in old if not torch.equal(old[name], new[name])}
    assert {"net.5.running_mean", "net.5.weight", "net.9.weight"} <= replaced
    assert [name for name in replaced if name.startswith(("net.0.", "net.1."))] == []


class Gradients(L.Callback):
    """Names of the parameters that have a gradient when a batch starts."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append({name for name, p in pl_module.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(("reinit", "forgets"), [("random", True), ("rewind", True), ("keep", False)])
def test_gradients_that_accumulate_are_forgotten_with_the_weights_that_they_are_of(reinit, forgets):
    before, after = Gradients(), Gradients()
    callback = WeightPruning(remove=0.5, schedule=OneShot(0.5, "epoch"), reinit=reinit)
    fit(before, callback, after, epochs=1, accumulate_grad_batches=4)
    assert len(before.seen[3]) > 10
    assert after.seen[3] == (set() if forgets else before.seen[3])


@pytest.mark.parametrize("criterion", ["magnitude", "movement", "synflow"])
@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), torch.optim.Adagrad])
def test_sparse_gradients_of_a_table(optimizer, criterion):
    class Lookup(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(7, 8, sparse=True), nn.Linear(8, 3)

        def training_step(self, batch, batch_idx):
            rows = batch[0].mean((1, 2, 3)).mul(2).long().clamp(0, 6)
            return nn.functional.cross_entropy(self.head(self.table(rows)), batch[1])

        def configure_optimizers(self):
            return optimizer(self.parameters())

    steps, module = Steps(), Lookup()
    fit(WeightPruning(criterion, remove=0.5, schedule=OneShot(4, "step"), shrink="never"), steps, module=module)
    off = steps.weights[4]["table.weight"] == 0
    assert 0 < int(off.sum()) < off.numel()
    assert all(torch.equal(weights["table.weight"] == 0, off) for weights in steps.weights[4:])
    assert not torch.equal(steps.weights[4]["table.weight"], steps.weights[-1]["table.weight"])

"""Arguments of ChannelPruning do what they say; widths worked out by hand for groups of 12, 24 and 24 channels."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from lightning_prune import BudgetError, Criterion, Linear, OneShot, PruneError
from lightning_prune.probe import Probe
from tests.fits import BATCHES, SmallNet, fit, loader, parameters, pruning, small_net, widths

START = OneShot(0, "step")


def pruned(module=None, **arguments):
    """Widths after pruning at the very start."""
    return widths(fit(pruning(**{"schedule": START, **arguments}), module=module, epochs=1)[0])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"scope": "group"}, [6, 12, 12]),
        ({"include": ["net.4"]}, [12, 24, 12]),
        ({"include": "net.4"}, [12, 24, 12]),
        ({"include": ["net.[04]"], "scope": "group"}, [6, 24, 12]),
        ({"exclude": ["net.4"], "scope": "group"}, [6, 12, 24]),
        ({"exclude": ["net.3.project"], "scope": "group"}, [12, 12, 12]),  # makes the same channels as net.0
        ({"include": ["net.*"], "exclude": ["net.0", "*.expand"]}, [12, 24, 12]),
        # 36 may stay: 6 in the group with the ratio, and 30 of 36 in the others, which lose a sixth each.
        ({"ratios": {"*.expand": 0.75}, "scope": "group", "remove": 0.4}, [10, 6, 20]),
        ({"ratios": {"net.4": 0.0}, "scope": "group", "remove": 0.3}, [6, 12, 24]),
        # 42 may stay; the widths below, all multiples of 8, are 40, and the next larger ones 44 at best.
        ({"round_to": 8, "scope": "group", "remove": 0.3}, [8, 16, 16]),
        ({"min_channels": 10, "scope": "group"}, [10, 10, 10]),
        ({"min_channels": 0.25, "scope": "group", "remove": 0.75}, [3, 6, 6]),
        ({"remove": 0.0}, [12, 24, 24]),
        ({"remove": 0.0, "ratios": {"net.4": 0.5}}, [12, 24, 12]),
    ],
)
def test_widths(arguments, expected):
    assert pruned(**arguments) == expected


def with_weak_channels(weak):
    """A network whose net.4 has some channels that are far weaker than all others, which are equally strong."""
    module = small_net()
    with torch.no_grad():
        for layer in (
            module.net[0],
            module.net[3].expand,
            module.net[3].depthwise,
            module.net[3].project,
            module.net[4],
        ):
            layer.weight.fill_(1.0)
        module.net[4].weight[weak] = 1e-3
    return module


def test_the_globally_weakest_channels_go():
    weak = torch.tensor([1, 4, 5, 9, 23])
    callback = pruning(schedule=START, remove=5 / 60, shrink="never")
    module, _ = fit(callback, module=with_weak_channels(weak), epochs=1)
    off = (module.net[9].weight == 0).all(dim=0).nonzero().flatten()
    assert off.tolist() == weak.tolist()
    assert [group.after for group in callback.report.groups] == [12, 24, 19]


def test_what_is_left_are_the_strong_channels_in_their_order():
    module, weak = small_net(), torch.tensor([0, 2, 3])
    with torch.no_grad():
        module.net[4].weight[weak] = 0.0
    kept = [i for i in range(24) if i not in weak]
    expected = module.net[4].weight[kept].detach().clone()
    seen = {}

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.setdefault("weight", pl_module.net[4].weight.detach().clone())

    fit(pruning(schedule=START, include=["net.4"], remove=1 / 8), Watch(), module=module, epochs=1)
    assert torch.equal(seen["weight"], expected)


def test_a_criterion_of_the_users_own():
    class Last(Criterion):
        def score(self, group, tensors, gradients, generator):
            return -torch.arange(group.width)

    module = small_net()
    rows = module.net[9].weight[:, :12].detach().clone()
    fit(pruning(criterion=Last(), schedule=OneShot(BATCHES - 1, "step"), scope="group"), module=module, epochs=1)
    assert torch.allclose(module.net[9].weight, rows, atol=0.2)
    assert widths(module) == [6, 12, 12]


def test_a_criterion_that_returns_a_wrong_shape_is_named():
    class Wrong(Criterion):
        def score(self, group, tensors, gradients, generator):
            return torch.zeros(3)

    with pytest.raises(PruneError, match=r"channel group 'net\.0' has 12 units, but its scores have shape \[3\]"):
        pruned(criterion=Wrong())


def test_random_scores_follow_the_seed():
    results = [pruned(criterion="random", seed=seed) for seed in (0, 0, 1, 2)]
    assert results[0] == results[1]
    assert len({tuple(result) for result in results}) > 1


def test_rounds_follow_the_schedule():
    callback = pruning(remove=0.6, scope="group", schedule=Linear(1, 3, 1, "epoch"))
    fit(callback, epochs=4)
    assert [(event.epoch, event.step) for event in callback.report.history] == [(1, 6), (2, 12), (3, 18)]
    assert [event.removed for event in callback.report.history] == pytest.approx([0.2, 0.4, 0.6])


@pytest.mark.parametrize("shrink", ["rounds", "end"])
def test_reinit_random_draws_weights_anew_and_forgets_momentum(shrink):
    seen = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == BATCHES:
                seen.append((pl_module.net[9].weight.detach().clone(), len(trainer.optimizers[0].state)))

    for seed in (0, 0, 1):
        callback = pruning(scope="group", reinit="random", seed=seed, shrink=shrink)
        before, _ = fit(callback, Watch(), epochs=2)
        assert widths(before) == [6, 12, 12]
    (first, state), (same, _), (other, _) = seen
    assert state == 0
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    bound = 1 / (12 if shrink == "rounds" else 24) ** 0.5  # what nn.Linear draws from
    alive = first[first != 0]
    assert alive.abs().max() <= bound
    assert alive.std() > 0.3 * bound


@pytest.mark.parametrize("recalibrate", [0, 1])
def test_recalibrate_estimates_batch_norm_afresh_after_a_round(recalibrate):
    gaps = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 1:
                with torch.no_grad():
                    gaps.append(
                        float((pl_module.net[0](batch[0]).mean((0, 2, 3)) - pl_module.net[1].running_mean).abs().max())
                    )

    fit(pruning(recalibrate=recalibrate), Watch(), data=loader(1), epochs=2)  # one batch is all the data
    assert gaps[0] < 1e-6 if recalibrate else gaps[0] > 1e-2


def test_a_latency_that_follows_the_parameters_is_budgeted_like_them(monkeypatch):
    monkeypatch.setattr(Probe, "latency", lambda probe, repeats=30: parameters(probe._module) * 1e-6)
    module, callback = small_net(width=24), pruning(of="latency", remove=0.6, schedule=Linear(0, 4, 2, "step"))
    before = parameters(module)
    fit(callback, module=module, epochs=1)
    assert parameters(module) == pytest.approx(0.4 * before, rel=0.1)
    assert callback.report.reached == pytest.approx(1 - parameters(module) / before)


def test_a_latency_budget_survives_a_machine_that_slows_down(monkeypatch):
    def slower_from_the_second_round_on(probe, repeats=30):
        return parameters(probe._module) * (3 if probe._trainer.global_step >= 2 else 1)

    monkeypatch.setattr(Probe, "latency", slower_from_the_second_round_on)
    module, callback = small_net(width=24), pruning(of="latency", remove=0.6, schedule=Linear(0, 4, 2, "step"))
    before = parameters(module)
    fit(callback, module=module, epochs=1)
    assert parameters(module) == pytest.approx(0.4 * before, rel=0.1)


def test_a_measured_latency_is_reached_or_the_reason_given():
    callback = pruning(of="latency", remove=0.1, schedule=START)
    module, refusal = small_net(width=64), None
    try:
        fit(callback, module=module, epochs=1)
    except BudgetError as error:
        refusal = str(error)
    if refusal is None:
        assert sum(widths(module)) < 5 * 64
    else:
        assert "of the latency: at most" in refusal


def test_masks_hold_against_an_optimizer_that_is_stepped_behind_the_back_of_lightning():
    class Raw(SmallNet):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    module, _ = fit(pruning(scope="group", shrink="never", schedule=OneShot(0.5, "fraction")), module=Raw(), epochs=2)
    assert int((module.net[9].weight == 0).all(dim=0).sum()) == 12


def test_files_are_written_where_they_are_asked_for(tmp_path):
    fit(pruning(directory=str(tmp_path / "here")), epochs=2)
    names = {path.name for path in (tmp_path / "here").iterdir()}
    assert names == {"pruned.ckpt", "report.txt", "report.csv", "report.json", "widths.png"}


def test_a_fit_that_stops_early_says_that_the_budget_was_not_reached():
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    callback = pruning(remove=0.6, schedule=Linear(1, 3, 1, "epoch"))
    fit(callback, Stop(), epochs=5)
    assert callback.report.reached == pytest.approx(0.2)
    assert any("before the last round" in note for note in callback.report.notes)


def test_a_budget_that_is_missed_for_want_of_a_nearer_width_is_remarked():
    near, far = pruning(remove=0.31), pruning(remove=0.15, round_to=8)
    for callback in (near, far):
        fit(callback, epochs=2)
    assert abs(near.report.reached - 0.31) < 0.01
    assert not any("less than requested" in note for note in near.report.notes)
    assert any(f"{0.15 - far.report.reached:.1%} less than requested" in note for note in far.report.notes)

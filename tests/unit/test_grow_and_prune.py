"""Growing before pruning, in whole fits."""

from __future__ import annotations

import copy
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from lightning_prune import BudgetError, ConfigurationError, GrowAndPrune, load_pruned
from lightning_prune.criteria.base import WEIGHT_ROLES, entries
from tests.fits import BATCHES, SmallNet, StiffNet, equal, fit, images, loader, parameters, small_net, trainer, widths
from tests.helpers import difference, disagreeing_attributes, run

SAMPLES = images(seed=5).tensors[0]
GROWN = [18, 36, 36]


class Watch(L.Callback):
    """Calls a function at the start of each batch, after the callbacks before it."""

    def __init__(self, look):
        self.look = look

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.look(trainer, pl_module)


def growing(**arguments):
    """Rounds at the starts of the six batches of the second epoch; the last at the start of the third epoch."""
    defaults = {"remove": 0.5, "of": "params", "unit": "step", "start": BATCHES, "end": 2 * BATCHES, "interval": 1}
    return GrowAndPrune(**{**defaults, **arguments})


class TestGrowth:
    def test_the_network_is_wider_and_computes_the_same_before_the_first_step(self):
        module = small_net()
        expected, size = run(module, SAMPLES), parameters(module)
        seen = []

        def look(trainer, pl_module):
            if trainer.global_step == 0:
                seen.append((widths(pl_module), difference(expected, run(pl_module, SAMPLES))))

        callback = growing()
        fit(callback, Watch(look), module=module)
        ((wide, change),) = seen
        assert wide == GROWN
        assert change <= 1e-5
        report = callback.report
        assert report.before.parameters == size
        assert report.reached == pytest.approx(1 - parameters(module) / size)
        assert report.reached == pytest.approx(0.5, abs=0.03)
        assert report.history[0].removed < 0  # it still costs more than the original
        assert disagreeing_attributes(module) == []

    def test_without_growth_the_network_is_pruned_alone(self):
        seen = []
        module, _ = fit(growing(expand=1), Watch(lambda trainer, pl_module: seen.append(widths(pl_module))))
        assert seen[0] == [12, 24, 24]
        assert sum(widths(module)) < 60

    def test_what_stays_whole_does_not_grow(self):
        seen = []
        fit(growing(exclude=["net.4"], remove=0.2), Watch(lambda trainer, pl_module: seen.append(widths(pl_module))))
        assert seen[0] == [18, 36, 24]
        assert {wide[2] for wide in seen} == {24}

    def test_averages_of_the_weights_grow_along(self):
        class Still(EMAWeightAveraging):
            def on_train_batch_end(self, trainer, pl_module, *args):
                if trainer.global_step == 1:
                    averaged = self._average_model.module
                    assert widths(averaged) == GROWN
                    assert difference(expected, run(averaged, SAMPLES)) <= 1e-5

        module = small_net()
        expected = run(module, SAMPLES)
        average = Still()
        fit(growing(), average, module=module)
        assert widths(module) != GROWN

    def test_a_grown_network_loads_without_the_callback_and_from_its_middle(self, tmp_path):
        kept = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        module, _ = fit(growing(), kept, enable_checkpointing=True, epochs=3)
        loaded = load_pruned(tmp_path / "step=2.ckpt", SmallNet)
        assert widths(loaded) == GROWN
        assert disagreeing_attributes(loaded) == []
        resumed = small_net(seed=9)
        trainer(growing()).fit(resumed, loader(), ckpt_path=tmp_path / "step=2.ckpt")
        assert equal(resumed.state_dict(), module.state_dict())

    def test_a_second_fit_does_not_grow_again(self):
        callback = growing()
        module, _ = fit(callback)
        after = widths(module)
        trainer(callback).fit(module, loader())
        assert widths(module) == after


class TestAnnealing:
    def test_the_module_holds_weights_times_gates_and_narrows_step_by_step(self):
        callback, seen = growing(), []

        def look(trainer, pl_module):
            gates, dense = callback.per_unit.get("gates"), callback.learnt.get("dense")
            seen.append((gates is not None, parameters(pl_module)))
            if gates is None:
                return
            # net.4 reads the residual stream and makes what the head reads
            stream = gates["net.0"].float().view(1, -1, 1, 1)
            assert torch.allclose(pl_module.net[4].weight, dense["net.4.weight"] * stream)
            assert torch.allclose(pl_module.net[9].weight, dense["net.9.weight"] * gates["net.4"].float())
            for name, gate in gates.items():
                assert len(gate) == callback._network.graph.groups[name].width

        fit(callback, Watch(look))
        assert [under for under, _ in seen] == [False] * BATCHES + [True] * BATCHES + [False] * BATCHES
        sizes = [size for _, size in seen]
        assert sizes == sorted(sizes, reverse=True)
        assert len(set(sizes)) > 3

    def test_expected_costs_follow_the_budget(self):
        callback, costs = growing(strength=0.0), []

        def look(trainer, pl_module):
            gates = callback.per_unit.get("gates", {})
            if gates:
                expected = {name: round(float(gate.sum())) for name, gate in gates.items()}
                costs.append(callback._network.cost_function("params")(expected))

        module = small_net()
        size = parameters(module)
        fit(callback, Watch(look), module=module)
        grown, target = callback.learnt["grown"], 0.5 * size
        for number, cost in enumerate(costs, 1):
            allowed = target + (grown - target) * (1 - number / 7) ** 3
            assert cost <= allowed * 1.06  # shut gates have gone, rounding included
            assert cost >= allowed * 0.85

    def test_hardening_changes_little(self):
        """What was learnt under gates is not lost when they go."""
        outputs = []

        def look(trainer, pl_module):
            if trainer.global_step == 2 * BATCHES:
                outputs.append(run(pl_module, SAMPLES))

        class Before(L.Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                outputs.append(run(pl_module, SAMPLES))

        # a last round just after the one before it, with gates as hard as they get
        fit(growing(interval=0.5), Before(), Watch(look))
        assert difference(outputs[1], outputs[2]) < 0.2

    def test_the_penalty_is_that_of_the_scales(self):
        found = []

        class Look(L.Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                if trainer.global_step == 0:
                    found.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})

        class Last(Look):
            pass

        callback = growing(strength=0.002)
        module = small_net(optimizer="sgd")
        kept = {}

        def look(trainer, pl_module):
            if trainer.global_step == 0:
                kept.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})
                kept["group"] = callback._network.graph.groups["net.4"]

        fit(Look(), callback, Watch(look), Last(), module=module)
        group = kept.pop("group")
        weights = entries(group.with_role(*WEIGHT_ROLES), kept)
        scales = weights.square().sum(1) / (weights.shape[1] + 4)
        added = found[1]["net.9.weight"] - found[0]["net.9.weight"]
        decay = 0.002 * scales.median() / scales
        assert torch.allclose(added, decay * kept["net.9.weight"], atol=1e-6)
        assert bool((decay < 0.01 / 0.05).all())  # so that the ceiling was not met

    def test_the_penalty_has_a_ceiling(self):
        module = small_net(optimizer="sgd")
        fit(growing(strength=1e6), module=module)
        assert all(bool(tensor.isfinite().all()) for tensor in module.state_dict().values())

    def test_a_group_that_cannot_be_cut_after_all_stays(self):
        module = StiffNet()
        with pytest.warns(UserWarning, match="as wide as it is"):
            fit(growing(expand=1, remove=0.3, end=BATCHES), module=module)
        assert widths(module)[2] == 24

    @pytest.mark.parametrize("of", ["channels", "macs"])
    def test_masks_until_the_end(self, of):
        callback = growing(of=of, shrink="end", min_channels=2)
        module, _ = fit(callback)
        assert callback.report.reached == pytest.approx(0.5, abs=0.05)
        assert min(widths(module)) >= 2


class Rigid(SmallNet):
    """Nothing between its only layer and what goes in and out can change its width."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"expand": 0.5}, "expand must be a finite number of at least 1, but is 0.5"),
            ({"expand": math.nan}, "expand must be"),
            ({"noise": -0.1}, "noise must be"),
            ({"strength": -1.0}, "strength must be"),
            ({"of": "latency"}, "latency"),
            ({"shrink": "never"}, "never"),
            ({"remove": 70}, "Did you mean 0.7"),
        ],
        ids=str,
    )
    def test_wrong_arguments_are_refused_at_once(self, arguments, said):
        with pytest.raises(ConfigurationError, match=said):
            GrowAndPrune(**arguments)

    @pytest.mark.parametrize(
        ("arguments", "kind", "said"),
        [
            ({"end": 3 * BATCHES}, ConfigurationError, "the annealing ends at step 18, which is not before the end"),
            ({"unit": "epoch", "start": 1, "end": 5}, ConfigurationError, "cannot finish"),
            ({"expand": 1.01}, ConfigurationError, "nothing can grow by a factor of 1.01"),
            ({"exclude": ["*"]}, ConfigurationError, "leave no channel group"),
            ({"remove": 0.99}, BudgetError, "at most"),
        ],
        ids=str,
    )
    def test_what_cannot_work_is_said_at_the_start_and_nothing_was_changed(self, arguments, kind, said):
        module = small_net()
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(kind, match=said):
            fit(growing(**arguments), module=module)
        assert equal(module.state_dict(), before)
        assert widths(module) == [12, 24, 24]

    def test_a_network_with_nothing_to_grow(self):
        module = Rigid()
        with pytest.raises(ConfigurationError, match="nothing in this network can grow or be pruned"):
            fit(growing(), module=module)
        fit(growing(expand=1), module=Rigid())

    def test_an_optimizer_that_computes_the_loss_again(self):
        class Closing(SmallNet):
            def configure_optimizers(self):
                return torch.optim.LBFGS(self.parameters())

        module = Closing()
        with pytest.raises(ConfigurationError, match="LBFGS"):
            fit(growing(), module=module)
        assert widths(module) == [12, 24, 24]


def test_a_fit_that_is_stopped_and_cut_can_be_followed_by_another():
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == BATCHES + 4

    def look(trainer, pl_module):
        if trainer.global_step == 0:
            gates = callback.per_unit["gates"]
            seen.append((callback.learnt["dense"].copy(), {name: len(gate) for name, gate in gates.items()}))
            outputs.append(run(pl_module, SAMPLES))

    seen, outputs, callback = [], [], growing(shrink="end")
    module, _ = fit(callback, Stop())
    between, cut = run(module, SAMPLES), widths(module)
    assert sum(cut) < sum(GROWN)
    fit(callback, Watch(look), module=module)
    ((dense, lengths),) = seen
    assert list(lengths.values()) == cut
    assert difference(between, outputs[0]) <= 1e-5  # the same gates before the same weights
    assert any(not torch.equal(value, module.get_parameter(name)) for name, value in dense.items())
    assert callback.report.reached == pytest.approx(0.5, abs=0.03)

"""How much each channel group matters: curves by hand, and a network that stays as it was."""

from __future__ import annotations

import copy
import csv

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_prune import ConfigurationError, OneShot, PruneError, TraceError, measure_sensitivity, trace
from tests.fits import equal, fit, images, pruning, small_net, surface, trainer
from tests.helpers import masked_copy, randomise

SAMPLES, LABELS = images(seed=5).tensors
BATCHES = [(SAMPLES[:24], LABELS[:24]), (SAMPLES[24:], LABELS[24:])]


def by_hand(reads=(1.0, 1.0, 1.0, 1.0)):
    """y = sum of reads times 1, 2, 3 and 4 times x, for x above 0."""
    net = nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
        net[2].weight.copy_(torch.tensor([reads]))
    return net, trace(net, torch.ones(2, 1))


def square(target, plus=0.0):
    return lambda model, batch: (model(batch) - target * batch).square().mean() + plus


def test_losses_and_ratios_by_hand():
    net, graph = by_hand()
    found = measure_sensitivity(
        net, graph, [torch.ones(1, 1), 2 * torch.ones(1, 1)], square(10, plus=1.0), "l1", [0.75, 0.25, 0.5]
    )
    # y / x is 10, and 9, 7, 4 without the smallest units; the errors are (1 + 4) / 2 times 1, 9, 36.
    assert found.dense == 1.0
    assert found.shares == (0.25, 0.5, 0.75)
    assert [tuple(curve) for curve in found.curves] == [("0", 4, (3, 2, 1), (3.5, 23.5, 91.0))]
    assert found.ratios(2.5) == {"0": 0.25}
    assert found.ratios(2.4) == {"0": 0.0}
    assert found.ratios(22.5, relative=True) == {"0": 0.5}
    assert found.ratios(1000) == {"0": 0.75}


def test_a_share_behind_one_that_costs_too_much_is_not_taken():
    net, graph = by_hand(reads=(1.0, 1.0, -1.0, 0.0))  # 0, -1, 1 without the first, the first two, ...
    found = measure_sensitivity(net, graph, [torch.ones(1, 1)], square(0), "l1", [0.25, 0.5, 0.75])
    assert found.curves[0].losses == (1.0, 9.0, 0.0)
    assert found.ratios(1.0) == {"0": 0.25}


def test_the_criterion_says_what_goes_first_by_gradients_too():
    net, graph = by_hand(reads=(9.0, 1.0, 1.0, 1.0))
    # Both gradients of a unit are the same number times its other weight: scores are as 81, 4, 9 and 16.
    found = measure_sensitivity(net, graph, [torch.ones(1, 1)], square(20), "hessian", [0.25])
    assert (found.dense, found.curves[0].losses) == (4.0, (16.0,))
    assert measure_sensitivity(net, graph, [torch.ones(1, 1)], square(20), "l1", [0.25]).curves[0].losses == (121.0,)


def test_a_masked_group_costs_what_it_costs_without_its_units():
    module = randomise(small_net())
    graph = trace(module, SAMPLES)
    found = measure_sensitivity(module, graph, BATCHES, criterion="l1", shares=[0.5])
    monitored = measure_sensitivity(module, graph, BATCHES, criterion="l1", shares=[0.5], monitor="val_loss")
    assert monitored == found
    assert {curve.name for curve in found.curves} == set(graph.groups)
    module.eval()
    for curve in found.curves:
        sizes = sum(
            slot.gather(module.get_parameter(slot.tensor).detach()).abs().sum(1)
            for slot in graph.groups[curve.name].with_role("producer")
        )
        masked = masked_copy(module, graph, {curve.name: sizes.argsort()[len(sizes) // 2 :]})
        with torch.no_grad():
            expected = sum(cross_entropy(masked(x), y) for x, y in BATCHES) / 2
        assert curve.losses[0] == pytest.approx(float(expected), rel=1e-5)
        assert abs(curve.losses[0] - found.dense) > 1e-4


def bits(module):
    return {name: value.reshape(-1).view(torch.uint8).clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("failing", [False, True])
def test_everything_is_put_back_to_the_last_bit(failing):
    module = small_net()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("net.4") or name.startswith("net.9"):
                parameter[..., 0] = -0.0
    module.net[1].eval()
    before, hung, modes = bits(module), surface(module), [part.training for part in module.modules()]
    graph, state = trace(module, SAMPLES), torch.get_rng_state()
    calls = []

    def loss(model, batch):
        calls.append(bits(module))
        if failing and len(calls) == 5:
            model.net[1].running_mean += 1
            raise OSError("the disk is full")
        return cross_entropy(model(batch[0]), batch[1])

    if failing:
        with pytest.raises(TraceError, match=r"the disk is full.*loss function of your own"):
            measure_sensitivity(module, graph, BATCHES, loss, shares=[0.5])
        assert not equal(calls[-1], before)
    else:
        measure_sensitivity(module, graph, BATCHES, loss, shares=[0.5])
    assert equal(bits(module), before)
    assert (surface(module), [part.training for part in module.modules()]) == (hung, modes)
    assert torch.equal(torch.get_rng_state(), state)


def test_ratios_go_into_channel_pruning_as_they_are():
    module = randomise(small_net())
    found = measure_sensitivity(module, trace(module, SAMPLES), BATCHES, criterion="l1", shares=[0.2, 0.4, 0.6])
    rises = sorted(max(loss - found.dense, 0.0) for curve in found.curves for loss in curve.losses)
    ratios = next(ratios for ratios in map(found.ratios, rises) if len(set(ratios.values())) > 1)
    expected = {
        curve.name: curve.kept[found.shares.index(ratios[curve.name])] if ratios[curve.name] else curve.width
        for curve in found.curves
    }
    callback = pruning(ratios=ratios, schedule=OneShot(0, "step"))
    fit(callback, module=module, epochs=1)
    assert {group.name: group.after for group in callback.report.groups} == expected


def test_groups_of_a_pattern_are_cut_together():
    module = small_net()
    graph = trace(module, SAMPLES)
    found = measure_sensitivity(module, graph, BATCHES, shares=[0.5], patterns=["net.[04]", "net.3.*"])
    assert [(curve.name, curve.width, curve.kept) for curve in found.curves] == [
        ("net.[04]", 36, (18,)),
        ("net.3.*", 24, (12,)),
    ]
    with pytest.raises(ConfigurationError, match=r"unknown channel group in patterns 'net.44'.*did you mean 'net.4'"):
        measure_sensitivity(module, graph, BATCHES, patterns=["net.44"])


def test_a_plain_string_is_one_pattern():
    module = small_net()
    graph = trace(module, SAMPLES)
    found = measure_sensitivity(module, graph, BATCHES, shares=[0.5], patterns="net.[04]")
    assert found == measure_sensitivity(module, graph, BATCHES, shares=[0.5], patterns=["net.[04]"])


def test_table_csv_and_figure(tmp_path):
    module = small_net()
    found = measure_sensitivity(module, trace(module, SAMPLES), BATCHES, shares=[0.25, 0.5])
    assert found.save(tmp_path) == []
    assert (tmp_path / "sensitivity.txt").read_text() == found.table() + "\n"
    assert "25%" in found.table()
    assert f"{found.curves[0].losses[1]:.4f}" in found.table()
    rows = list(csv.DictReader((tmp_path / "sensitivity.csv").open()))
    assert len(rows) == 3 * len(found.curves)
    last = found.curves[-1]
    assert (rows[-1]["group"], int(rows[-1]["kept"]), float(rows[-1]["loss"])) == (
        last.name,
        last.kept[1],
        last.losses[1],
    )
    drawn = [panel.get_lines()[0].get_xydata().tolist() for panel in found.figure().axes if panel.get_lines()]
    assert drawn[0] == [
        [float(x), y]
        for x, y in zip(
            [found.curves[0].width, *found.curves[0].kept], [found.dense, *found.curves[0].losses], strict=True
        )
    ]
    assert (tmp_path / "sensitivity.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batches": []}, "there is no batch"),
        ({"shares": [1.0]}, "a share"),
        ({"shares": []}, "no share"),
        ({"criterion": "l22"}, "did you mean 'l2'"),
        ({"monitor": "val_los"}, "did you mean 'val_loss'"),
        ({"monitor": "val_loss", "loss": square(0)}, "Give one of them"),
        ({"model": nn.Linear(1, 1)}, "Trace this model"),
        ({"model": copy.deepcopy(small_net().net), "graph": "its own"}, "Give a loss function"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    module = small_net()
    given = {"model": module, "graph": trace(module, SAMPLES), "batches": BATCHES, **arguments}
    if given["graph"] == "its own":
        given["graph"] = trace(given["model"], SAMPLES)
    with pytest.raises(ConfigurationError, match=words):
        measure_sensitivity(**given)


def test_a_criterion_that_looks_at_runs_is_refused():
    module = small_net()
    with pytest.raises(PruneError, match="APoZ cannot score"):
        measure_sensitivity(module, trace(module, SAMPLES), BATCHES, criterion="apoz")


def test_a_negative_rise_is_refused():
    module = small_net()
    found = measure_sensitivity(module, trace(module, SAMPLES), BATCHES[:1], shares=[0.5])
    with pytest.raises(ConfigurationError, match="at least 0"):
        found.ratios(-0.1)


def test_it_works_on_a_module_that_has_a_trainer():
    module, _ = fit(epochs=1)
    before = bits(module)
    found = measure_sensitivity(module, trace(module, SAMPLES), BATCHES, shares=[0.5])
    assert equal(bits(module), before)
    [validated] = trainer().validate(module, DataLoader(images(seed=5), batch_size=24), verbose=False)
    assert found.dense == pytest.approx(validated["val_loss"], rel=1e-5)


def test_a_validation_step_that_knows_its_loader():
    class Several(type(small_net())):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            assert (batch_idx, dataloader_idx) == (0, 0)
            super().validation_step(batch, batch_idx)

    module = small_net()
    graph = trace(module, SAMPLES)
    plain = measure_sensitivity(module, graph, BATCHES, shares=[0.5], monitor="val_loss")
    module.__class__ = Several
    assert measure_sensitivity(module, graph, BATCHES, shares=[0.5], monitor="val_loss") == plain

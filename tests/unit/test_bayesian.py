"""Bayesian pruning: posteriors and evidence by hand, and what whole fits make of them."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy

from lightning_prune import BayesianPruning, ConfigurationError, Linear, OneShot, trace
from lightning_prune.bayes import Beta, area_under_curve, evidence_of, ranking
from lightning_prune.graph.program import module_programs
from lightning_prune.graph.tracer import named_leaves
from lightning_prune.schedules import Position
from lightning_prune.surgery.readers import observe
from tests.fits import Exactness, SmallNet, StiffNet, fit, images, loader, small_net, trainer, widths
from tests.helpers import run

SAMPLES = images(seed=5).tensors[0]


def bayesian(**arguments):
    return BayesianPruning(**{"of": "channels", "rounds": 3, "draws": 4, "batches": 3, **arguments})


def evidence(model, batches, draw=None, ridge=None):
    programs = [module_programs(model, batch)[0] for batch in batches]
    graph, tensors = trace(model, batches[0]), named_leaves(model)
    draw = torch.ones(len(batches)) if draw is None else draw
    return evidence_of(observe(graph, programs, tensors), tensors, graph.groups, draw, ridge)


def test_two_rounds_of_a_posterior_by_hand():
    first = Beta(torch.ones(3), torch.ones(3)).updated(torch.tensor([1.0, 0.5, 0.0]), memory=0.8, weight=4.0)
    torch.testing.assert_close(first.mean, torch.tensor([4.8, 2.8, 0.8]) / 5.6)
    second = first.updated(torch.tensor([1.0, 0.0, 0.0]), memory=0.8, weight=4.0)
    torch.testing.assert_close(second.a, torch.tensor([7.84, 2.24, 0.64]))
    torch.testing.assert_close(second.b, torch.tensor([0.64, 6.24, 7.84]))


def test_without_memory_only_the_last_round_counts():
    law = Beta(torch.tensor([9.0]), torch.tensor([1.0])).updated(torch.tensor([0.25]), memory=0.0, weight=4.0)
    assert law.mean.item() == 0.25


def test_who_is_undecided_is_put_off_and_ties_go_by_evidence():
    likely = {"a": torch.tensor([0.5, 0.9]), "b": torch.tensor([0.5, 0.1])}
    places = ranking(likely, {"a": torch.tensor([3.0, 9.0]), "b": torch.tensor([2.0, 0.0])})
    assert torch.cat([places["a"], places["b"]]).tolist() == [2, 0, 1, 3]


def two_channels():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    return model


def test_the_evidence_for_two_channels_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 2.0], [1.0, 4.0], [3.0, 4.0]], dtype=torch.float64)
    # Both channels have variance 1 and do not depend on each other, their means are 2 and 3. The outputs have the
    # variances 1 + 4 and 9 + 1; the means are 8 and 3.
    means, variances = torch.tensor([8.0, 3.0]), torch.tensor([5.0, 10.0])
    without = [([6.0, -3.0], [4.0, 1.0]), ([2.0, 6.0], [1.0, 9.0])]
    expected = [
        kl_divergence(Normal(means, variances.sqrt()), Normal(torch.tensor(mean), torch.tensor(variance).sqrt())).mean()
        for mean, variance in without
    ]
    torch.testing.assert_close(evidence(two_channels(), [x])["0"], torch.stack(expected).double())


@pytest.mark.parametrize("bias", [True, False])
def test_what_others_take_over_is_no_evidence(bias):
    x = torch.tensor([[1.0, 2.0], [3.0, 2.0], [1.0, 4.0], [3.0, 4.0]], dtype=torch.float64)
    model = two_channels()
    model[2] = nn.Linear(2, 2, bias=bias).double()
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    found = evidence(model, [x], ridge=0.0)["0"]
    # Neither channel varies with the other. A bias takes up their means, 2 and 3. Without one, what the other channel
    # tells of the numbers themselves goes: with E[x0²] = 5, E[x1²] = 10 and E[x0 x1] = 6 there is 5 - 36 / 10 = 1.4
    # left of x0, and 10 - 36 / 5 = 2.8 of x1. The outputs have the variances 1 + 4 and 9 + 1.
    left = (1.0, 1.0) if bias else (1.4, 2.8)
    expected = []
    for squares, part in zip(([1.0, 9.0], [4.0, 1.0]), left, strict=True):
        whole = torch.tensor([5.0, 10.0])
        without = torch.maximum(whole - part * torch.tensor(squares), 0.01 * whole)
        laws = (Normal(torch.zeros(2), variance.sqrt()) for variance in (whole, without))
        expected.append(kl_divergence(*laws).mean())
    torch.testing.assert_close(found, torch.stack(expected).double())


def test_a_copy_of_another_channel_has_no_evidence_once_it_can_be_handed_over():
    model = two_channels()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    x = torch.rand(20, 2, dtype=torch.float64)
    assert evidence(model, [x])["0"].min() > 0.1
    assert evidence(model, [x], ridge=1e-9)["0"].max() < 1e-3


def test_evidence_of_a_draw_is_that_of_its_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(48, 2)).double()
    first, second = torch.randn(2, 7, 2, 6, 6, dtype=torch.float64)
    drawn = evidence(model, [first, second], torch.tensor([2.0, 1.0]))
    whole = evidence(model, [torch.cat([first, first, second])])
    assert drawn.keys() == whole.keys() == {"0", "2"}
    for name, found in drawn.items():
        torch.testing.assert_close(found, whole[name])


def test_what_several_tensors_read_has_the_sum_of_their_evidence():
    x = torch.randn(50, 2, dtype=torch.float64)
    model = two_channels()
    alone = evidence(model, [x])["0"]

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = copy.deepcopy(model[2]), copy.deepcopy(model[2])

        def forward(self, hidden):
            return self.one(hidden), self.two(hidden)

    torch.testing.assert_close(evidence(nn.Sequential(model[0], model[1], Both()), [x])["0"], 2 * alone)


def test_a_channel_that_says_nothing_has_no_evidence():
    model = two_channels()
    with torch.no_grad():
        model[0].weight[0] = 0
    found = evidence(model, [torch.rand(20, 2, dtype=torch.float64)])["0"]
    assert found[0].abs() < 1e-6 < found[1]


class Attention(L.LightningModule):
    """Its queries and keys meet each other, and no parameter."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def training_step(self, batch):
        x = batch[0].flatten(1).unflatten(1, (18, 4))
        seen = torch.softmax(self.query(x) @ self.key(x).mT, -1) @ self.value(x)
        return cross_entropy(self.out(seen).mean(1), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_what_no_parameter_reads_goes_by_its_norm():
    torch.manual_seed(0)
    module = Attention()
    with torch.no_grad():
        for layer in (module.query, module.key):
            layer.weight[2:4] *= 0.01
            layer.bias[2:4] *= 0.01
    callback = bayesian(remove=1 / 3, include=["query"], schedule=OneShot(0, "step"))
    weak = module.query.weight[0].clone()
    fit(callback, module=module, epochs=1)
    assert module.query.out_features == module.key.out_features == 4
    assert callback.learnt["units"]["evidence"]["query"].min() > 0.3  # the two weak ones are gone
    assert torch.nn.functional.cosine_similarity(module.query.weight[0], weak, dim=0) > 0.9


def test_evidence_is_relative_to_the_mean_of_what_is_left_of_a_group():
    found = []

    class Noting(BayesianPruning):
        def evidence(self, network, draw):
            evidence = super().evidence(network, draw)
            found.append({name: evidence[name][keep].mean() for name, keep in network.masks.keep.items()})
            return evidence

    fit(Noting(remove=0.5, of="channels", rounds=3, draws=2, batches=2, shrink="end"), epochs=6)
    assert len(found) == 3 * (2 + 1)
    for means in found:
        assert torch.stack(list(means.values())) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def done():
    callback = bayesian(remove=0.6)
    module, _ = fit(callback, module=small_net(seed=3))
    return callback, module


def test_every_round_reaches_its_share_of_the_budget(done):
    callback, module = done
    total = 12 + 24 + 24
    assert sum(widths(module)) == 24
    expected = [round(0.6 * total * share) / total for share in (1 / 3, 2 / 3, 1)]
    assert [entry.removed for entry in callback.report.history] == pytest.approx(expected)


def test_what_was_predicted_can_be_compared_with_what_came(done):
    callback, _ = done
    rounds = callback.predictions
    assert [len(found) for found in rounds] == [0, 3, 3]
    left = [sum(len(part["pruned"]) for part in found.values()) for found in rounds[1:]]
    assert left == [48, 36]  # twelve go in each round
    for found in rounds[1:]:
        predicted = torch.cat([part["predicted"] for part in found.values()])
        pruned = torch.cat([part["pruned"] for part in found.values()])
        assert int(pruned.sum()) == 12
        assert ((predicted > 0) & (predicted < 1)).all()
        assert area_under_curve(predicted, pruned) > 0.6  # a network that is learning from scratch, six steps later


@pytest.mark.parametrize("shrink", ["rounds", "end"])
def test_rounds_learn_from_those_before(shrink):
    callback = bayesian(shrink=shrink, weight=2.0)
    fit(callback)
    laws = callback.learnt["units"]
    for name, gone in laws["a"].items():
        # 1 + 1 at first; each round keeps 0.8 and adds 2
        assert torch.allclose(gone + laws["b"][name], torch.tensor(((2 * 0.8 + 2) * 0.8 + 2) * 0.8 + 2))
        assert len(gone) == len(laws["evidence"][name]) == len(laws["forecast"][name])


def test_gates_close_in_the_second_half_of_the_time_between_rounds():
    callback = bayesian(schedule=Linear(2, 6, 2, "epoch"))
    callback.per_unit["forecast"] = {"a": torch.tensor([0.8, 0.5, 0.1]), "b": torch.tensor([0.2, 0.3])}

    def gates(epoch):
        return {name: gate.tolist() for name, gate in callback.gates(Position(epoch, 0, 0.0)).items()}

    assert gates(1.9) == gates(2) == gates(3) == gates(4) == gates(6) == gates(7) == {}
    assert gates(3.5)["a"] == gates(5.5)["a"] == pytest.approx([0.6, 1.0, 1.0])
    assert gates(3.75).keys() == {"a"}
    assert gates(3.75)["a"] == pytest.approx([0.4, 1.0, 1.0])


class Plain(SmallNet):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class BehindTheGates(L.Callback):
    """Works out what a step of gradient descent on the weights behind the gates comes to."""

    def __init__(self, pruning):
        self.pruning, self.steps, self.errors = pruning, 0, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = None
        if "dense" in self.pruning.learnt:
            twin = SmallNet()
            twin.load_state_dict(pl_module.state_dict())
            cross_entropy(twin(batch[0]), batch[1]).backward()
            self.before = {name: weight.clone() for name, weight in self.pruning.learnt["dense"].items()}
            self.held = {name: pl_module.get_parameter(name).detach().clone() for name in self.before}
            self.slopes = {name: twin.get_parameter(name).grad for name in self.before}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, before in (self.before or {}).items():
            gate = torch.where(before == 0, 0, self.held[name] / before)
            expected = before - 0.1 * gate * self.slopes[name]
            torch.testing.assert_close(self.pruning.learnt["dense"][name], expected, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(pl_module.get_parameter(name).detach(), gate * expected, rtol=1e-4, atol=1e-6)
            self.steps += bool(((gate > 0) & (gate < 0.99)).any())


def test_the_optimizer_moves_what_is_behind_the_gates():
    torch.manual_seed(3)
    callback = bayesian(shrink="end", remove=0.6)
    seen = BehindTheGates(callback)
    fit(callback, seen, module=Plain())
    assert seen.steps > 2
    assert "dense" not in callback.learnt


def test_lbfgs_is_refused_where_something_fades():
    class Twice(SmallNet):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ConfigurationError, match="with soft=True cannot"):
        fit(bayesian(), module=Twice())


class LossAfterTheCut(L.Callback):
    """Loss on all samples when training goes on, in evaluation mode."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            samples, labels = images().tensors
            self.loss = cross_entropy(run(pl_module, samples)[0], labels).item()


def loss_after_a_cut(module, **arguments):
    seen = LossAfterTheCut()
    callback = bayesian(schedule=OneShot(0, "step"), batches=6, **arguments)
    fit(callback, seen, module=copy.deepcopy(module), epochs=1)
    return seen.loss


@pytest.mark.parametrize("recalibrate", [0, 6])
def test_the_loss_after_a_cut_is_lower_with_reparameterisation(recalibrate):
    module, _ = fit(module=small_net(seed=1), epochs=8)
    losses = [
        loss_after_a_cut(module, remove=0.3, recalibrate=recalibrate, reparameterise=handed) for handed in (True, False)
    ]
    assert losses[0] < losses[1]


def test_a_group_that_cannot_go_after_all_leaves_the_rest_to_the_others(monkeypatch):
    exactness = Exactness(monkeypatch, lambda module: run(module, SAMPLES))
    callback = bayesian(schedule=Linear(1, 2, 0.5, "epoch"), remove=0.3)
    torch.manual_seed(0)
    module, _ = fit(callback, module=StiffNet())
    assert module.net[4].out_channels == 24
    assert callback.report.reached == pytest.approx(0.3)
    assert max(exactness.differences) < 1e-5
    assert len(callback.report.history) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 4}, "4 rounds are more than the 3 epochs of this fit"),
        ({"schedule": Linear(1, 3, 0.5, "step")}, "several rounds in the same"),
    ],
)
def test_more_rounds_than_the_fit_has_room_for(arguments, message):
    module = small_net()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ConfigurationError, match=message):
        trainer(bayesian(**arguments)).fit(module, loader())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "rounds must be a whole number of at least 1"),
        ({"draws": 0}, "draws must be a whole number of at least 1"),
        ({"batches": 1}, "batches must be a whole number of at least 2"),
        ({"memory": 1.5}, r"memory must lie in \[0, 1\]"),
        ({"rounds": 2.5}, "rounds must be a whole number of at least 1, but is 2.5"),
        ({"soft": "no"}, "soft must be True or False, but is 'no'"),
        ({"weight": 0.0}, "weight above 0"),
        ({"ridge": -1.0}, "ridge not below 0"),
        ({"of": "latency"}, "latency"),
        ({"remove": 50}, "Did you mean 0.5"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        BayesianPruning(**arguments)


def test_area_under_curve_by_hand():
    scores = torch.tensor([0.9, 0.4, 0.4, 0.1])
    # Of the four pairs the positives 0.9 and 0.4 win against 0.4, 0.1 and 0.1, and are level once.
    assert area_under_curve(scores, torch.tensor([True, True, False, False])) == 3.5 / 4
    assert area_under_curve(scores, torch.tensor([False, False, True, True])) == 0.5 / 4


def test_area_under_curve_like_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 8, (60,), generator=generator) / 8
    positive = torch.rand(60, generator=generator) < 0.3
    assert area_under_curve(scores, positive) == pytest.approx(roc_auc_score(positive, scores))


@pytest.mark.parametrize("shrink", ["end", "never"])
def test_a_fit_that_is_stopped_while_channels_fade_can_be_followed_by_another(shrink):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step == 5

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            behind.append(callback.learnt.get("dense"))

    behind = []
    callback = bayesian(schedule=Linear(0, 6, 6, "step"), shrink=shrink)
    module, _ = fit(callback, Stop(), epochs=2)
    left = widths(module)
    assert (sum(left) < 60) == (shrink == "end")
    assert "dense" in callback.learnt
    for values in callback.per_unit.values():
        assert sorted(len(value) for value in values.values()) == sorted(left)
    for name, value in callback.learnt["dense"].items():
        assert value.shape == module.get_parameter(name).shape
    fit(callback, Look(), module=module, epochs=2)
    assert behind[0] is None  # the gates of the first fit are in the weights
    assert behind[5] is not None
    assert callback.report.reached == pytest.approx(0.5)

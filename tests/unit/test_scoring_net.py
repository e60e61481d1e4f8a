"""A small neural network as the criterion: its gates, its stages, its files, and whole fits with it."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

import lightning as L
import pytest
import torch
import yaml
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import BudgetError, ConfigurationError, Linear, OneShot, ScoringNetPruning, Stage, StageLoss, trace
from lightning_prune.probe import Probe
from lightning_prune.probe.stream import gradient_stream
from lightning_prune.scoring import (
    BudgetGates,
    CommitLoss,
    GatedNetwork,
    GateStep,
    RankLoss,
    Scorer,
    TaskLoss,
    rehearsed,
)
from lightning_prune.scoring.training import sampled, straight_through
from tests.contract.test_yaml import command_line, pruning_of
from tests.fits import BATCHES, StiffNet, equal, fit, loader, macs, small_net, surface, trainer, widths

ONCE = [Stage("task", steps=1)]


def scoring(**arguments):
    return ScoringNetPruning(**{"stages": ONCE, "batches": 1, "rehearse": 2, "of": "channels", **arguments})


# The gates ----------------------------------------------------------------------------------------------------------


def test_the_cost_of_fractional_widths_by_hand():
    whole = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(4, dtype=torch.bool)}
    gates = BudgetGates(lambda widths: widths["a"] * widths["b"], 1.0, whole, {"a": 1, "b": 1})
    # From 1x2 half the way to 2x2, then a quarter of the way to 2x3.
    assert gates.cost({"a": 1.5, "b": 2.25}) == pytest.approx(2 + 0.5 * 2 + 0.25 * 2)
    assert gates.cost({"a": 2, "b": 3}) == 6
    assert gates.cost({"b": 2.5}) == pytest.approx(7.5)  # a is as wide as it is
    assert (
        gates.expected_cost({"a": torch.tensor([0.1, 0.0, 0.0]), "b": torch.ones(4)}) == 4
    )  # no width below its floor


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_probabilities_meet_the_budget_by_one_threshold(share):
    torch.manual_seed(0)
    scores = {"a": 5 * torch.randn(7), "b": 5 * torch.randn(9)}
    alive = {"a": torch.arange(7) > 0, "b": torch.ones(9, dtype=torch.bool)}

    def cost(widths):
        return 3 * widths["a"] + widths["a"] * widths["b"]

    gates = BudgetGates(cost, share * cost({"a": 6, "b": 9}), alive, {"a": 1, "b": 1})
    found = gates.probabilities(scores)
    assert gates.expected_cost(found) == pytest.approx(share * 72, rel=1e-5)
    assert float(found["a"][0]) == 0  # it is off
    inside = torch.cat([found["a"][1:], found["b"]])
    values = torch.cat([scores["a"][1:], scores["b"]])
    usable = (inside > 1e-3) & (inside < 1 - 1e-3)
    thresholds = (values - inside.logit())[usable]
    assert len(thresholds) >= 2
    assert float(thresholds.max() - thresholds.min()) < 1e-2


def test_gradients_stay_on_the_budget():
    torch.manual_seed(0)
    whole = {"a": torch.ones(5, dtype=torch.bool), "b": torch.ones(6, dtype=torch.bool)}
    gates = BudgetGates(lambda widths: 7 * widths["a"] + 2 * widths["b"], 20, whole, {"a": 1, "b": 1})
    scores = {name: torch.randn(len(mask), dtype=torch.float64, requires_grad=True) for name, mask in whole.items()}
    weights = {name: torch.randn(len(mask), dtype=torch.float64) for name, mask in whole.items()}

    def value():
        found = gates.probabilities(scores)
        return sum((found[name] * weights[name]).sum() for name in found)

    value().backward()
    found = gates.probabilities(scores)
    bends = {name: (p * (1 - p)).detach() for name, p in found.items()}
    for score in scores.values():
        for unit in range(len(score)):
            with torch.no_grad():
                score[unit] += 1e-4
                above = float(value())
                score[unit] -= 2e-4
                below = float(value())
                score[unit] += 1e-4
            # The oracle solves for the threshold anew.
            assert float(score.grad[unit]) == pytest.approx((above - below) / 2e-4, rel=1e-3, abs=1e-5)
    assert min(float(bend.min()) for bend in bends.values()) > 1e-3
    assert float(sum(score.grad.sum() for score in scores.values())) == pytest.approx(0, abs=1e-6)


def test_gates_are_drawn_with_their_probabilities_and_one_is_always_open():
    draw, probabilities = torch.Generator().manual_seed(0), torch.tensor([0.05, 0.3, 0.9, 0.0])
    drawn = torch.stack([sampled(probabilities, 0.5, draw) for _ in range(2000)])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(drawn.mean(0), probabilities, atol=0.07, rtol=0)
    rare = torch.stack([sampled(torch.full((3,), 1e-4), 0.5, draw) for _ in range(100)])
    assert rare.sum(1).min() == 1


class Gated(nn.Module):
    """Two hidden layers whose channels can be multiplied with gates, which the library knows nothing of."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x, first=1.0, second=1.0):
        hidden = torch.tanh(self.norm(self.a(x))) * first
        return self.c(torch.sigmoid(self.b(hidden)) * second)


@pytest.mark.parametrize("rescale", [False, True])
def test_slopes_along_gates_against_finite_differences(rescale):
    torch.manual_seed(1)
    net, x = Gated().double(), torch.randn(6, 3, dtype=torch.float64)
    groups = trace(net.eval(), x).groups
    assert list(groups) == ["a", "b"]
    gates = {"a": torch.tensor([1.0, 0.0, 1.0, 1.0]).double(), "b": torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]).double()}
    scale = {"a": 0.75**-0.5, "b": 0.6**-0.5} if rescale else {"a": 1.0, "b": 1.0}

    def loss(first, second):
        with torch.no_grad():
            return float(net(x, first * scale["a"], second * scale["b"]).square().sum())

    def difference(name, unit, step=1e-5):
        moved = {n: g.clone() for n, g in gates.items()}
        moved[name][unit] += step
        above = loss(moved["a"], moved["b"])
        moved[name][unit] -= 2 * step
        return (above - loss(moved["a"], moved["b"])) / (2 * step)

    def gradients():
        while True:
            net.zero_grad()
            net(x).square().sum().backward()
            yield {name: parameter.grad.clone() for name, parameter in net.named_parameters()}

    expected = {name: [difference(name, unit) for unit in range(len(gate))] for name, gate in gates.items()}
    before = copy.deepcopy(net.state_dict())
    tensors = dict(net.named_parameters())
    with GatedNetwork(groups, tensors, gradients(), lambda t: t, rescale) as gated:
        found = gated.slopes(gates)
        assert not equal(net.state_dict(), before)
    assert equal(net.state_dict(), before)
    for name, slopes in expected.items():
        assert found[name].tolist() == pytest.approx(slopes, rel=1e-6, abs=1e-8)
        assert min(map(abs, slopes)) > 1e-4


# The stages -----------------------------------------------------------------------------------------------------------


def step_of(scores, slopes=None, probabilities=None):
    """A step on one group, with gates all open and ranks that rise from unit to unit."""
    p = torch.full((len(scores),), 0.5) if probabilities is None else probabilities
    gates = straight_through(torch.sigmoid(scores), torch.ones(len(scores), dtype=torch.bool))
    ranks, energy = torch.arange(len(scores)), torch.tensor([1.0, 3.0])
    draw = torch.Generator().manual_seed(0)
    return GateStep({"g": scores}, {"g": p}, {"g": gates}, {"g": ranks}, {"g": energy}, lambda _: {"g": slopes}, draw)


def test_the_loss_of_ranks_by_hand():
    scores = torch.tensor([0.0, 2.0], requires_grad=True)
    # Of two units, half of the pairs are of one and the same and count log 2, the others log(1 + exp(-2)).
    assert float(RankLoss(pairs=40_000)(step_of(scores))) == pytest.approx((0.693147 + 0.126928) / 2, abs=5e-3)
    RankLoss()(step_of(scores)).backward()
    assert scores.grad[1] < 0 < scores.grad[0]  # descent sets them further apart


def test_the_loss_of_the_task_passes_its_slopes_on():
    scores = torch.tensor([0.0, 1.0], requires_grad=True)
    TaskLoss()(step_of(scores, torch.tensor([2.0, -3.0]))).backward()
    bend = torch.sigmoid(scores.detach()) * (1 - torch.sigmoid(scores.detach()))
    torch.testing.assert_close(scores.grad, torch.tensor([2.0, -3.0]) * bend)


def test_the_loss_of_committing_by_hand():
    p = torch.tensor([0.5, 0.75])
    step = step_of(torch.zeros(2), torch.zeros(2), p)
    left = (0.5 * 1 + 0.75 * 3) / 4
    spread = (0.25 + 0.1875) / 2
    expected = 0.1 * spread + 0.05 * float(torch.tensor(left).log()) ** 2
    assert float(CommitLoss()(step)) == pytest.approx(expected, rel=1e-5)


@dataclass(frozen=True)
class Watched(StageLoss):
    """The loss of the task; takes down every step."""

    noisy: bool = True
    steps: list = field(default_factory=list, compare=False)

    def __call__(self, step):
        self.steps.append(step)
        return step.task()


def test_the_budget_is_met_at_every_step():
    drawn, committed = Watched(), Watched(noisy=False)
    stages = [Stage(drawn, "sgd", lr=0.5, steps=5), Stage(committed, steps=3)]
    module, _ = fit(scoring(stages=stages), epochs=1)
    assert (len(drawn.steps), len(committed.steps)) == (5, 3)
    for step in [*drawn.steps, *committed.steps]:
        expected = [max(float(p.sum()), 1.0) for p in step.probabilities.values()]  # no group has less than a unit
        assert sum(expected) == pytest.approx(30, abs=1e-3)  # half of 60
    assert [sum(int(gate.sum()) for gate in step.gates.values()) for step in committed.steps] == [30] * 3
    assert sum(widths(module)) == 30
    scores = [torch.cat(list(step.scores.values())) for step in drawn.steps]
    assert not torch.equal(scores[0], scores[-1])


def test_the_budget_in_macs_is_reached_before_the_first_step():
    whole = macs(small_net(), torch.ones(1, 2, 6, 6))
    module, _ = fit(scoring(of="macs"), epochs=1)
    assert macs(module, torch.ones(1, 2, 6, 6)) == pytest.approx(whole / 2, rel=0.06)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"loss": "taks"}, "unknown loss of a stage 'taks': did you mean 'task'?"),
        ({"optimizer": "adm"}, "unknown optimizer of a stage 'adm': did you mean 'adam'?"),
        ({"lr": 0}, "the lr of a stage must be above 0"),
        ({"steps": 0}, "the steps of a stage must be at least 1"),
    ],
)
def test_a_wrong_stage_is_refused(arguments, words):
    with pytest.raises(ConfigurationError) as raised:
        Stage(**arguments)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"stages": []}, "stages is empty"),
        ({"steps": 2}, "steps must be at least 3"),
        ({"adapt_steps": 0}, "adapt_steps at least 1"),
        ({"freeze": True}, "give its file in scorer_path"),
        ({"freeze": True, "scorer_path": "x", "stages": ONCE}, "leave out stages"),
        ({"mode": "inti"}, "unknown mode 'inti': did you mean 'init'?"),
        ({"of": "latency"}, 'Give of="macs"'),
        ({"batches": -1}, "batches must be a whole number of at least 0, but is -1"),
        ({"rehearse": -1}, "rehearse must be a whole number of at least 0, but is -1"),
    ],
)
def test_a_wrong_argument_is_refused(arguments, words):
    with pytest.raises(ConfigurationError) as raised:
        ScoringNetPruning(**arguments)
    assert words in str(raised.value)


def test_a_budget_out_of_reach_is_refused_before_anything_is_learnt():
    watched = Watched()
    with pytest.raises(BudgetError, match=r"cannot remove 90\.0 %"):
        fit(scoring(remove=0.9, min_channels=8, stages=[Stage(watched, steps=1)]), epochs=1)
    assert watched.steps == []


def test_stages_are_written_in_yaml_and_read_back(tmp_path):
    own = {"class_path": "lightning_prune.scoring.CommitLoss", "init_args": {"decisiveness": 0.5, "variance": 0.0}}
    stages = [{"loss": "rank", "optimizer": "sgd", "lr": 0.1, "steps": 7}, {"loss": own, "steps": 3}]
    entry = {"class_path": "lightning_prune.ScoringNetPruning", "init_args": {"stages": stages, "mode": "post"}}
    settings = {"callbacks": [entry], "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    written, printed = tmp_path / "written.yaml", tmp_path / "printed.yaml"
    written.write_text(yaml.safe_dump({"trainer": settings}))
    first = command_line("--config", str(written))
    expected = [Stage("rank", "sgd", 0.1, 7), Stage(CommitLoss(0.5, 0.0), steps=3)]
    assert pruning_of(first).stages == expected
    assert pruning_of(first)._stages == expected
    printed.write_text(first.parser.dump(first.config, skip_none=False))
    assert pruning_of(command_line("--config", str(printed))).stages == expected


def test_a_wrong_loss_in_yaml_is_refused_by_name(tmp_path, capsys):
    entry = {"class_path": "lightning_prune.ScoringNetPruning", "init_args": {"stages": [{"loss": "taks"}]}}
    written = tmp_path / "written.yaml"
    written.write_text(yaml.safe_dump({"trainer": {"callbacks": [entry]}}))
    with pytest.raises(SystemExit):
        command_line("--config", str(written))
    assert "taks" in capsys.readouterr().err


class Failing(StageLoss):
    """Fails once the gates are in the weights."""

    def __call__(self, step):
        step.task()
        raise OSError("stop")


# Whole fits -----------------------------------------------------------------------------------------------------------


class Look(L.Callback):
    """Calls something at the start of training."""

    def __init__(self, function):
        self.function = function

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.function(trainer, pl_module)


def test_the_weights_are_bit_identical_after_learning():
    module, seen = small_net(), []
    before = copy.deepcopy(module.state_dict())
    states = {}

    def look(used, pl_module):
        seen.append(equal(pl_module.state_dict(), before) and all(p.grad is None for p in pl_module.parameters()))
        states["after"] = torch.get_rng_state()

    plain = Look(lambda used, pl_module: states.update(plain=torch.get_rng_state()))
    watched = Watched()
    other = small_net()
    torch.manual_seed(5)
    fit(plain, epochs=1, module=other)
    torch.manual_seed(5)
    fit(scoring(remove=0.0, stages=[Stage(watched, steps=3)], shrink="never"), Look(look), module=module, epochs=1)
    assert len(watched.steps) == 3
    assert seen == [True]
    assert torch.equal(states["after"], states["plain"])


def test_a_rehearsal_moves_weights_by_adam_and_puts_them_back():
    weight, buffer = nn.Parameter(torch.tensor([1.0, -2.0, 3.0])), torch.ones(2)
    old, held = torch.tensor([7.0, 7.0, 7.0]), []
    weight.grad = old
    gradients = iter([{"w": torch.tensor([0.5, -3.0, 0.0])}, {"w": torch.tensor([0.5, -3.0, 0.0])}, None])
    with rehearsed({"w": weight, "b": buffer}, gradients, 2, lambda g: g, lambda: held.append(weight.tolist()), 0.25):
        # While gradients stay the same, each step of Adam is the learning rate against their signs.
        torch.testing.assert_close(weight.detach(), torch.tensor([0.5, -1.5, 3.0]))
        assert buffer.tolist() == [1.0, 1.0]
    torch.testing.assert_close(torch.tensor(held), torch.tensor([[0.75, -1.75, 3.0], [0.5, -1.5, 3.0]]))
    assert weight.tolist() == [1.0, -2.0, 3.0]
    assert weight.grad is old
    assert old.tolist() == [7.0, 7.0, 7.0]


def test_a_failure_in_a_rehearsal_puts_weights_back():
    weight = nn.Parameter(torch.tensor([1.0]))

    def gradients():
        yield {"w": torch.tensor([1.0])}
        raise OSError("stop")

    with (
        pytest.raises(OSError, match="stop"),
        rehearsed({"w": weight}, gradients(), 2, lambda g: g, lambda: None),
    ):
        pass
    assert weight.tolist() == [1.0]
    assert weight.grad is None


def test_the_scorer_sees_rehearsed_weights_and_leaves_what_is_off_at_zero():
    found = {}

    class Seeing(StageLoss):
        def __call__(self, step):
            found["energy"] = {name: energy.clone() for name, energy in step.energy.items()}
            return step.task()

    for steps in (0, 3):
        module = small_net()
        fit(scoring(rehearse=steps, stages=[Stage(Seeing(), steps=1)]), module=module, epochs=1)
        found[steps] = found["energy"]
    assert not equal(found[0], found[3])
    rounds = Linear(0, 2, 1, "step")
    fit(scoring(remove=0.5, schedule=rounds, shrink="end", stages=[Stage(Seeing(), steps=1)]), epochs=1)
    assert any(bool((energy == 0).any()) for energy in found["energy"].values())


def test_gradients_stream_on_while_weights_change():
    found = {}

    def look(used, pl_module):
        before, hung = copy.deepcopy(pl_module.state_dict()), surface(pl_module)
        stream, probe = gradient_stream(Probe(used, pl_module)), Probe(used, pl_module)
        found["stream"] = [next(stream) for _ in range(2 * BATCHES)]
        found["plain"] = list(probe.gradients(BATCHES))
        assert equal(pl_module.state_dict(), before)
        assert surface(pl_module) == hung
        with torch.no_grad():
            pl_module.net[9].weight.zero_()
        found["changed"] = next(stream)

    fit(Look(look), epochs=1)
    assert all(equal(a, b) for a, b in zip(found["stream"], found["plain"], strict=False))
    assert not equal(found["stream"][0], found["stream"][BATCHES])
    assert found["changed"]["net.0.weight"].abs().max() == 0  # nothing flows back through a head of zeros


@pytest.mark.parametrize("mode", ["init", "post"])
def test_one_stage_alone_and_each_mode_at_its_time(mode):
    callback = scoring(mode=mode)
    fit(callback, epochs=2)
    assert [page.step for page in callback.report.history] == [0 if mode == "init" else 4]  # 0.3 of 12 steps
    assert callback.report.reached == 0.5


def test_the_seed_decides():
    ends = []
    for seed in (0, 0, 1):
        callback = scoring(seed=seed)
        fit(callback, epochs=1, limit_train_batches=1)
        ends.append(callback.learnt["scorer"])
    assert equal(ends[0], ends[1])
    assert not equal(ends[0], ends[2])


def test_it_learns_once_where_others_must_go_instead():
    watched = Watched()
    callback = scoring(stages=[Stage(watched, steps=2)], schedule=OneShot(1, "epoch"), exclude=["net.0"], remove=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        module, _ = fit(callback, module=StiffNet(), epochs=2)
    assert len(watched.steps) == 2
    assert widths(module)[2] == 24
    assert widths(module)[1] < 24


class Perceptron(L.LightningModule):
    """Another network on other data; its first four hidden units carry the label, the others noise."""

    samples: ClassVar[int] = 256

    def __init__(self, hidden=8):
        super().__init__()
        self.hidden, self.head = nn.Linear(12, hidden), nn.Linear(hidden, 4)

    def plant(self):
        with torch.no_grad():
            self.hidden.weight.zero_().fill_diagonal_(1.0)
            self.hidden.bias.zero_()
            self.head.bias.zero_()
            self.head.weight[:, :4] = 2 * torch.eye(4)
            noise = torch.randn(4, 4)
            self.head.weight[:, 4:] = 2 * noise / noise.norm(dim=0)
        return self

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.head(torch.relu(self.hidden(batch[0]))), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    @classmethod
    def loader(cls):
        labels = torch.arange(cls.samples) % 4
        x = 0.5 * torch.randn(cls.samples, 12, generator=torch.Generator().manual_seed(2))
        x[:, 4:] *= 3
        x[torch.arange(cls.samples), labels] += 2
        return DataLoader(TensorDataset(x, labels), batch_size=64)


def test_useless_channels_score_below_useful_ones():
    torch.manual_seed(0)
    start, end = Watched(noisy=False), Watched(noisy=False)
    stages = [Stage(start, lr=1e-6, steps=1), Stage("task", lr=0.003, steps=60), Stage("commit", steps=10)]
    callback = scoring(stages=[*stages, Stage(end, lr=1e-6, steps=1)], batches=2, shrink="never", rescale=False)
    fit(callback, module=Perceptron().plant(), data=Perceptron.loader(), epochs=1)
    first, last = (watched.steps[0].scores["hidden"].detach() for watched in (start, end))
    assert float(first[:4].min()) < float(first[4:].max())  # it did not know
    assert float(last[:4].min()) > float(last[4:].max())
    assert callback._record["masks"]["hidden"].tolist() == [True] * 4 + [False] * 4


def test_a_failure_while_learning_leaves_the_weights_as_they_were():
    module = small_net()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(OSError, match="stop"):
        fit(scoring(stages=[Stage(Failing(), steps=3)]), module=module, epochs=1)
    assert equal(module.state_dict(), before)


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_scorer_of_one_network_scores_another_without_training(tmp_path):
    learnt = scoring(directory=str(tmp_path))
    fit(learnt, epochs=1)
    path = tmp_path / "scorer.pt"
    stored = Scorer.load(path).state()
    assert equal(stored, learnt.learnt["scorer"])
    assert not equal(stored, Scorer(seed=0).state())

    frozen = scoring(stages=None, scorer_path=str(path), freeze=True)
    module = Perceptron()
    fit(frozen, module=module, data=Perceptron.loader(), epochs=1)
    assert equal(frozen.learnt["scorer"], stored)
    assert module.hidden.out_features == 4

    elsewhere = tmp_path / "new" / "adapted.pt"
    adapted = scoring(stages=None, scorer_path=str(path), adapt_steps=2, save_scorer=str(elsewhere))
    assert [(stage.loss, stage.steps) for stage in adapted._stages] == [("commit", 2)]
    fit(adapted, module=Perceptron(), data=Perceptron.loader(), epochs=1)
    assert not equal(Scorer.load(elsewhere).state(), stored)


def test_a_file_that_is_no_scorer_for_these_features_is_refused(tmp_path):
    good = {"kind": "lightning_prune.scorer", "feature_version": "0123456789ab", "state": Scorer().state()}
    files = {
        "missing.pt": (None, "there is no scorer at"),
        "text.pt": ("hello", "is no file of a scorer"),
        "checkpoint.pt": ({"state_dict": small_net().state_dict()}, "is no file of a scorer"),
        "tensor.pt": (torch.ones(3), "is no file of a scorer"),
        "other.pt": (good, "was trained on features of version '0123456789ab'"),
    }
    Scorer().save(tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    files["damaged.pt"] = ({**whole, "state": {**whole["state"], "unit.0.weight": torch.ones(2, 2)}}, "is damaged")
    files["empty.pt"] = ({**whole, "state": {}}, "is damaged")
    for name, (content, words) in files.items():
        if isinstance(content, str):
            (tmp_path / name).write_text(content)
        elif content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(ConfigurationError) as raised:
            Scorer.load(tmp_path / name)
        assert words in str(raised.value)
        assert name in str(raised.value)


def test_a_fit_with_a_foreign_file_leaves_the_module_alone(tmp_path):
    module = small_net()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ConfigurationError, match="there is no scorer"):
        fit(scoring(stages=None, scorer_path=str(tmp_path / "none.pt"), freeze=True), module=module, epochs=1)
    assert equal(module.state_dict(), before)


def test_a_fit_goes_on_from_a_checkpoint_with_the_scorer_that_was_learnt(tmp_path):
    callback = scoring()
    used = trainer(callback, epochs=1)
    used.fit(small_net(), loader())
    used.save_checkpoint(tmp_path / "one.ckpt", weights_only=False)
    later = scoring(save_scorer=str(tmp_path / "again.pt"))
    trainer(later, epochs=2).fit(small_net(), loader(), ckpt_path=tmp_path / "one.ckpt")
    assert equal(Scorer.load(tmp_path / "again.pt").state(), callback.learnt["scorer"])


def test_a_new_scorer_leaves_the_random_states_of_all_devices_alone():
    def states():
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return [torch.get_rng_state(), *cuda], list(torch.cuda._lazy_seed_tracker.get_calls())

    (before, waiting), _ = states(), Scorer(seed=3)
    after, still = states()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert still == waiting  # what is to be done to CUDA once it is used

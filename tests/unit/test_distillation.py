"""Learning from other networks, beside whatever else happens in a fit."""

from __future__ import annotations

import copy
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import ConfigurationError, Distillation, OneShot
from lightning_prune.distillation import (
    Comparison,
    class_dimension,
    class_loss,
    divergence,
    similarity_loss,
    teacher_weights,
    value_loss,
)
from tests.fits import (
    BATCHES,
    SmallNet,
    equal,
    fit,
    images,
    loader,
    pruning,
    small_net,
    surface,
    trainer,
    widths,
)

QUARTERS = torch.tensor([[2 * math.log(3), 0.0]])  # at the temperature 2: 3/4 and 1/4
KL = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)


def test_divergence_at_a_temperature():
    even = torch.zeros(1, 2)
    assert divergence(even, QUARTERS, 2.0).tolist() == pytest.approx([4 * KL])
    assert divergence(QUARTERS, QUARTERS, 2.0).tolist() == pytest.approx([0.0])
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert divergence(QUARTERS, even, 2.0).tolist() == pytest.approx([4 * reverse])


def test_each_sample_has_its_own_weights_of_teachers():
    first = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log()
    second = torch.tensor([[0.2, 0.8], [0.8, 0.2]]).log()
    weights = teacher_weights([first, second], torch.tensor([0, 1]), 1.0)
    torch.testing.assert_close(weights, torch.tensor([[0.8, 0.5], [0.2, 0.5]]))
    weights = teacher_weights([first, second], torch.tensor([0, 1]), 0.5)
    assert weights[0, 0].item() == pytest.approx(0.64 / 0.68)


def test_losses_of_several_teachers():
    even = torch.zeros(1, 2)
    teachers = [QUARTERS, even]
    assert class_loss(even, teachers, 2.0, None).item() == pytest.approx(2 * KL)
    assert class_loss(even, teachers, 2.0, torch.tensor([[0.9], [0.1]])).item() == pytest.approx(3.6 * KL)
    assert value_loss(torch.tensor([1.0, 2.0]), [torch.tensor([1.0, 4.0]), torch.tensor([0.0, 2.0])]).item() == 1.25


def test_features_of_different_widths_are_compared_by_the_likeness_of_samples():
    root = 1 / math.sqrt(2)  # of one teacher both samples are alike, so both rows are (root, root), not (1, 0), (0, 1)
    expected = (2 * (1 - root) ** 2 + 2 * root**2) / 4
    assert similarity_loss(torch.eye(2), torch.ones(2, 3, 1)).item() == pytest.approx(expected)


class Line(L.LightningModule):
    """Linear scores; calls itself or, if told so, only its submodule."""

    def __init__(self, whole=True, inputs=2, outputs=3, result="tensor"):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        scores = self(batch[0]) if self.hparams.whole else self.layer(batch[0])
        loss = functional.cross_entropy(scores, batch[1])
        kinds = {"tensor": loss, "dict": {"loss": loss, "scores": scores.detach()}, "none": None}
        return kinds[self.hparams.result]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


X = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, -0.7], [2.0, 0.0]])
Y = torch.tensor([0, 2, 1, 1])


def one_step(module, *callbacks, batches=1):
    data = DataLoader(TensorDataset(X.repeat(batches, 1), Y.repeat(batches)), batch_size=len(X))
    return fit(*callbacks, module=module, data=data, epochs=1)[0].layer.weight.detach()


def line(seed, **arguments):
    torch.manual_seed(seed)
    return Line(**arguments)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("result", ["tensor", "dict"])
def test_a_step_goes_down_the_weighted_sum_of_both_losses(whole, result):
    module, teacher = line(0, whole=whole, result=result), line(1)
    weight = module.layer.weight.detach().clone().requires_grad_()
    scores = X @ weight.T
    kl = functional.kl_div((scores / 3).log_softmax(1), (teacher(X).detach() / 3).softmax(1), reduction="batchmean")
    (0.3 * functional.cross_entropy(scores, Y) + 0.7 * 9 * kl).backward()
    taught = Distillation(teacher, weight=0.7, temperature=3, output_of=None if whole else "layer")
    found = one_step(module, taught)
    torch.testing.assert_close(found, (weight - weight.grad).detach())
    assert teacher.layer.weight.grad is None


def test_values_and_several_teachers_and_other_classes_of_them():
    module, teacher = line(0), nn.Linear(2, 3)
    weight = module.layer.weight.detach().clone().requires_grad_()
    distance = ((X @ weight.T - teacher(X).detach()) ** 2).mean() / 2  # the network at its start is the other teacher
    (0.5 * functional.cross_entropy(X @ weight.T, Y) + 0.5 * distance).backward()
    found = one_step(module, Distillation(["start", teacher], task="regression"))
    torch.testing.assert_close(found, (weight - weight.grad).detach())


def test_a_step_that_gives_no_loss_is_skipped_as_it_would_be():
    module = line(0, result="none")
    before = module.layer.weight.detach().clone()
    assert torch.equal(one_step(module, Distillation("start")), before)


def test_the_moving_average_follows_each_step():
    class Weights(L.Callback):
        found = ()

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.found = (*self.found, pl_module.layer.weight.detach().clone())

    taught, seen = Distillation("ema", ema_decay=0.75), Weights()
    one_step(line(0), taught, seen, batches=3)
    first, second, third = seen.found
    expected = 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third
    torch.testing.assert_close(taught._average.module.layer.weight.detach(), expected)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (line(0), {"teachers": nn.Linear(2, 4)}, r"has shape \[4, 3\], .* teacher Linear .* has shape \[4, 4\]"),
        (line(0, whole=False), {}, "did not call its forward.*output_of; there are: layer"),
        (line(0), {"output_of": "lair"}, "unknown module of Line 'lair'"),
        (line(0), {"teachers": "stat"}, "no checkpoint 'stat'"),
        (line(0), {"teachers": ["start", nn.Linear(2, 3)], "features": ["layer"]}, "teacher Linear .* no module layer"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_nothing_is_left(module, arguments, message):
    used = trainer(Distillation(**arguments), epochs=1)
    before = surface(module)
    with pytest.raises(ConfigurationError, match=message):
        used.fit(module, DataLoader(TensorDataset(X, Y), batch_size=4))
    assert surface(module) == before
    assert "training_step" not in vars(used.strategy)


def test_labels_are_found_or_named():
    def train(**arguments):
        data = DataLoader(TensorDataset(X, Y, Y.flip(0)), batch_size=4)
        return fit(Distillation(["start", line(1)], **arguments), module=line(0), data=data, epochs=1)[0].layer.weight

    with pytest.raises(ConfigurationError, match=r"2 tensors of the batch can be those .* shape \[4\]"):
        train()
    assert not torch.equal(train(labels=1), train(labels=2))
    assert not torch.equal(train(labels=1), train(teacher_temperature=None))


def test_manual_optimization_and_compiled_networks_are_refused():
    manual, compiled = line(0), line(0)
    manual.automatic_optimization = False
    compiled.layer.compile()
    for module, message in ((manual, "optimizes manually"), (compiled, "layer is compiled")):
        with pytest.raises(ConfigurationError, match=message):
            one_step(module, Distillation(output_of="layer"))


@pytest.mark.parametrize(
    "arguments", [{"weight": 1.5}, {"temperature": 0}, {"teachers": []}, {"task": "ranking"}, {"ema_decay": 1.0}]
)
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ConfigurationError):
        Distillation(**arguments)


def resumable(folder, module, **arguments):
    taught = Distillation(["start", "ema"], features=["net.2"], ema_decay=0.9)
    kept = {"save_top_k": -1, "enable_version_counter": False}
    saving = [
        ModelCheckpoint(folder, filename="{epoch}", **kept),
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=BATCHES + 2, **kept),
    ]
    used = trainer(taught, pruning(schedule=OneShot(7, "step")), *saving, enable_checkpointing=True)
    used.fit(module, loader(), **arguments)
    return taught, used


def test_beside_pruning_the_start_stays_whole_and_the_average_follows_and_a_resumed_fit_is_the_same(tmp_path):
    module = small_net()
    before, first = surface(module), copy.deepcopy(module.state_dict())
    taught, used = resumable(tmp_path, module)
    assert sum(widths(module)) == 30
    assert widths(taught._average.module) == widths(module)
    assert equal(dict(taught._start.state_dict()), dict(first))
    assert surface(module) == before
    assert "training_step" not in vars(used.strategy)
    assert used.callback_metrics["distillation/loss"] > 0
    for file in ("epoch=0", f"step={BATCHES + 2}"):  # before the shrink and after it
        assert "start" in torch.load(tmp_path / f"{file}.ckpt", weights_only=True)["callbacks"]["Distillation"]
        again = small_net(seed=9)
        resumed, _ = resumable(tmp_path / "again", again, ckpt_path=tmp_path / f"{file}.ckpt")
        assert equal(again.state_dict(), module.state_dict())
        assert equal(resumed.state_dict(), taught.state_dict())


def test_pruning_looks_at_the_network_without_its_teachers():
    reports = []
    for company in ([], [Distillation(small_net(seed=3))]):
        callback = pruning(schedule=OneShot(0, "step"), criterion="taylor")
        fit(callback, *company, epochs=1)
        reports.append(callback.report)
    assert reports[0].groups == reports[1].groups
    assert (reports[0].before.macs, reports[0].refused) == (reports[1].before.macs, reports[1].refused)


def test_a_pruned_checkpoint_can_teach(tmp_path):
    small, _ = fit(pruning(directory=str(tmp_path)), epochs=2)
    taught = Distillation(str(tmp_path / "pruned.ckpt"))
    module, _ = fit(taught, epochs=1)
    (teacher,) = taught._present().values()
    assert type(teacher) is SmallNet
    samples = images().tensors[0]
    assert torch.equal(teacher(samples), small.eval()(samples))
    assert sum(widths(module)) == 60
    assert taught.state_dict().keys() == {"updated"}


TOKENS = torch.zeros(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("scores", "batch", "dim"),
    [
        (torch.zeros(2, 4, 7), [TOKENS], 2),  # a language model
        (torch.zeros(2, 7, 4), {"labels": TOKENS}, 1),  # a segmentation of sequences
        (torch.zeros(2, 7), [TOKENS], 1),
        (torch.zeros(2, 7, 4, 4), [], 1),
    ],
)
def test_the_dimension_of_classes_is_told_by_the_batch(scores, batch, dim):
    assert class_dimension(scores, batch) == dim


@pytest.mark.parametrize(("scores", "batch"), [(torch.zeros(2, 4, 4), [TOKENS]), (torch.zeros(2, 4, 7), [])])
def test_a_dimension_of_classes_that_cannot_be_told_is_asked_for(scores, batch):
    with pytest.raises(ConfigurationError, match=r"dimension 1 or along the last one.*dim"):
        class_dimension(scores, batch)


def test_scores_of_tokens_are_compared_over_the_vocabulary():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    by_hand = functional.kl_div(student.log_softmax(2), teacher.log_softmax(2), reduction="none", log_target=True)
    for dim, batch in ((None, [TOKENS]), (-1, [])):
        found = Comparison("classification", 1.0, None, None, dim).loss(student, {"big": teacher}, batch)
        assert found.item() == pytest.approx(by_hand.sum(2).mean().item(), rel=1e-5)


def test_a_dimension_that_is_not_there_is_refused():
    scores = torch.zeros(2, 7)
    with pytest.raises(ConfigurationError, match=r"dim is 2, but .* shape \[2, 7\]"):
        Comparison("classification", 1.0, None, None, 2).loss(scores, {"big": scores}, [])

"""The probe runs the user's training step in a fit and must leave no trace."""

import os
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision

from lightning_prune.errors import PruneError, TraceError
from lightning_prune.graph.observation import is_observed
from lightning_prune.probe import Probe
from lightning_prune.probe.backward import LocalBackward
from lightning_prune.probe.snapshot import Snapshot


class Rows(Logger):
    """Keeps every logged row in memory."""

    def __init__(self):
        super().__init__()
        self.rows = []

    @property
    def name(self):
        return "rows"

    @property
    def version(self):
        return 0

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


def digits(count=24):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 6, generator=generator), torch.arange(count) % 3)


class Classifier(LightningModule):
    """Calls its network directly, with everything that a probe could disturb."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.several = MetricCollection([MulticlassPrecision(3), MulticlassF1Score(3), MulticlassAccuracy(3)])
        self.losses = []
        self.steps = {"count": 0}
        self.noise = np.random.default_rng(0)
        self.register_buffer("mean_loss", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        x, y = batch
        x += 0.01 * self.trainer.current_epoch + 0.001 * self.global_step
        x = x + 0.01 * (random.random() + np.random.rand() + self.noise.random())
        logits = self.net(x)
        loss = cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.several.update(logits, y)
        self.losses.append(loss.detach())
        self.steps["count"] += 1
        self.mean_loss = 0.9 * self.mean_loss + 0.1 * loss.detach()
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"accuracy": self.accuracy, "mean": self.mean_loss}, on_step=False, on_epoch=True)
        self.logger.log_metrics({"direct": loss.item()}, step=self.steps["count"])
        return {"loss": loss, "logits": logits}

    def on_train_epoch_end(self):
        self.log_dict({f"all/{name}": value for name, value in self.several.compute().items()})
        self.log("mean_of_losses", torch.stack(self.losses).mean())
        self.several.reset()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Gan(LightningModule):
    """Two networks, manual optimization, a moving average of weights inside the step, clipped weights."""

    def __init__(self, direct=False, penalty=False):
        super().__init__()
        self.automatic_optimization = False
        self.direct, self.penalty = direct, penalty
        self.generator = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.2), nn.ReLU(), nn.Linear(5, 1))
        self.average = nn.Linear(2, 5)

    def differentiate(self, loss):
        loss.backward() if self.direct else self.manual_backward(loss)

    def training_step(self, batch):
        real = batch[0]
        of_generator, of_discriminator = self.optimizers()
        noise = torch.randn(len(real), 2)

        self.toggle_optimizer(of_generator)
        loss = bce(self.discriminator(self.generator(noise)), torch.ones(len(real), 1))
        of_generator.zero_grad()
        self.differentiate(loss)
        self.clip_gradients(of_generator, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        of_generator.step()
        self.untoggle_optimizer(of_generator)
        self.log("generator", loss, on_step=True, on_epoch=True)

        def closure():
            of_discriminator.zero_grad()
            fake = self.generator(noise).detach().requires_grad_(self.penalty)
            scores = self.discriminator(fake)
            loss = bce(self.discriminator(real), torch.ones(len(real), 1)) + bce(scores, torch.zeros(len(real), 1))
            if self.penalty:
                loss = loss + torch.autograd.grad(scores.sum(), fake, create_graph=True)[0].square().mean()
            self.differentiate(loss)
            self.log("discriminator", loss, on_step=True)
            return loss

        of_discriminator.step(closure=closure)
        with torch.no_grad():
            self.average.weight.lerp_(self.generator[0].weight, 0.1)
            for parameter in self.discriminator.parameters():
                parameter.data.clamp_(-0.2, 0.2)
        self.lr_schedulers().step()

    def configure_optimizers(self):
        generator = torch.optim.Adam(self.generator.parameters(), lr=0.01)
        discriminator = torch.optim.SGD(self.discriminator.parameters(), lr=0.01, momentum=0.9)
        return [generator, discriminator], [torch.optim.lr_scheduler.StepLR(generator, 2, 0.5)]


def probe_everything(trainer, probe, module):
    attributes = set(vars(module))
    hooks = [len(child._forward_hooks) for child in module.modules()]
    statistics = {name: value.clone() for name, value in module.named_buffers() if "running" in name}
    modes = [child.training for child in module.modules()]
    optimizers = [*trainer.optimizers, *trainer.strategy._lightning_optimizers]
    methods = [dict(vars(optimizer)) for optimizer in optimizers]
    for program in probe.programs():
        program.run()
    assert len(list(probe.gradients(2))) >= 1
    probe.reestimate_batch_norm(2)
    for name, value in module.named_buffers():
        if name in statistics:
            assert not torch.equal(value, statistics[name]), f"{name} was not re-estimated"
            value.copy_(statistics[name])
    assert set(vars(module)) == attributes
    assert [len(child._forward_hooks) for child in module.modules()] == hooks
    assert [child.training for child in module.modules()] == modes
    assert methods == [vars(optimizer) for optimizer in optimizers]


class ProbeInEveryHook(Callback):
    def __init__(self):
        self.hooks = set()

    def visit(self, trainer, pl_module, hook):
        self.hooks.add(hook)
        with torch.no_grad():
            probe_everything(trainer, self.probe, pl_module)
        self.probe.refresh()

    def on_train_start(self, trainer, pl_module):
        self.probe = Probe(trainer, pl_module)
        self.visit(trainer, pl_module, "train_start")

    def on_train_epoch_start(self, trainer, pl_module):
        self.visit(trainer, pl_module, "epoch_start")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.probe.observe(batch)
        self.visit(trainer, pl_module, "batch_start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.visit(trainer, pl_module, "batch_end")

    def on_train_epoch_end(self, trainer, pl_module):
        self.visit(trainer, pl_module, "epoch_end")


def trainer_with(callbacks=(), logger=False, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "log_every_n_steps": 1}
    return Trainer(callbacks=list(callbacks), logger=logger, **quiet, **{**defaults, **settings})


def everything_after_fit(build, callbacks=(), **settings):
    seed_everything(7, verbose=False)
    module, logger = build(), Rows()
    trainer = trainer_with(callbacks, logger, **settings)
    trainer.fit(module, DataLoader(digits(), batch_size=8, shuffle=True))
    return {
        "weights": module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "rows": logger.rows,
        "metrics": dict(trainer.callback_metrics),
        "attributes": sorted(vars(module)),
        "lists": {name: value for name, value in vars(module).items() if name in ("losses", "steps")},
        "draws": [torch.rand(1), np.random.rand(), random.random()],
    }


def assert_identical(a, b, where="fit"):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_identical(left, right, f"{where}[{number}]")
    else:
        assert a == b, where


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (Classifier, {}),
        (Classifier, {"precision": "bf16-mixed", "accumulate_grad_batches": 2}),
        (Gan, {}),
        (lambda: Gan(direct=True), {}),
        (lambda: Gan(penalty=True), {}),
    ],
    ids=["classifier", "classifier-bf16-accumulated", "gan", "gan-direct-backward", "gan-gradient-penalty"],
)
def test_probing_in_every_hook_changes_nothing(build, settings):
    probing = ProbeInEveryHook()
    plain = everything_after_fit(build, **settings)
    probed = everything_after_fit(build, [probing], **settings)
    assert probing.hooks == {"train_start", "epoch_start", "batch_start", "batch_end", "epoch_end"}
    assert len(plain["rows"]) > 6
    assert_identical(plain, probed)


@pytest.fixture
def one_process_group(monkeypatch):
    """Room for a DDP of one process inside this one."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize(
    ("build", "options"),
    [(Classifier, {"static_graph": True}), (Gan, {"find_unused_parameters": True})],
    ids=["static-graph", "find-unused"],
)
def test_probing_does_not_disturb_the_reducer_of_ddp(build, options):
    plain = everything_after_fit(build, strategy=DDPStrategy(process_group_backend="gloo", **options))
    probed = everything_after_fit(
        build, [ProbeInEveryHook()], strategy=DDPStrategy(process_group_backend="gloo", **options)
    )
    assert_identical(plain, probed)


def test_local_backward_fills_the_same_gradients():
    def gradients(mode):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2), nn.Linear(3, 1))
        first, second = net[:3](torch.ones(4, 3)).unbind(1)
        with mode(net.parameters()):
            first.backward(torch.arange(4.0), retain_graph=True)
            torch.autograd.backward([second.sum()], inputs=list(net[2].parameters()))
        return [parameter.grad for parameter in net.parameters()]

    local, real = gradients(LocalBackward), gradients(lambda parameters: nullcontext())
    assert local[-1] is None
    assert_identical(local, real)


class AtStart(Callback):
    """Calls something with a new probe, in a hook, once."""

    def __init__(self, action, hook="on_train_start"):
        self.action, self.hook, self.result = action, hook, None

    def on_train_start(self, trainer, pl_module):
        if self.hook == "on_train_start":
            self.result = self.action(Probe(trainer, pl_module), trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.hook == "on_train_batch_start" and batch_idx == 0:
            probe = Probe(trainer, pl_module)
            probe.observe(batch)
            self.result = self.action(probe, trainer, pl_module)


def in_fit(module, data, action, hook="on_train_start", **settings):
    callback = AtStart(action, hook)
    source = {"datamodule": data} if isinstance(data, LightningDataModule) else {"train_dataloaders": data}
    trainer_with([callback], max_epochs=1, **settings).fit(module, **source)
    return callback.result


class Regression(LightningModule):
    """A linear layer and a frozen one; dict batches; no batch index."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        self.unused = nn.Linear(1, 1, bias=False)
        self.frozen = nn.Linear(1, 1, bias=False).requires_grad_(False)

    def training_step(self, batch):
        return ((self.layer(batch["x"]) - batch["y"]) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.parameters(), lr=0.0)


class Pairs(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"x": torch.tensor([1.0, 2.0 + index]), "y": torch.tensor([3.0])}


def test_gradients_are_those_worked_out_by_hand():
    module = Regression()
    with torch.no_grad():
        module.layer.weight.copy_(torch.tensor([[1.0, -1.0]]))

    def action(probe, trainer, pl_module):
        pl_module.layer.weight.grad = torch.tensor([[5.0, 5.0]])
        found = list(probe.gradients(3))
        assert torch.equal(pl_module.layer.weight.grad, torch.tensor([[5.0, 5.0]]))
        pl_module.layer.weight.grad = None
        return found

    gradients = in_fit(module, DataLoader(Pairs(), batch_size=2), action)
    assert len(gradients) == 1  # the data has no more than one batch
    # x = (1, 2) and (1, 3), y = 3: errors -1 - 3 = -4 and -2 - 3 = -5; gradient = mean of 2 * error * x
    assert torch.equal(gradients[0]["layer.weight"], torch.tensor([[-9.0, -23.0]]))
    assert torch.equal(gradients[0]["unused.weight"], torch.zeros(1, 1))
    assert set(gradients[0]) == {"layer.weight", "unused.weight", "frozen.weight"}  # what is frozen may go all the same


class TwoPlayers(LightningModule):
    """L_a = 2ab and L_b = 3ab + b**2, each for its own optimizer."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = nn.Parameter(torch.tensor(5.0)), nn.Parameter(torch.tensor(7.0))

    def training_step(self, batch):
        of_a, of_b = self.optimizers()
        of_a.zero_grad()
        self.manual_backward(2 * self.a * self.b)
        of_a.step()
        of_b.zero_grad()
        self.manual_backward(3 * self.a * self.b + self.b**2)
        of_b.step()

    def configure_optimizers(self):
        return [torch.optim.SGD([parameter], lr=0.0) for parameter in (self.a, self.b)]


class Accumulating(TwoPlayers):
    def training_step(self, batch):
        self.manual_backward(2 * self.a * self.b)
        self.manual_backward(3 * self.a * self.b)


@pytest.mark.parametrize(
    ("build", "a", "b"),
    [(TwoPlayers, 14.0, 29.0), (Accumulating, 35.0, 25.0)],  # 2b, 3a + 2b; and 5b, 5a where nobody steps
)
def test_manual_optimization_gives_the_gradient_of_each_optimizers_own_loss(build, a, b):
    gradients = in_fit(build(), DataLoader(Pairs()), lambda probe, *_: next(probe.gradients(1)))
    assert gradients == {"a": torch.tensor(a), "b": torch.tensor(b)}


def test_two_runs_of_a_program_are_identical_and_modes_differ():
    def action(probe, trainer, pl_module):
        first = [program.run() for program in probe.programs()]
        torch.rand(3)
        second = [program.run() for program in probe.programs()]
        return probe.programs(), first, second

    programs, first, second = in_fit(Classifier(), DataLoader(digits(), 8, shuffle=True), action, logger=Rows())
    assert [program.name for program in programs] == ["training_step (evaluation mode)", "training_step (train mode)"]
    assert [program.training for program in programs] == [False, True]
    assert [program.samples for program in programs] == [8, 8]
    assert_identical(first, second)
    evaluation, train = first
    assert not torch.equal(evaluation["return"]["logits"], train["return"]["logits"])
    assert set(evaluation["log"]) == {"loss", "mean"}
    assert set(evaluation["outputs"]) == {"net"}
    assert torch.equal(evaluation["outputs"]["net"], evaluation["return"]["logits"])


def test_program_follows_the_weights_but_not_refreshed_data():
    def action(probe, trainer, pl_module):
        run = probe.programs()[0].run
        before = run()["return"]["loss"]
        probe.observe((torch.zeros(4, 6), torch.zeros(4, dtype=torch.long)))
        same = probe.programs()[0].run()["return"]["loss"]
        probe.refresh()
        other = probe.programs()[0].run()["return"]["loss"]
        with torch.no_grad():
            pl_module.net[4].weight.mul_(2)
        return before, same, other, run()["return"]["loss"]

    before, same, other, doubled = in_fit(Classifier(), DataLoader(digits(), 8), action, logger=Rows())
    assert torch.equal(before, same)
    assert not torch.equal(before, other)
    assert not torch.equal(before, doubled)


def test_manual_program_hands_out_the_losses_and_every_call_of_a_network():
    run = in_fit(Gan(direct=True), DataLoader(digits(), 8), lambda probe, *_: probe.programs()[1].run())
    assert run["return"] is None
    assert torch.equal(run["backward"][0], run["log"]["generator"])
    assert torch.equal(run["backward"][1], run["log"]["discriminator"])
    names = ["generator", "discriminator", "generator#2", "discriminator#2", "discriminator#3"]
    assert list(run["outputs"]) == names


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_start"])
def test_own_forward_and_example_inputs_become_programs(hook):
    class WithForward(Regression):
        def __init__(self):
            super().__init__()
            self.example_input_array = {"x": torch.ones(3, 2)}

        def forward(self, x):
            return self.layer(x)

        def training_step(self, batch, index):
            return (self(batch["x"]) - batch["y"]).square().mean()

    runs = in_fit(WithForward(), DataLoader(Pairs(), 2), lambda p, *_: {q.name: q.run() for q in p.programs()}, hook)
    assert list(runs) == ["training_step (evaluation mode)", "training_step (train mode)", "forward (evaluation mode)"]
    assert list(runs["training_step (train mode)"]["outputs"]) == ["layer", "forward"]
    assert runs["forward (evaluation mode)"]["return"].shape == (3, 1)


class Stream(IterableDataset):
    def __init__(self):
        self.reads = 0

    def __iter__(self):
        for index in range(2):
            self.reads += 1
            yield Pairs()[index]


def test_iterable_data_is_never_read_and_says_what_to_do():
    stream = Stream()

    def action(probe, trainer, pl_module):
        before = stream.reads  # Lightning has looked ahead
        with pytest.raises(TraceError, match=r"Stream is iterable.*after the first batch.*example_input_array"):
            probe.programs()
        return stream.reads - before

    assert in_fit(Regression(), DataLoader(stream, batch_size=1), action) == 0


def test_iterable_data_is_served_from_observed_batches():
    def action(probe, trainer, pl_module):
        return len(probe.batches(4)), len(list(probe.gradients(4))), probe.programs()[0].run()["return"]

    batches, gradients, loss = in_fit(Regression(), DataLoader(Stream(), 1), action, "on_train_batch_start")
    assert (batches, gradients) == (1, 1)
    assert loss.shape == ()


def test_example_input_that_does_not_fit_is_named():
    class Misfit(Regression):
        example_input_array = torch.ones(3, 5)

        def forward(self, x):
            return self.layer(x)

    program, _ = Probe(None, Misfit()).programs()
    with pytest.raises(TraceError, match=r"forward \(evaluation mode\) of Misfit failed.*`example_input_array`"):
        program.run()


def test_module_without_trainer_needs_example_inputs():
    with pytest.raises(TraceError, match=r"Regression.*not attached to a Trainer.*example_input_array"):
        Probe(None, Regression()).programs()


def test_failing_step_is_named_and_leaves_no_trace():
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            if self.trainer.global_step == 0 and not self.training:
                self.net[0].requires_grad_(False)
                raise KeyError("boom")
            return cross_entropy(self.net(batch[0]), batch[1])

    def action(probe, trainer, pl_module):
        before, attributes, logger = random.getstate(), dict(vars(pl_module)), trainer.loggers[0]
        weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        drawn = torch.get_rng_state()
        with pytest.raises(TraceError, match=r"training_step \(evaluation mode\) of Failing failed with KeyError"):
            probe.programs()[0].run()
        assert random.getstate() == before
        assert torch.equal(torch.get_rng_state(), drawn)
        assert vars(pl_module).keys() == attributes.keys()
        assert all(vars(pl_module)[key] is value for key, value in attributes.items())
        assert pl_module.losses == []
        assert all(parameter.requires_grad for parameter in pl_module.parameters())
        assert trainer.loggers == [logger]
        assert logger.rows == []
        assert_identical(dict(pl_module.state_dict()), weights)

    in_fit(Failing(), DataLoader(digits(), 8), action, logger=Rows())


@pytest.mark.parametrize("manual", [False, True])
def test_step_without_a_loss_is_an_error(manual):
    class Lossless(Regression):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not manual

        def training_step(self, batch):
            return None

    def action(probe, trainer, pl_module):
        with pytest.raises(PruneError, match=r"training_step of Lossless (returned no loss|ran no backward)"):
            next(probe.gradients(1))

    in_fit(Lossless(), DataLoader(Pairs()), action)


def test_batch_norm_is_reestimated_from_one_batch():
    class Normed(LightningModule):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.frozen = nn.BatchNorm1d(6).eval()
            self.unreached = nn.BatchNorm1d(6)

        def training_step(self, batch):
            return self.norm(self.frozen(batch[0])).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def action(probe, trainer, pl_module):
        for norm in (pl_module.norm, pl_module.frozen, pl_module.unreached):
            norm.running_mean.fill_(3.0)
        pl_module.norm.num_batches_tracked.fill_(5)
        probe.reestimate_batch_norm(1)
        return {name: value.clone() for name, value in pl_module.state_dict().items()}, pl_module.norm.momentum

    data = digits(12)
    state, momentum = in_fit(Normed(), DataLoader(data, batch_size=12), action)
    x = data.tensors[0] - 3  # what the frozen one lets through
    assert torch.allclose(state["norm.running_mean"], x.sum(0) / 12, atol=1e-4)
    assert torch.allclose(state["norm.running_var"], ((x - x.sum(0) / 12) ** 2).sum(0) / 11, atol=1e-4)
    assert state["norm.num_batches_tracked"] == 5
    assert momentum == 0.1
    for name in ("frozen", "unreached"):
        assert torch.equal(state[f"{name}.running_mean"], torch.full((6,), 3.0))
        assert torch.equal(state[f"{name}.running_var"], torch.ones(6))


def test_train_mode_is_the_mode_of_training_whatever_mode_is_on_now():
    modes = []

    class Frozen(Regression):
        def training_step(self, batch):
            modes.append((self.training, self.layer.training, self.frozen.training))
            return super().training_step(batch)

    module = Frozen()
    module.frozen.eval()

    def action(probe, trainer, pl_module):
        evaluation, train = probe.programs()
        modes.clear()
        evaluation.run()
        train.run()
        with torch.inference_mode():  # as within validation
            assert next(probe.gradients(1))["layer.weight"].abs().sum() > 0
        pl_module.eval()
        train.run()
        pl_module.train()
        pl_module.frozen.eval()
        return list(modes)

    found = in_fit(module, DataLoader(Pairs()), action)
    assert found == [(False, False, False), (True, True, False), (True, True, False), (True, True, True)]


def test_batch_norm_averages_over_batches():
    def action(probe, trainer, pl_module):
        batches = probe.batches(3)
        probe.reestimate_batch_norm(3)
        inputs = [pl_module.net[0](x) for x, _ in batches]
        return pl_module.net[1].running_mean.clone(), torch.stack([x.mean(0) for x in inputs]).mean(0)

    class Plain(Classifier):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self.net(batch[0]), batch[1])

        def on_train_epoch_end(self):
            pass

    found, expected = in_fit(Plain(), DataLoader(digits(), 8), action)
    assert torch.allclose(found, expected, atol=1e-6)


class Echo(LightningModule):
    """Keeps to whatever batch it gets."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return {"before": batch}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {"after": batch["before"], "augmented": torch.rand(1)}

    def training_step(self, batch):
        assert set(batch) == {"after", "augmented"}
        return self.layer(batch["augmented"]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_batches_pass_the_transfer_hooks_and_combine_like_the_users_loaders():
    loaders = {"a": DataLoader(range(6), batch_size=2, collate_fn=lambda items: torch.tensor(items) * 10), "b": []}
    loaders["b"] = [DataLoader(range(3), batch_size=None), DataLoader(range(2), batch_size=2)]
    batches = in_fit(Echo(), loaders, lambda probe, *_: probe.batches(10))
    assert len(batches) == 3  # the longest loader has three batches, the others go round
    assert sorted(torch.cat([batch["after"]["a"] for batch in batches]).tolist()) == [0, 10, 20, 30, 40, 50]
    assert sorted(batch["after"]["b"][0] for batch in batches) == [0, 1, 2]
    assert all(sorted(batch["after"]["b"][1].tolist()) == [0, 1] for batch in batches)


def test_combined_loader_and_batch_sampler_of_the_user_are_kept():
    sampler = BatchSampler(RandomSampler(range(4), generator=torch.Generator().manual_seed(0)), 3, drop_last=False)
    loader = DataLoader(range(4), batch_sampler=sampler)
    combined = CombinedLoader([loader, DataLoader(range(8), batch_size=2)], "min_size")
    position = sampler.sampler.generator.get_state()
    batches = in_fit(Echo(), combined, lambda probe, *_: (probe.batches(10), sampler.sampler.generator.get_state()))
    assert torch.equal(batches[1], position)
    assert [len(batch["after"][0]) for batch in batches[0]] == [3, 1]


@pytest.mark.parametrize("own_generator", [True, False])
def test_samples_that_a_sampler_leaves_out_are_not_seen(own_generator):
    generator = torch.Generator().manual_seed(3) if own_generator else None
    sampler = SubsetRandomSampler([1, 4, 5, 7], generator=generator)
    loader = DataLoader(range(8), batch_size=2, sampler=sampler)

    def look(probe, *_):
        before = sampler.generator and sampler.generator.get_state()
        batches = [batch["after"].tolist() for batch in probe.batches(10)]
        assert sampler.generator is generator
        assert generator is None or torch.equal(generator.get_state(), before)
        return batches

    first, again = (in_fit(Echo(), loader, look) for _ in range(2))
    assert sorted(number for batch in first for number in batch) == [1, 4, 5, 7]
    assert first == again


def test_data_of_a_datamodule_and_its_transfer_hook():
    class Data(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(range(4), batch_size=4)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {"after": batch["before"] + 100, "augmented": torch.rand(1)}

    (batch,) = in_fit(Echo(), Data(), lambda probe, *_: probe.batches(1))
    assert sorted(batch["after"].tolist()) == [100, 101, 102, 103]


def test_loader_that_is_not_a_dataloader_is_not_read():
    class Own:
        def __iter__(self):
            return iter([torch.ones(1)])

    def action(probe, trainer, pl_module):
        with pytest.raises(TraceError, match="the training loader is a Own"):
            probe.batches(1)

    in_fit(Echo(), Own(), action)


def test_lazy_module_is_refused_by_name():
    class Lazy(LightningModule):
        example_input_array = torch.ones(2, 3)

        def __init__(self):
            super().__init__()
            self.layer = nn.LazyLinear(2)

    with pytest.raises(TraceError, match=r"'layer.weight' of Lazy is lazy"):
        Probe(None, Lazy()).programs()[0].run()


def test_compiled_network_is_watched_and_gives_the_same():
    class Compiled(Regression):
        def __init__(self):
            super().__init__()
            self.net = torch.compile(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)), backend="eager")
            self.inside = []

        def training_step(self, batch):
            return (self.net(batch["x"]) - batch["y"]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def action(probe, trainer, pl_module):
        probe.programs()[0].run()  # without care it would be compiled now, before the hook comes
        seen = []
        handle = pl_module.net._orig_mod[0].register_forward_hook(lambda *_: seen.append(1))
        run = probe.programs()[0].run()
        handle.remove()
        return run, seen, pl_module.training_step(probe.batches(1)[0])

    run, seen, loss = in_fit(Compiled(), DataLoader(Pairs(), 2), action)
    assert "net" in run["outputs"]
    assert seen == [1]
    assert torch.allclose(run["return"], loss)


def test_networks_in_containers_are_watched():
    class Listed(LightningModule):
        example_input_array = (torch.ones(1, 2),)

        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(2, 2), nn.ModuleDict({"head": nn.Linear(2, 1)})])

        def forward(self, x):
            return self.parts[1]["head"](self.parts[0](x))

    assert list(Probe(None, Listed()).programs()[0].run()["outputs"]) == ["parts.0", "parts.1.head", "forward"]


def test_a_tracer_sees_the_program_and_nothing_of_the_sandbox():
    class Operators(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if is_observed():
                self.names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    class Small(LightningModule):
        example_input_array = torch.ones(2, 3)

        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x)

    for program in Probe(None, Small()).programs():
        with Operators() as operators:
            program.run()
        assert "aten::native_batch_norm" in operators.names
        assert not {"aten::clone", "aten::copy_", "aten::detach"} & set(operators.names), program.name


def test_snapshot_restores_nested_and_replaced_contents():
    module = nn.Linear(2, 2)
    module.kept = {"list": [1, [2]], "set": {1}, "tensor": torch.zeros(2)}
    module.generator = torch.Generator().manual_seed(3)
    nested, weight, expected = module.kept["list"][1], module.weight, module.weight.detach().clone()
    before = Snapshot(module)
    module.kept["list"][1].append(3)
    module.kept["list"].append(4)
    module.kept["set"].add(2)
    module.kept["tensor"].add_(1)
    module.kept["new"] = 1
    module.extra = 1
    first = torch.rand(2, generator=module.generator)
    module.weight.data.zero_()
    module.weight = nn.Parameter(torch.ones(2, 2))
    before.restore()
    assert module.kept["list"] == [1, [2]]
    assert module.kept["list"][1] is nested
    assert module.kept["set"] == {1}
    assert torch.equal(module.kept["tensor"], torch.zeros(2))
    assert "new" not in module.kept
    assert not hasattr(module, "extra")
    assert module.weight is weight
    assert torch.equal(module.weight, expected)
    assert torch.equal(torch.rand(2, generator=module.generator), first)

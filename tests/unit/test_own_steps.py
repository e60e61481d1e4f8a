"""Training steps that step in ways of their own: several parts, hidden optimizers, by hand, looking at gradients."""

from __future__ import annotations

import warnings

import lightning as L
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import ChannelPruning, OneShot, RegularisedPruning, WeightPruning
from tests.fits import SmallNet


class SharpnessAware(torch.optim.Optimizer):
    """Steps in two parts, the second of them through another optimizer (in the manner of Foret et al., 2021)."""

    def __init__(self, params, **how):
        super().__init__(params, {})
        self.base_optimizer = torch.optim.SGD(self.param_groups, **how)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm()
        for parameter in [p for group in self.param_groups for p in group["params"]]:
            self.state[parameter]["move"] = 0.05 * parameter.grad / norm
            parameter.add_(self.state[parameter]["move"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for parameter in [p for group in self.param_groups for p in group["params"]]:
            parameter.sub_(self.state[parameter]["move"])
        self.base_optimizer.step()
        self.zero_grad()


class Manual(SmallNet):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def loss(self, batch):
        return cross_entropy(self(batch[0]), batch[1])


class TwoParts(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        optimizer.first_step()
        self.manual_backward(self.loss(batch))
        optimizer.second_step()

    def configure_optimizers(self):
        return SharpnessAware(self.parameters(), lr=0.05, momentum=0.9)


class Hidden(Manual):
    def __init__(self):
        super().__init__()
        self.kept = {"mine": torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)}

    def training_step(self, batch, batch_idx):
        self.kept["mine"].zero_grad()
        self.manual_backward(self.loss(batch))
        self.kept["mine"].step()

    def configure_optimizers(self):
        return None


class ByHand(Manual):
    def training_step(self, batch, batch_idx):
        self.zero_grad()
        self.loss(batch).backward()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.sub_(0.05 * parameter.grad)

    def configure_optimizers(self):
        return None


class ByHandUnderAutomatic(ByHand):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = True


class Adversarial(SmallNet):
    """Looks at the gradient of its input, which it takes by itself."""

    def training_step(self, batch, batch_idx):
        x = batch[0].clone().requires_grad_()
        cross_entropy(self(x), batch[1]).backward()
        moved = (x + 0.03 * x.grad.sign()).detach()
        self.zero_grad()
        return cross_entropy(self(moved), batch[1])


class LooksAtNorms(Manual):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.log("norm", torch.stack([p.grad.norm() for p in self.parameters()]).norm())
        optimizer.step()


class Remembered(LooksAtNorms):
    """Keeps what Lightning has wrapped around its optimizer."""

    def on_fit_start(self):
        self.mine = self.optimizers()


KINDS = [TwoParts, Hidden, ByHand, ByHandUnderAutomatic, Adversarial, LooksAtNorms, Remembered]


def fit(kind, callback, tmp_path, epochs=2):
    L.seed_everything(3)
    module = kind()
    data = TensorDataset(torch.randn(32, 2, 6, 6), torch.randint(0, 3, (32,)))
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_epochs=epochs, callbacks=[callback] if callback else [], accelerator="cpu",
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*(returned `None`|num_workers|treespec).*")
        trainer.fit(module, DataLoader(data, batch_size=8))
    return module


class Watch(L.Callback):
    """Counts the zeros among the weights before each batch."""

    def __init__(self):
        self.shares = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        weights = [p for p in pl_module.parameters() if p.dim() > 1]
        self.shares.append(sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights))


@pytest.mark.parametrize("kind", KINDS)
def test_channels_go_and_training_goes_on(kind, tmp_path):
    callback = ChannelPruning(remove=0.5, of="channels", schedule=OneShot(1, "epoch"))
    fit(kind, callback, tmp_path)
    assert callback.report.reached == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_off_stays_off(kind, tmp_path):
    callback, watch = WeightPruning(remove=0.8, schedule=OneShot(1, "epoch"), shrink="never"), Watch()
    L.seed_everything(3)
    module = kind()
    data = TensorDataset(torch.randn(32, 2, 6, 6), torch.randint(0, 3, (32,)))
    trainer = L.Trainer(
        default_root_dir=tmp_path, max_epochs=3, callbacks=[callback, watch], accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(data, batch_size=8))
    assert all(share == pytest.approx(0.8, abs=0.01) for share in watch.shares[4:])
    assert callback.report.reached == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not ByHandUnderAutomatic])  # which has no loss
def test_looking_leaves_no_trace(kind, tmp_path):
    alone = fit(kind, None, tmp_path)
    looked_at = fit(kind, ChannelPruning("taylor", remove=0.0, schedule=OneShot(1, "epoch")), tmp_path)
    for first, second in zip(alone.parameters(), looked_at.parameters(), strict=True):
        assert torch.equal(first, second)


def test_what_does_not_take_place_is_said(tmp_path):
    with pytest.warns(UserWarning, match="SGD steps without Lightning knowing: what RegularisedPruning does at"):
        fit(Hidden, RegularisedPruning("group_lasso", remove=0.5, of="channels"), tmp_path)


def test_momentum_that_lightning_knows_under_two_names_is_cut_once(tmp_path, recwarn):
    module = fit(Remembered, ChannelPruning(remove=0.5, of="channels", schedule=OneShot(1, "epoch")), tmp_path)
    assert not [warning for warning in recwarn if "cannot be cut" in str(warning.message)]
    state = module.trainer.optimizers[0].state
    assert all(state[p]["exp_avg"].shape == p.shape for p in module.parameters())


class Counting(WeightPruning):
    steps = 0

    def after_step(self, network, optimizer):
        self.steps += 1


@pytest.mark.parametrize("kind", [LooksAtNorms, Remembered, SmallNet])
def test_each_step_is_told_once(kind, tmp_path):
    callback = Counting(remove=0.5)
    fit(kind, callback, tmp_path)
    assert callback.steps == 8

"""Half precision with scaled losses: methods see plain gradients, and nothing of a step that is left out."""

from __future__ import annotations

from itertools import pairwise

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune import DynamicNetworkSurgery, EdgePopup, GReg, Linear, OneShot, RegularisedPruning, WeightPruning

STEPS = 6


class Net(L.LightningModule):
    """Two layers, and a loss that stays small in half precision."""

    momentum = 0.9

    def __init__(self, fused):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        self.fused = fused

    def training_step(self, batch, batch_idx):
        return self.layers(batch).float().square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=self.momentum, fused=self.fused)


class Light(Net):
    """Without momentum, which fused SGD leaves uninitialised where its first step overflows."""

    momentum = 0.0


class Silent(Net):
    """Gives no loss for some batches."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx in (0, 3) else super().training_step(batch, batch_idx)


def fitted(callback, fused, scale, *more, kind=Net, **arguments):
    """A module trained for some steps in half precision with a scaled loss."""
    module = kind(fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    data = DataLoader(torch.randn(STEPS * 4, 6, generator=torch.Generator().manual_seed(1)), 4)
    L.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback, *more], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        **arguments,
    ).fit(module, data)  # fmt: skip
    return module


@pytest.mark.parametrize(
    "callback",
    [
        lambda: EdgePopup(remove=0.5, lr=0.5, shrink="never"),
        lambda: GReg(remove=0.5, of="channels", at=0.99, every=1, ceiling=20.0, shrink="never"),
    ],
    ids=["score gradients", "decay"],
)
def test_fused_optimizers_give_plain_gradients(callback):
    """They would take the factor off within their step, when a method has looked at the gradients already."""
    plain, fused = (fitted(callback(), fused, 1024.0) for fused in (False, True))
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], tensor)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_overflows_is_no_step(fused):
    """The scaler leaves out steps until its factor is small enough; scores must not move in them."""
    callback = EdgePopup(remove=0.5, lr=0.5, shrink="never")
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            scores = callback.learnt["scores"]["layers.0.weight"].clone()
            seen.append((trainer.precision_plugin.scaler.get_scale(), scores))

    fitted(callback, fused, 2.0**19, Look())
    halved = [before[0] > after[0] for before, after in pairwise(seen)]
    assert any(halved)
    assert not all(halved)
    for (_, before), (_, after), left_out in zip(seen[:-1], seen[1:], halved, strict=True):
        assert torch.isfinite(after).all()
        assert torch.equal(before, after) == left_out


@pytest.mark.parametrize(
    "make",
    [
        lambda: DynamicNetworkSurgery(0.5, Linear(0, 6, 6, "step"), gamma=0, shrink="never"),
        lambda: RegularisedPruning("group_lasso", schedule=OneShot(0.99), shrink="never"),
    ],
    ids=["weights behind masks", "proximal steps"],
)
@pytest.mark.parametrize("fused", [False, True])
def test_what_comes_after_a_step_does_not_come_where_it_overflows(make, fused):
    """Fused optimizers are called all the same."""
    callback, seen = make(), []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            behind = {**dict(pl_module.named_parameters()), **callback.learnt.get("dense", {})}
            values = torch.cat([behind[name].detach().flatten() for name in sorted(behind)])
            seen.append((trainer.precision_plugin.scaler.get_scale(), values, callback.learnt.get("steps")))

    fitted(callback, fused, 2.0**19, Look(), kind=Light)
    halved = [before[0] > after[0] for before, after in pairwise(seen[:-1])]
    assert any(halved)
    assert not all(halved)
    for (_, before, steps), (_, after, more), left_out in zip(seen[:-2], seen[1:-1], halved, strict=True):
        assert torch.equal(before, after) == left_out
        assert steps is None or (steps == more) == left_out


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_without_a_loss_is_no_step(fused, accumulated):
    """Where it is the last of those that accumulate, Lightning drops the gradients of the others."""
    whole, scaled = (
        fitted(
            WeightPruning(remove=0.5, schedule=OneShot(0, "step"), shrink="never"), fused, scale, kind=Silent,
            accumulate_grad_batches=accumulated,
        )
        for scale in (1.0, 1024.0)
    )  # fmt: skip
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(scaled.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    assert not torch.equal(whole.state_dict()["layers.0.bias"], Net(fused).state_dict()["layers.0.bias"])

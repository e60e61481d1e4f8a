"""Half precision with scaled losses: methods see plain gradients, and nothing of a step that is left out."""

from __future__ import annotations

from itertools import pairwise

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune import EdgePopup, GReg

STEPS = 6


class Net(L.LightningModule):
    """Two layers, and a loss that stays small in half precision."""

    def __init__(self, fused):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        self.fused = fused

    def training_step(self, batch, batch_idx):
        return self.layers(batch).float().square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, fused=self.fused)


def fitted(callback, fused, scale, *more):
    """A module trained for some steps in half precision with a scaled loss."""
    module = Net(fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    data = DataLoader(torch.randn(STEPS * 4, 6, generator=torch.Generator().manual_seed(1)), 4)
    L.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback, *more], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
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

"""What the demo does where the fit was on another device than its check."""

from __future__ import annotations

import lightning as L
import torch

from lightning_prune.datamodules import DigitsDataModule
from lightning_prune.demo import _load_again
from lightning_prune.recipes import DigitsResNet


def test_a_checkpoint_of_another_device_is_checked_on_the_cpu(tmp_path, capsys):
    model, data = DigitsResNet(width=4, blocks=1), DigitsDataModule()
    trainer = L.Trainer(
        max_steps=1, limit_val_batches=0, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "cpu.ckpt")
    registered = list(torch.serialization._package_registry)
    torch.serialization.register_package(0, lambda storage: "meta", lambda storage, location: None)
    try:
        saved = torch.load(tmp_path / "cpu.ckpt", weights_only=False)
        torch.save(saved, tmp_path / "pruned.ckpt")  # as if its tensors had been on another device
    finally:
        torch.serialization._package_registry[:] = registered
    _load_again(model, data, tmp_path / "pruned.ckpt")
    assert "predicts the same on all 360 test images" in capsys.readouterr().out

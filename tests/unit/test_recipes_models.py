"""The small networks of the demo: shapes, sizes, and that they learn."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_prune.datamodules import DigitsDataModule
from lightning_prune.recipes import DigitsResNet, MultilayerPerceptron


@pytest.mark.parametrize("model", [DigitsResNet(width=4, blocks=1), MultilayerPerceptron(hidden=[12, 6])])
def test_a_network_maps_images_to_ten_scores(model):
    assert model(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_the_residual_network_has_the_parameters_of_its_drawing():
    def convolution(inputs, outputs, size):
        return inputs * outputs * size**2 + 2 * outputs

    blocks = [
        convolution(4, 4, 3) + convolution(4, 4, 3),
        convolution(4, 8, 3) + convolution(8, 8, 3) + convolution(4, 8, 1),
        convolution(8, 16, 3) + convolution(16, 16, 3) + convolution(8, 16, 1),
    ]
    expected = convolution(1, 4, 3) + sum(blocks) + 16 * 10 + 10
    assert sum(p.numel() for p in DigitsResNet(width=4, blocks=1).parameters()) == expected


def test_the_stages_halve_the_image():
    shapes = []
    model = DigitsResNet(width=4, blocks=2)
    for layer in model.net:
        layer.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:])))
    model(torch.rand(2, 1, 8, 8))
    assert shapes[3:10] == [(4, 8, 8)] * 2 + [(8, 4, 4)] * 2 + [(16, 2, 2)] * 2 + [(16, 1, 1)]


@pytest.mark.parametrize(
    ("model", "epochs", "wanted"),
    [
        (lambda: DigitsResNet(width=8, blocks=1), 4, 0.93),
        (lambda: MultilayerPerceptron(hidden=(64,)), 6, 0.90),
    ],
)
def test_a_network_learns_the_digits_and_loads_again(tmp_path, model, epochs, wanted):
    network = model()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = DigitsDataModule()
    trainer.fit(network, data)
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy"} <= trainer.callback_metrics.keys()
    (result,) = trainer.test(network, data, verbose=False)
    assert result["test_accuracy"] > wanted
    digits = torch.cat(trainer.predict(network, data))
    agreement = (digits == data.test_set.tensors[1]).float().mean()
    assert float(agreement) == pytest.approx(result["test_accuracy"], abs=1e-6)
    trainer.save_checkpoint(tmp_path / "network.ckpt")
    loaded = type(network).load_from_checkpoint(tmp_path / "network.ckpt")
    network.eval(), loaded.eval()
    images = torch.rand(5, 1, 8, 8)
    assert torch.equal(network(images), loaded(images))

"""The data modules: what is in a batch, that the three sets are apart, and that orders repeat."""

from __future__ import annotations

import struct
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits

from lightning_prune.datamodules import (
    DigitsDataModule,
    EpochShuffle,
    TorchvisionDataModule,
    images_first,
    shift_randomly,
)
from lightning_prune.errors import ConfigurationError


def digits(**options):
    data = DigitsDataModule(**options)
    data.setup()
    return data


def everything(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_digits_come_whole_scaled_and_with_their_labels():
    data = digits()
    sets = [everything(loader()) for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader)]
    images, labels = (torch.cat(part) for part in zip(*sets, strict=True))
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64

    def key(image, label):
        return (*np.asarray(image).ravel().tolist(), int(label))

    raw = load_digits()
    expected = sorted(key(image / 16, label) for image, label in zip(raw.images, raw.target, strict=True))
    assert sorted(key(image, label) for image, label in zip(images, labels, strict=True)) == expected


def test_digits_are_split_by_fraction_and_evenly_over_the_classes():
    data = digits(val_fraction=0.1, test_fraction=0.3)
    train, val, test = (part.tensors[1] for part in (data.train_set, data.val_set, data.test_set))
    assert (len(val), len(test), len(train)) == (180, 540, 1077)
    for labels in (train, val, test):
        shares = labels.bincount(minlength=10) / len(labels)
        assert (shares - 0.1).abs().max() < 0.01


def test_the_split_depends_on_the_seed_alone():
    first, second, other = digits(seed=1), digits(seed=1), digits(seed=2)
    assert torch.equal(first.test_set.tensors[0], second.test_set.tensors[0])
    assert not torch.equal(first.test_set.tensors[0], other.test_set.tensors[0])


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        torch.rand(epoch + 1)
        sampler = EpochShuffle(100, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 3) == order(0, 3)
    assert sorted(order(0, 3)) == list(range(100))
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


class Seen(LightningModule):
    """Keeps the labels of each epoch's first batch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.first = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        if batch_idx == 0:
            self.first.append(labels.tolist())
        return self.layer(images.flatten(1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_asks_for_a_new_order_each_epoch(tmp_path):
    model = Seen()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    data = digits(batch_size=64)
    trainer.fit(model, data.train_dataloader())
    sampler = EpochShuffle(len(data.train_set), seed=0)
    labels = data.train_set.tensors[1]
    for epoch, seen in enumerate(model.first):
        sampler.set_epoch(epoch)
        assert seen == labels[list(sampler)[:64]].tolist()


def test_a_shift_moves_the_image_and_fills_with_zeros():
    image = torch.zeros(1, 1, 3, 3)
    image[0, 0, 1, 1] = 1
    moved = shift_randomly(image.expand(200, 1, 3, 3), pixels=1)
    assert {int(picture.argmax()) for picture in moved} == set(range(9))
    assert torch.equal(moved.sum(dim=(1, 2, 3)), torch.ones(200))
    assert float(shift_randomly(torch.ones(50, 1, 3, 3), 1).min()) == 0


def test_only_training_images_are_augmented():
    plain, augmented = digits(), digits(augment=True)
    assert not torch.equal(everything(plain.train_dataloader())[0], everything(augmented.train_dataloader())[0])
    for name in ("val_dataloader", "test_dataloader", "predict_dataloader"):
        assert torch.equal(everything(getattr(plain, name)())[0], everything(getattr(augmented, name)())[0])


@pytest.mark.parametrize("fractions", [(0.0, 0.2), (0.2, 0.0), (0.5, 0.5), (-0.1, 0.3)])
def test_fractions_that_leave_a_set_empty_are_refused(fractions):
    with pytest.raises(ConfigurationError, match="val_fraction"):
        DigitsDataModule(val_fraction=fractions[0], test_fraction=fractions[1])


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(ConfigurationError, match="batch_size=0"):
        DigitsDataModule(batch_size=0)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigurationError, match=r"lightning-prune\[demo\]"):
        DigitsDataModule().setup()


@pytest.fixture
def mnist(tmp_path):
    """A folder with twelve training images and four test images in the format of MNIST; pixel values count upwards."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, count in (("train", 12), ("t10k", 4)):
        pixels = np.arange(count, dtype=np.uint8).repeat(28 * 28)
        images = struct.pack(">4I", 0x803, count, 28, 28) + pixels.tobytes()
        labels = struct.pack(">2I", 0x801, count) + bytes(i % 10 for i in range(count))
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    return tmp_path


def test_torchvision_images_are_normalised_and_split(mnist):
    data = TorchvisionDataModule("MNIST", data_dir=str(mnist), batch_size=5, val_size=3)
    data.prepare_data()
    data.setup()
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [9, 3, 4]
    images, labels = everything(data.test_dataloader())
    assert images.shape == (4, 1, 28, 28)
    assert labels.tolist() == [0, 1, 2, 3]
    expected = [(value / 255 - 0.1307) / 0.3081 for value in range(4)]
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor(expected))
    held_out = {int(image[0, 0, 0]) for image in data.val_set.tensors[0]}
    trained_on = {int(image[0, 0, 0]) for image in data.train_set.tensors[0]}
    assert held_out | trained_on == set(range(12))


def test_torchvision_training_images_can_be_augmented(mnist):
    data = TorchvisionDataModule("MNIST", data_dir=str(mnist), val_size=3, augment=True)
    data.setup()
    images, _ = everything(data.train_dataloader())
    black = -0.1307 / 0.3081
    assert images.min() == pytest.approx(black)
    assert any(image.min() < image.max() for image in images)


def test_coloured_images_are_brought_into_the_order_of_networks():
    pixels = torch.arange(2 * 4 * 5 * 3).reshape(2, 4, 5, 3)
    assert images_first(pixels).shape == (2, 3, 4, 5)
    assert images_first(pixels)[1, 2, 3, 4] == pixels[1, 3, 4, 2]


def test_missing_files_are_named_with_the_remedy(tmp_path):
    with pytest.raises(ConfigurationError, match="download=True") as caught:
        TorchvisionDataModule("CIFAR10", data_dir=str(tmp_path)).setup()
    assert str(tmp_path) in str(caught.value)


def test_a_mistyped_data_set_is_told_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"unknown data set 'CIFAR-10'.*'CIFAR10', 'CIFAR100'"):
        TorchvisionDataModule("CIFAR-10")


@pytest.mark.parametrize("size", [0, 12])
def test_a_validation_set_that_does_not_fit_is_refused(mnist, size):
    with pytest.raises(ConfigurationError, match=f"val_size={size}"):
        TorchvisionDataModule("MNIST", data_dir=str(mnist), val_size=size).setup()

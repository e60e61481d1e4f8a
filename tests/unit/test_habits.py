"""LightningModules written in four habits are pruned as they are, without a hint."""

from __future__ import annotations

from itertools import pairwise

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader

from lightning_prune import OneShot
from tests.fits import Exactness, fit, loader, pruning
from tests.helpers import disagreeing_attributes


def convolutions(*widths):
    pairs = pairwise(widths)
    layers = [(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairs]
    return nn.Sequential(*(layer for block in layers for layer in block), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class OwnForward(L.LightningModule):
    """The habit of the manual: layers in the module, a ``forward``, a step that calls it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 16, 3, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 12, 3)
        self.head = nn.Linear(12, 3)

    def forward(self, images):
        hidden = torch.relu(self.norm(self.first(images)))
        return self.head(torch.relu(self.second(hidden)).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def outputs(self, batch):
        return [self(batch[0])]


class OnlyANet(L.LightningModule):
    """A network in an attribute, called in the steps; ``forward`` does not exist."""

    def __init__(self):
        super().__init__()
        self.net = convolutions(2, 10, 14)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(14, 8), nn.GELU(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return {"loss": cross_entropy(self.head(self.net(images)), labels)}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def outputs(self, batch):
        return [self.head(self.net(batch[0]))]


class DictBatch(L.LightningModule):
    """Batches are dictionaries; several inputs go different ways and meet."""

    def __init__(self):
        super().__init__()
        self.image = convolutions(2, 8, 12)
        self.table = nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 6))
        self.head = nn.Linear(12 + 6, 3)

    def forward(self, image, table=None, scale=1.0):
        return self.head(torch.cat([self.image(image), scale * self.table(table)], 1))

    def training_step(self, batch):
        scores = self(batch["image"], table=batch["extra"]["table"], scale=0.5)
        return cross_entropy(scores, batch["label"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def outputs(self, batch):
        return [self(batch["image"], batch["extra"]["table"])]


class TwoNetworks(L.LightningModule):
    """A generator and a discriminator with an optimizer each, stepped by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 18, bias=False), nn.BatchNorm1d(18), nn.ReLU(), nn.Linear(18, 72)
        )
        self.discriminator = nn.Sequential(*convolutions(2, 10, 16), nn.Linear(16, 1))

    def generate(self, count):
        return self.generator(torch.randn(count, 4)).unflatten(1, (2, 6, 6))

    def training_step(self, batch, batch_idx):
        images, _ = batch
        for_generator, for_discriminator = self.optimizers()
        real = self.discriminator(images)
        fake = self.discriminator(self.generate(len(images)).detach())
        loss = binary_cross_entropy_with_logits(real, torch.ones_like(real))
        loss = loss + binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()

        fooled = self.discriminator(self.generate(len(images)))
        for_generator.zero_grad()
        self.manual_backward(binary_cross_entropy_with_logits(fooled, torch.ones_like(fooled)))
        for_generator.step()
        self.log("discriminator", loss, prog_bar=True)

    def configure_optimizers(self):
        return (
            torch.optim.Adam(self.generator.parameters(), lr=0.002, betas=(0.5, 0.99)),
            torch.optim.Adam(self.discriminator.parameters(), lr=0.002, betas=(0.5, 0.99)),
        )

    def outputs(self, batch):
        noise = torch.linspace(-1, 1, 12).view(3, 4)
        return [self.generator(noise), self.discriminator(batch[0])]


def dictionaries():
    def collate(samples):
        images = torch.stack([image for image, _ in samples])
        labels = torch.stack([label for _, label in samples])
        return {
            "image": images,
            "extra": {"table": images.flatten(1)[:, :5], "name": ["x"] * len(images)},
            "label": labels,
        }

    return DataLoader(loader().dataset, batch_size=8, collate_fn=collate)


# Each habit with its data and its channel groups.
HABITS = [
    (OwnForward, loader, {"first": 16, "second": 12}),
    (OnlyANet, loader, {"net.0": 10, "net.3": 14, "head.1": 8}),
    (DictBatch, dictionaries, {"image.0": 8, "image.3": 12, "table.0": 20, "table.2": 6}),
    (TwoNetworks, loader, {"generator.0": 24, "generator.2": 18, "discriminator.0": 10, "discriminator.3": 16}),
]


class Steps(L.Callback):
    """Steps of each optimizer before and after the shrink, and whether all parameters still move."""

    def __init__(self):
        self.moved = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        moved = [not torch.equal(p, self.before[name]) for name, p in pl_module.named_parameters()]
        self.moved.append(sum(moved) / len(moved))


@pytest.mark.parametrize("shrink", ["rounds", "end"])
@pytest.mark.parametrize(("habit", "data", "groups"), HABITS)
def test_pruned_without_a_change(habit, data, groups, shrink, monkeypatch):
    torch.manual_seed(0)
    module, data = habit(), data()
    batch = next(iter(data))

    def outputs(network):
        modes = {name: part.training for name, part in network.named_modules()}
        network.eval()
        with torch.no_grad():
            found = network.outputs(batch)
        for name, part in network.named_modules():
            part.training = modes[name]
        return found

    exactness, steps, callback = Exactness(monkeypatch, outputs), Steps(), pruning(shrink=shrink, criterion="taylor")
    fit(callback, steps, module=module, data=data, epochs=3)

    report = callback.report
    assert {group.name: group.before for group in report.groups} == groups
    total = sum(groups.values())
    assert sum(group.after for group in report.groups) == total - total // 2
    assert len(exactness.differences) == 1
    assert exactness.differences[0] <= 1e-5
    assert (exactness.changed[0] > 1e-3) == (shrink == "rounds")
    assert report.after.parameters == sum(p.numel() for p in module.parameters()) < report.before.parameters
    assert disagreeing_attributes(module) == []
    assert len(steps.moved) == 18
    assert min(steps.moved) == 1
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_a_fraction_of_the_fit_is_the_same_however_many_optimizers_step():
    callback = pruning(schedule=OneShot(0.5, "fraction"))
    fit(callback, module=TwoNetworks(), epochs=4)
    assert [(event.epoch, event.step) for event in callback.report.history] == [(2, 24)]

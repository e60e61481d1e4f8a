"""Small classifiers of 8×8 digits: ordinary LightningModules that know nothing of pruning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor]


class Classifier(LightningModule):
    """Cross-entropy, accuracy, and SGD whose learning rate rises and falls once over the whole fit."""

    def __init__(self, net: nn.Module, learning_rate: float, num_classes: int = 10) -> None:
        super().__init__()
        self.net = net
        self.learning_rate = learning_rate
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The loss that is trained on and logged."""
        return functional.cross_entropy(scores, labels)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores of shape ``[N, classes]`` for images of shape ``[N, C, H, W]``."""
        scores: Tensor = self.net(images)
        return scores

    def _step(self, batch: Batch, stage: str, accuracy: MulticlassAccuracy) -> Tensor:
        images, labels = batch
        scores = self(images)
        loss = self.loss(scores, labels)
        accuracy(scores, labels)
        self.log(f"{stage}_loss", loss, on_step=False, on_epoch=True)
        self.log(f"{stage}_accuracy", accuracy, on_step=False, on_epoch=True, prog_bar=stage != "train")
        return loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one training batch."""
        return self._step(batch, "train", self.train_accuracy)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy of one validation batch."""
        self._step(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy of one test batch."""
        self._step(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Predicted digits of one batch, int64 of shape ``[N]``."""
        images, _ = batch
        return torch.argmax(self(images), dim=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with Nesterov momentum under a one-cycle schedule over all steps of the fit."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut (He et al., 2016), which is a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class DigitsResNet(Classifier):
    """A small residual network: a stem, three stages of basic blocks (8×8, 4×4, 2×2), global pooling, a linear head.

    Args:
        width: Channels of the first stage; the second has twice and the third four times as many.
        blocks: Basic blocks in each stage.
        learning_rate: Peak of the one-cycle schedule.

    Example:
        >>> DigitsResNet(width=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, width: int = 32, blocks: int = 2, learning_rate: float = 0.1) -> None:
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
        for stage in range(3):
            outputs = width * 2**stage
            for block in range(blocks):
                layers.append(_Block(channels, outputs, stride=2 if stage > 0 and block == 0 else 1))
                channels = outputs
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
        super().__init__(nn.Sequential(*layers), learning_rate)
        self.save_hyperparameters()


class MultilayerPerceptron(Classifier):
    """A plain perceptron on the 64 pixels.

    Args:
        hidden: Widths of the hidden layers.
        learning_rate: Peak of the one-cycle schedule.

    Example:
        >>> MultilayerPerceptron(hidden=[16])(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, hidden: Sequence[int] = (256, 128), learning_rate: float = 0.3) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        inputs = 64
        for width in hidden:
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        super().__init__(nn.Sequential(*layers, nn.Linear(inputs, 10)), learning_rate)
        self.save_hyperparameters()

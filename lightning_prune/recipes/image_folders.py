"""Networks of torchvision on a folder of images for each class, as ImageNet is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import get_model
from torchvision.transforms import v2

from lightning_prune.errors import ConfigurationError
from lightning_prune.recipes.models import Batch, Classifier

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TorchvisionClassifier(Classifier):
    """A classifier of torchvision, trained by SGD with a learning rate that rises for a while and falls along a cosine.

    Args:
        name: Name of the network, as in ``torchvision.models.get_model``.
        num_classes: Number of classes.
        learning_rate: Learning rate at its peak.
        weight_decay: Weight decay.
        label_smoothing: Label smoothing of the training loss.
        warm_up: Share of the fit in which the learning rate rises.

    Example:
        >>> TorchvisionClassifier("resnet18", num_classes=5)(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        name: str = "resnet50",
        num_classes: int = 1000,
        learning_rate: float = 0.256,
        weight_decay: float = 3.05e-5,
        label_smoothing: float = 0.1,
        warm_up: float = 0.05,
    ) -> None:
        super().__init__(get_model(name, weights=None, num_classes=num_classes), learning_rate, num_classes)
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.warm_up = warm_up
        self.save_hyperparameters()

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with smoothed labels while training."""
        return functional.cross_entropy(scores, labels, label_smoothing=self.label_smoothing * self.training)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with momentum under a one-cycle schedule that starts and ends at zero."""
        optimizer = torch.optim.SGD(self.parameters(), self.learning_rate, 0.875, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, int(self.trainer.estimated_stepping_batches), pct_start=self.warm_up,
            cycle_momentum=False, div_factor=1e3, final_div_factor=1e3,
        )  # fmt: skip
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ImageFolderDataModule(LightningDataModule):
    """Images in ``data_dir/train/<class>/`` and ``data_dir/val/<class>/``, the layout of ImageNet.

    A batch is ``(images, labels)``: float32 of shape ``[N, 3, size, size]``, normalised as is usual for ImageNet, and
    int64 of shape ``[N]``. Validation and test use the images in ``val``.

    Args:
        data_dir: The folder.
        batch_size: Images in a batch.
        size: Height and width that images are cut to.
        workers: Processes that read images.

    Raises:
        ConfigurationError: If one of the two folders is not there (at ``setup``).

    Example:
        >>> ImageFolderDataModule("imagenet", batch_size=128).size
        224
    """

    def __init__(self, data_dir: str, batch_size: int = 256, size: int = 224, workers: int = 8) -> None:
        super().__init__()
        self.data_dir = data_dir
        self.batch_size = batch_size
        self.size = size
        self.workers = workers

    def setup(self, stage: str | None = None) -> None:
        """Look through the folders."""
        last = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _DEVIATION)]
        drawn = [v2.RandomResizedCrop(self.size), v2.RandomHorizontalFlip(), *last]
        central = [v2.Resize(round(self.size * 256 / 224)), v2.CenterCrop(self.size), *last]
        self.train_set = self._folder("train", v2.Compose(drawn))
        self.val_set = self._folder("val", v2.Compose(central))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Randomly cropped and mirrored images in random order."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Images in order, cut in their middle."""
        return self._loader(self.val_set, shuffle=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The same as for validation."""
        return self.val_dataloader()

    def _loader(self, images: ImageFolder, shuffle: bool) -> DataLoader[Any]:
        kept = self.workers > 0
        return DataLoader(images, self.batch_size, shuffle, num_workers=self.workers, persistent_workers=kept)

    def _folder(self, part: str, transform: Any) -> ImageFolder:
        path = Path(self.data_dir) / part
        if not path.is_dir():
            raise ConfigurationError(
                f"there is no folder {path.absolute()}: data_dir must hold train/<class>/*.jpeg and val/<class>/*.jpeg."
            )
        return ImageFolder(str(path), transform)

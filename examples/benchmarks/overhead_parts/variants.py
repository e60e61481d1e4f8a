"""The same training of a ResNet-18, plain and with each of the ways of pruning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import lightning as L
import torch
import torchvision
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_prune import ChannelPruning, OneShot, shrink, trace

CLASSES = 10
Widths = Mapping[str, tuple[int, int]]
"""Channels out of and into each convolution, batch-norm and linear layer."""


class Classifier(L.LightningModule):
    """An ordinary LightningModule around a ResNet-18; with widths, one that is built small from the start."""

    def __init__(self, widths: Widths | None = None) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18(num_classes=CLASSES)
        for name, (out, into) in (widths or {}).items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.net.get_submodule(parent), leaf, new_layer(self.net.get_submodule(name), out, into))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def new_layer(like: nn.Module, out: int, into: int) -> nn.Module:
    if isinstance(like, nn.Conv2d):
        return nn.Conv2d(into, out, like.kernel_size, like.stride, like.padding, bias=like.bias is not None)
    return nn.BatchNorm2d(out) if isinstance(like, nn.BatchNorm2d) else nn.Linear(into, out)


def widths_of(module: Classifier) -> dict[str, tuple[int, int]]:
    return {
        name: (len(layer.weight), layer.weight.shape[1] if layer.weight.dim() > 1 else 0)
        for name, layer in module.net.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))
    }


def zeros(module: Classifier) -> float:
    """Share of zeros among the weights of the convolutions."""
    weights = [layer.weight for layer in module.net.modules() if isinstance(layer, nn.Conv2d)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


class Regularise(L.Callback):
    """A regularising pruner of Torch-Pruning, used as its authors do: after each backward."""

    def __init__(self, pruner: str, **arguments: object) -> None:
        self._name, self._arguments = pruner, arguments

    def on_train_start(self, trainer: L.Trainer, pl_module: Classifier) -> None:
        import torch_pruning

        importance = (
            torch_pruning.importance.BNScaleImportance()
            if self._name == "BNScalePruner"
            else torch_pruning.importance.GroupMagnitudeImportance()
        )
        build = getattr(torch_pruning.pruner, self._name)
        self._pruner = build(
            pl_module.net, images(1)[0], importance, pruning_ratio=0.5, ignored_layers=[pl_module.net.fc],
            **self._arguments,
        )  # fmt: skip

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Classifier, optimizer: object) -> None:
        self._pruner.regularize(pl_module.net)


def channel_pruning(shrink: str) -> ChannelPruning:
    """Half of all channels at the very start of the fit."""
    return ChannelPruning(remove=0.5, of="channels", schedule=OneShot(at=0, unit="step"), shrink=shrink)


def model_pruning(module: Classifier, kind: str, **arguments: object) -> ModelPruning:
    """Half of each convolution's weights, or rows, from the end of the first epoch on."""
    weights = [(layer, "weight") for layer in module.net.modules() if isinstance(layer, nn.Conv2d)]
    return ModelPruning(
        kind,
        weights,
        amount=0.5,
        apply_pruning=lambda epoch: epoch == 0,
        use_global_unstructured=False,
        use_lottery_ticket_hypothesis=False,
        **arguments,
    )


@dataclass(frozen=True)
class Variant:
    """One way of training.

    Args:
        name: What the table calls it.
        callbacks: The callbacks for a module.
        small: Whether the network is built small from the start.
        after_another: Whether another network of full width is traced and cut in the process before, and forgotten.
    """

    name: str
    callbacks: Callable[[Classifier], list[L.Callback]]
    small: bool = False
    after_another: bool = False


VARIANTS = {
    "plain": Variant("no callback", lambda module: []),
    "again": Variant("no callback, once more", lambda module: []),
    "masks": Variant("lightning-prune, masks", lambda module: [channel_pruning("never")]),
    "unstructured": Variant("Lightning's ModelPruning, unstructured", lambda m: [model_pruning(m, "l1_unstructured")]),
    "structured": Variant(
        "Lightning's ModelPruning, structured",
        lambda m: [model_pruning(m, "ln_structured", pruning_dim=0, pruning_norm=1)],
    ),
    "bn_scale": Variant("Torch-Pruning, BNScalePruner", lambda module: [Regularise("BNScalePruner")]),
    "bn_group": Variant(
        "Torch-Pruning, BNScalePruner, group lasso", lambda module: [Regularise("BNScalePruner", group_lasso=True)]
    ),
    "group_norm": Variant("Torch-Pruning, GroupNormPruner", lambda module: [Regularise("GroupNormPruner")]),
    "shrunk": Variant("lightning-prune, shrunk in the fit", lambda module: [channel_pruning("rounds")]),
    "small": Variant("built small, no callback", lambda module: [], small=True),
    "after": Variant("built small, after another network was cut", lambda module: [], small=True, after_another=True),
}


def images(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 32, 32), torch.randint(CLASSES, (count,))


def fit(
    variant: Variant, widths: Widths, epochs: int, steps: int, batch_size: int, *callbacks: L.Callback
) -> Classifier:
    """Train; the given callbacks come last."""
    if variant.after_another:
        cut_another(batch_size)
    torch.manual_seed(0)
    module = Classifier(widths if variant.small else None)
    data = DataLoader([images(batch_size) for _ in range(steps)], batch_size=None)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[*variant.callbacks(module), *callbacks],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return module


def cut_another(batch_size: int) -> None:
    """Trace and halve a ResNet-18, of which nothing stays but what libraries keep once they have been used."""
    network = torchvision.models.resnet18(num_classes=CLASSES)
    graph = trace(network, images(batch_size)[0])
    shrink(network, graph, {name: torch.arange(group.width // 2) for name, group in graph.groups.items()})


def shrunk_widths(batch_size: int) -> dict[str, tuple[int, int]]:
    """The widths at which the shrunk variant ends up."""
    return widths_of(fit(VARIANTS["shrunk"], {}, 1, 1, batch_size))

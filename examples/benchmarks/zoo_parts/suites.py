"""The model suites: how each model is built without downloads, and what it is run on."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import tiny_transformers
from .informative import make_informative

SUITES = ("torchvision", "timm", "transformers", "awkward")
FAMILIES = Path(__file__).with_name("timm_families.json")
MAX_TIMM_PARAMETERS = 120_000_000
_NOT_FAMILIES = {"factory", "features", "fx_features", "helpers", "hub", "layers", "registry"}


@dataclass(frozen=True)
class Case:
    """One model of a suite.

    Attributes:
        build: Builds the model; ``hints=True`` applies what a peer's published examples change about it.
        inputs: Positional arguments of ``forward`` in evaluation mode.
        train_inputs: The same in train mode, two samples.
        detector: Whether the final outputs depend on a selection, so that the heads must be compared.
    """

    build: Callable[[bool], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    train_inputs: Callable[[], tuple[Any, ...]]
    detector: bool = False

    def fresh(self, seed: int, hints: bool = False) -> nn.Module:
        """The model with informative weights; equal for equal seeds."""
        torch.manual_seed(seed)
        return make_informative(self.build(hints)).eval()


def model_names(suite: str) -> list[str]:
    """All models of a suite."""
    if suite == "torchvision":
        import torchvision

        return [name for name in torchvision.models.list_models() if not name.startswith("quantized_")]
    if suite == "timm":
        report_coverage()
        return list(timm_sizes())
    return list(tiny_transformers.MODELS if suite == "transformers" else _awkward())


def case(suite: str, name: str) -> Case:
    """How to build and run one model of a suite."""
    if suite == "torchvision":
        return _torchvision(name)
    if suite == "timm":
        return _timm(name)
    if suite == "transformers":
        tiny = tiny_transformers.MODELS[name]
        return Case(lambda hints: tiny.build(), *[lambda: tuple(tiny.inputs().values())] * 2)
    model = _awkward()[name]
    return Case(lambda hints: model.build(), model.inputs, model.inputs)


def _awkward() -> dict[str, Any]:
    import awkward

    return awkward.MODELS


# timm


def timm_sizes() -> dict[str, tuple[int, ...]]:
    """Input size of the chosen variant of each timm module that is small enough."""
    chosen = json.loads(FAMILIES.read_text()).values()
    return {variant: tuple(size) for variant, parameters, size in chosen if parameters <= MAX_TIMM_PARAMETERS}


def report_coverage() -> None:
    """Say which modules of the installed timm have no variant in the list, and which were left out for their size."""
    import timm.models

    names = [module.name for module in pkgutil.iter_modules(timm.models.__path__)]
    chosen = json.loads(FAMILIES.read_text())
    missing = [n for n in names if not n.startswith("_") and n not in _NOT_FAMILIES and n not in chosen]
    large = [
        f"{module} ({found[0]}, {found[1]:,} parameters)"
        for module, found in chosen.items()
        if found[1] > MAX_TIMM_PARAMETERS
    ]
    print(
        f"timm: {len(timm_sizes())} families; not covered: {', '.join(missing) or 'none'}; "
        f"left out for size: {', '.join(large) or 'none'}"
    )


def _timm(name: str) -> Case:
    import timm

    size = timm_sizes().get(name) or timm.get_pretrained_cfg(name).input_size

    def inputs() -> tuple[Tensor, ...]:
        return (torch.randn(2, *size),)

    return Case(lambda hints: timm.create_model(name), inputs, inputs)


# torchvision

_CLASSIFIER_SIZES = {"inception": (299, 299), "vit": (224, 224), "maxvit": (224, 224)}
_CLIPS = {"mvit": (16, 224, 224), "s3d": (16, 224, 224)}


def _torchvision(name: str) -> Case:
    from torchvision import models

    kind = models.get_model_builder(name).__module__.removeprefix("torchvision.models.").partition(".")[0]
    quick: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    hinted: dict[str, Any] = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    if kind in ("segmentation", "detection"):
        quick["weights_backbone"] = None
    if kind == "segmentation" and "lraspp" not in name:
        hinted["aux_loss"] = None
    if kind == "detection" and not name.startswith("ssd"):  # these resize their input, to 800 pixels by default
        quick |= {"min_size": 128, "max_size": 192}

    def build(hints: bool) -> nn.Module:
        return models.get_model(name, weights=None, **quick, **(hinted if hints else {}))

    if kind == "detection":
        return Case(build, lambda: (_images(),), lambda: (_images(), _targets()), detector=True)
    if kind == "optical_flow":
        return _case(build, lambda batch: (torch.rand(batch, 3, 128, 136), torch.rand(batch, 3, 128, 136)))
    if kind == "video":
        clip = next((size for start, size in _CLIPS.items() if name.startswith(start)), (8, 64, 80))
        return _case(build, lambda batch: (torch.randn(batch, 3, *clip),), batch=1)
    size = next((size for start, size in _CLASSIFIER_SIZES.items() if name.startswith(start)), (64, 80))
    return _case(build, lambda batch: (torch.randn(batch, 3, *size),))


def _case(build: Callable[[bool], nn.Module], inputs: Callable[[int], tuple[Any, ...]], batch: int = 2) -> Case:
    return Case(build, lambda: inputs(batch), lambda: inputs(2))


_IMAGE_SIZES = ((120, 160), (150, 140))


def _images() -> list[Tensor]:
    return [torch.rand(3, *size) for size in _IMAGE_SIZES]


def _targets() -> list[dict[str, Tensor]]:
    def target(size: Sequence[int]) -> dict[str, Tensor]:
        boxes = torch.tensor([[10.0, 12.0, 70.0, 90.0], [40.0, 20.0, 110.0, 100.0]])
        keypoints = torch.cat([boxes[:, None, :2] + 20 * torch.rand(2, 17, 2), torch.ones(2, 17, 1)], dim=2)
        masks = torch.zeros(2, *size, dtype=torch.uint8)
        for mask, box in zip(masks, boxes.int().tolist(), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = 1
        return {"boxes": boxes, "labels": torch.tensor([1, 1]), "masks": masks, "keypoints": keypoints}

    return [target(size) for size in _IMAGE_SIZES]

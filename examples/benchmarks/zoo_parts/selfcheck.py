"""The negative control: results that are corrupted on purpose must be flagged by the judge."""

from __future__ import annotations

import torch
from torch import nn

from .backends import Pruned, Request, prune
from .judge import PROVEN, judge
from .locate import surviving
from .suites import case

MODELS = (
    "torchvision/resnet18",
    "torchvision/mobilenet_v3_small",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/regnet_y_400mf",
    "torchvision/ssdlite320_mobilenet_v3_large",
    "timm/ghostnet_050",
    "timm/vit_tiny_patch16_224",
)
_RATIO = 0.5


@torch.no_grad()
def swap_columns(original: nn.Module, pruned: nn.Module, seed: int) -> str:
    """Exchange two input columns of one consumer that was cut; returns its name."""
    masks = surviving(original, pruned)
    parameters = dict(pruned.named_parameters())
    full = dict(original.named_parameters())
    cut = [
        name for name in masks if parameters[name].dim() > 1 and 2 <= parameters[name].shape[1] < full[name].shape[1]
    ]
    if not cut:
        raise ValueError("no consumer was cut")
    generator = torch.Generator().manual_seed(seed)
    name = cut[int(torch.randint(len(cut), (1,), generator=generator))]
    first, second = torch.randperm(parameters[name].shape[1], generator=generator)[:2].tolist()
    parameters[name][:, [first, second]] = parameters[name][:, [second, first]]
    return name


def self_check(models: list[str] | None = None, seed: int = 0) -> int:
    """Judge correct and corrupted results; 1 if a correct one is not proven or a corrupted one is."""
    faults = 0
    for model in models or MODELS:
        suite, name = model.split("/")
        chosen = case(suite, name)
        pruned = chosen.fresh(seed)
        torch.manual_seed(seed)
        inputs = chosen.inputs()
        prune("ours", Request(suite, name, pruned, inputs, _RATIO, "exact", seed), Pruned())
        correct = judge(chosen.fresh(seed), pruned, inputs, chosen.detector)
        try:
            corrupted = swap_columns(chosen.fresh(seed), pruned, seed)
        except ValueError as problem:
            faults += 1
            print(f"FAIL {model}: nothing to corrupt, {problem}", flush=True)
            continue
        wrong = judge(chosen.fresh(seed), pruned, inputs, chosen.detector)
        passed = correct.word in PROVEN and wrong.word not in PROVEN
        faults += not passed
        print(
            f"{'ok  ' if passed else 'FAIL'} {model}: {correct.word} ({correct.error}); "
            f"columns of {corrupted} swapped: {wrong.word} ({wrong.error})",
            flush=True,
        )
    print(f"{faults} faults" if faults else "every corrupted result was flagged, every correct one proven")
    return int(faults > 0)

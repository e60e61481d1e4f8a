"""What torch-pruning's own example scripts say by hand about single models."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# Model name pattern -> submodules that its torchvision example leaves whole.
_IGNORED = {
    "ssd*": ("head",),
    "raft_large": ("corr_block", "update_block", "mask_predictor"),
    "fasterrcnn*": ("rpn.head.cls_logits", "rpn.head.bbox_pred", "backbone.fpn", "roi_heads"),
    "fcos_resnet50_fpn": (
        "head.classification_head.cls_logits",
        "head.regression_head.bbox_reg",
        "head.regression_head.bbox_ctrness",
    ),
    "keypointrcnn_resnet50_fpn": (
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "backbone.fpn.layer_blocks",
        "roi_heads.box_head",
        "roi_heads.box_predictor",
        "roi_heads.keypoint_predictor",
    ),
    "maskrcnn_resnet50_fpn_v2": (
        "rpn.head.cls_logits",
        "rpn.head.bbox_pred",
        "roi_heads.box_predictor",
        "roi_heads.mask_predictor",
    ),
    "retinanet_resnet50_fpn_v2": ("head.classification_head.cls_logits", "head.regression_head.bbox_reg"),
}
_CLASSES = 1000


@dataclass
class Hint:
    """Hints for one model: layers to leave whole, head counts, and what to mend after pruning."""

    ignored: list[nn.Module] = field(default_factory=list)
    num_heads: dict[nn.Module, int] = field(default_factory=dict)
    repair: Callable[[Any], None] = lambda pruner: None


def apply_hints(suite: str, name: str, model: nn.Module) -> Hint:
    """The published hints for a model; trainable parameters everywhere, as the examples have them."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    hint = Hint([m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == _CLASSES])
    if suite == "torchvision":
        paths = next((paths for pattern, paths in _IGNORED.items() if fnmatch.fnmatch(name, pattern)), ())
        present = dict(model.named_modules())
        hint.ignored += [present[path] for path in paths if path in present]
    hint.num_heads = {m: m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    fused = [m for m in model.modules() if isinstance(getattr(m, "qkv", None), nn.Linear) and hasattr(m, "num_heads")]
    hint.num_heads |= {m.qkv: m.num_heads for m in fused}
    for module in fused:
        if suite == "timm" and type(module).__name__ == "Attention" and hasattr(module, "scale"):
            _use_own_width(module)

    def repair(pruner: Any) -> None:
        if hasattr(model, "hidden_dim") and isinstance(getattr(model, "conv_proj", None), nn.Conv2d):
            model.hidden_dim = model.conv_proj.out_channels
        for module in fused:
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)

    hint.repair = repair
    return hint


def _use_own_width(module: nn.Module) -> None:
    """Give a timm attention a forward that takes its width from its heads instead of from its input."""

    def forward(x: Any, *_: Any, **__: Any) -> Any:
        batch, tokens, _ = x.shape
        q, k, v = module.qkv(x).reshape(batch, tokens, 3, module.num_heads, module.head_dim).permute(2, 0, 3, 1, 4)
        scores = (module.q_norm(q) * module.scale @ module.k_norm(k).transpose(-2, -1)).softmax(dim=-1)
        mixed = (module.attn_drop(scores) @ v).transpose(1, 2).reshape(batch, tokens, -1)
        return module.proj_drop(module.proj(getattr(module, "norm", nn.Identity())(mixed)))

    module.forward = forward

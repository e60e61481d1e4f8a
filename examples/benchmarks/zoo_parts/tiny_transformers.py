"""One small network, with random weights, of many kinds in the transformers library.

Every kind is as wide and deep as it must be to have several heads and layers. Mixtures of experts run their experts one
by one: what the library does by default is an operator that needs widths of whole cache lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

_TEXT = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT |= {"intermediate_size": 64, "max_position_embeddings": 64}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_VISION |= {"image_size": 32, "patch_size": 8}
_CODER = {"vocab_size": 100, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
_CODER |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_SPEECH = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SPEECH |= {"intermediate_size": 64, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
_SPEECH |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_ALL_STAGES = ["stage1", "stage2", "stage3", "stage4"]


@dataclass(frozen=True)
class Config:
    """A configuration by the name of its class."""

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        """The configuration, and those within it."""
        import transformers

        values = {key: value.make() if isinstance(value, Config) else value for key, value in self.settings.items()}
        return getattr(transformers, self.kind)(**values)


def _tokens() -> Tensor:
    return torch.randint(5, 90, (2, 12))


def _text() -> dict[str, Tensor]:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return {"input_ids": _tokens(), "attention_mask": mask}


def _plain_text() -> dict[str, Tensor]:
    return {"input_ids": _tokens()}


def _texts() -> dict[str, Tensor]:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens()}


def _images(size: int = 32) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def _video(frames: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(2, frames, 3, 16, 16)}


def _speech() -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, 800)}


@dataclass(frozen=True)
class Tiny:
    """A network and what it runs on.

    Attributes:
        kind: Name of its class.
        config: Its configuration.
        inputs: Makes the arguments of ``forward`` by name.
        options: Further arguments for its making.
    """

    kind: str
    config: Config
    inputs: Callable[[], dict[str, Tensor]]
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The network, which takes the arguments in their order."""
        import transformers

        network = getattr(transformers, self.kind)._from_config(self.config.make(), **self.options)
        return ByName(network, list(self.inputs()))


class ByName(nn.Module):
    """Hands positional arguments on by name, and hands out tensors in a tuple."""

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names
        self.settings = {"use_cache": False} if "use_cache" in signature(network.forward).parameters else {}

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        """What the network returns, as a tuple."""
        found: tuple[Any, ...] = self.network(**dict(zip(self.names, tensors, strict=True)), **self.settings).to_tuple()
        return found


def _tiny(kind: str, config: str, inputs: Callable[[], dict[str, Tensor]], /, **settings: Any) -> Tiny:
    return Tiny(kind, Config(config, settings), inputs)


def _by_name(stem: str, ending: str, inputs: Callable[[], dict[str, Tensor]], /, **settings: Any) -> Tiny:
    return _tiny(stem + ending, f"{stem}Config", inputs, **settings)


def _experts(stem: str, /, **settings: Any) -> Tiny:
    config = Config(f"{stem}Config", {**_GROUPED, **settings})
    return Tiny(f"{stem}ForCausalLM", config, _plain_text, {"experts_implementation": "eager"})


_DECODER, _CLASSES, _IMAGES, _CTC = "ForCausalLM", "ForSequenceClassification", "ForImageClassification", "ForCTC"
_DETR = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
_DETR |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5}

MODELS: dict[str, Tiny] = {
    "albert": _by_name("Albert", _CLASSES, _plain_text, **_TEXT, embedding_size=16),
    "ast": _by_name(
        "AST", "ForAudioClassification", lambda: {"input_values": torch.randn(2, 16, 16)}, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, patch_size=4, max_length=16, num_mel_bins=16,
        frequency_stride=4, time_stride=4,
    ),
    "bart": _by_name("Bart", "ForConditionalGeneration", _texts, **_CODER, max_position_embeddings=64),
    "beit": _by_name("Beit", _IMAGES, _images(), **_VISION, use_relative_position_bias=True),
    "bert": _by_name("Bert", _CLASSES, _text, **_TEXT),
    "bigbird": _by_name("BigBird", _CLASSES, _plain_text, **_TEXT, attention_type="original_full"),
    "bloom": _by_name("Bloom", _DECODER, _plain_text, vocab_size=100, hidden_size=32, n_layer=2, n_head=4),
    "clip": _by_name(
        "CLIP", "Model", lambda: {**_plain_text(), **_images()()},
        text_config={**_TEXT, "projection_dim": 16}, vision_config={**_VISION, "projection_dim": 16}, projection_dim=16,
    ),
    "convnext": _by_name("ConvNext", _IMAGES, _images(), hidden_sizes=[16, 32], depths=[1, 1], num_stages=2),
    "deberta-v2": _by_name(
        "DebertaV2", _CLASSES, _text, **_TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    "deepseek-v3": _experts(
        "DeepseekV3", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "deit": _by_name("DeiT", _IMAGES, _images(), **_VISION),
    "detr": _by_name(
        "Detr", "ForObjectDetection", _images(64), **_DETR, use_timm_backbone=False, backbone=None,
        backbone_config=Config("ResNetConfig", {
            **_STAGES, "embedding_size": 8, "layer_type": "basic", "out_features": ["stage4"],
        }),
    ),
    "dinov2": _by_name(
        "Dinov2", _IMAGES, _images(28), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28,
        patch_size=7,
    ),
    "distilbert": _by_name(
        "DistilBert", _CLASSES, _text, vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=64,
        max_position_embeddings=64,
    ),
    "dpt": _by_name(
        "DPT", "ForSemanticSegmentation", _images(), **{**_VISION, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16] * 4, fusion_hidden_size=16,
    ),
    "electra": _by_name("Electra", _CLASSES, _plain_text, **_TEXT, embedding_size=16),
    "falcon": _by_name(
        "Falcon", _DECODER, _plain_text, vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "fnet": _by_name(
        "FNet", _CLASSES, _plain_text, vocab_size=100, hidden_size=32, num_hidden_layers=2, intermediate_size=64,
        max_position_embeddings=64,
    ),
    "focalnet": _by_name(
        "FocalNet", _IMAGES, _images(), image_size=32, embed_dim=16, depths=[1, 1], hidden_sizes=[16, 32],
        focal_levels=[2, 2], focal_windows=[3, 3],
    ),
    "funnel": _by_name(
        "Funnel", _CLASSES, _plain_text, vocab_size=100, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=64
    ),
    "gemma": _by_name("Gemma", _DECODER, _plain_text, **_GROUPED, head_dim=8),
    "gemma3": _tiny("Gemma3ForCausalLM", "Gemma3TextConfig", _plain_text, **_GROUPED, head_dim=8),
    "gpt-j": _by_name(
        "GPTJ", _DECODER, _plain_text, vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4
    ),
    "gpt-neox": _by_name("GPTNeoX", _DECODER, _plain_text, **_TEXT),
    "gpt-oss": _experts("GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": _tiny(
        "GPT2LMHeadModel", "GPT2Config", _plain_text, vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64
    ),
    "hubert": _by_name("Hubert", _CTC, _speech, **_SPEECH),
    "jamba": _experts(
        "Jamba", num_experts=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4,
    ),
    "levit": _by_name(
        "Levit", _IMAGES, _images(64), image_size=64, hidden_sizes=[16, 32, 48], num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1], key_dim=[8, 8, 8], attention_ratio=[2, 2, 2], mlp_ratio=[2, 2, 2],
    ),
    "llama": _by_name("Llama", _DECODER, _plain_text, **_GROUPED),
    "longformer": _by_name("Longformer", _CLASSES, _plain_text, **_TEXT, attention_window=4, pad_token_id=1),
    "mamba": _by_name(
        "Mamba", _DECODER, _plain_text, vocab_size=100, hidden_size=32, state_size=4, num_hidden_layers=2
    ),
    "mamba2": _by_name(
        "Mamba2", _DECODER, _plain_text, vocab_size=100, hidden_size=32, state_size=8, num_hidden_layers=2, num_heads=4,
        head_dim=16, n_groups=1, expand=2, chunk_size=4,
    ),
    "maskformer": _by_name(
        "MaskFormer", "ForInstanceSegmentation", _images(64), fpn_feature_size=32, mask_feature_size=32,
        backbone_config=Config("SwinConfig", {
            "image_size": 64, "embed_dim": 8, "depths": [1] * 4, "num_heads": [2] * 4, "window_size": 4,
            "out_features": _ALL_STAGES,
        }),
        decoder_config=Config("DetrConfig", _DETR),
    ),
    "mistral": _by_name("Mistral", _DECODER, _plain_text, **_GROUPED),
    "mixtral": _experts("Mixtral", num_local_experts=3),
    "mobilebert": _by_name("MobileBert", _CLASSES, _plain_text, **_TEXT, embedding_size=16, intra_bottleneck_size=16),
    "mobilenet-v2": _by_name("MobileNetV2", _IMAGES, _images(64), depth_multiplier=0.5),
    "mobilevit": _by_name("MobileViT", _IMAGES, _images(64), image_size=64),
    "modernbert": _by_name(
        "ModernBert", _CLASSES, _text, **_TEXT, pad_token_id=0, global_attn_every_n_layers=2, local_attention=4
    ),
    "olmoe": _experts("Olmoe", num_experts=4, num_experts_per_tok=2),
    "opt": _by_name(
        "OPT", _DECODER, _plain_text, vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32,
    ),
    "patchtst": _by_name(
        "PatchTST", "ForPrediction", lambda: {"past_values": torch.randn(2, 32, 2)}, num_input_channels=2,
        context_length=32, prediction_length=8, patch_length=8, patch_stride=8, d_model=32, num_attention_heads=4,
        num_hidden_layers=2, ffn_dim=64,
    ),
    "perceiver": _by_name(
        "Perceiver", _CLASSES, lambda: {"inputs": _tokens()}, num_latents=8, d_latents=32, d_model=32, num_blocks=1,
        num_self_attends_per_block=2, num_self_attention_heads=4, num_cross_attention_heads=4, vocab_size=100,
        max_position_embeddings=64,
    ),
    "phi": _by_name("Phi", _DECODER, _plain_text, **_TEXT),
    "poolformer": _by_name(
        "PoolFormer", _IMAGES, _images(64), hidden_sizes=[16, 16, 32, 32], depths=[1] * 4, num_encoder_blocks=4
    ),
    "pvt": _by_name(
        "Pvt", _IMAGES, _images(64), image_size=64, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4,
        num_attention_heads=[1, 2, 3, 4], sequence_reduction_ratios=[4, 2, 1, 1],
    ),
    "qwen2": _by_name("Qwen2", _DECODER, _plain_text, **_GROUPED),
    "recurrent-gemma": _by_name(
        "RecurrentGemma", _DECODER, _plain_text, vocab_size=100, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=64, lru_width=32, attention_window_size=8, num_key_value_heads=1,
    ),
    "reformer": _by_name(
        "Reformer", _CLASSES, _plain_text, vocab_size=100, hidden_size=32, attention_head_size=8, num_attention_heads=4,
        feed_forward_size=64, axial_pos_embds=False, max_position_embeddings=64, attn_layers=["local", "local"],
        local_attn_chunk_length=4, is_decoder=False,
    ),
    "regnet": _by_name(
        "RegNet", _IMAGES, _images(), embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], groups_width=8
    ),
    "resnet": _by_name(
        "ResNet", _IMAGES, _images(), embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"
    ),
    "roberta": _by_name("Roberta", "ForMaskedLM", _text, **_TEXT, pad_token_id=1),
    "rwkv": _by_name(
        "Rwkv", _DECODER, _plain_text, vocab_size=100, hidden_size=32, num_hidden_layers=2, context_length=32
    ),
    "sam": _tiny(
        "SamVisionModel", "SamVisionConfig", _images(), hidden_size=32, output_channels=16, num_hidden_layers=2,
        num_attention_heads=4, image_size=32, patch_size=8, window_size=2, global_attn_indexes=[1], mlp_dim=64,
    ),
    "segformer": _by_name(
        "Segformer", "ForSemanticSegmentation", _images(64), hidden_sizes=[16, 32, 48, 64], depths=[1] * 4,
        decoder_hidden_size=32,
    ),
    "siglip": _tiny("SiglipVisionModel", "SiglipVisionConfig", _images(), **_VISION),
    "swin": _by_name(
        "Swin", _IMAGES, _images(), image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
        window_size=4,
    ),
    "swin-v2": _by_name(
        "Swinv2", _IMAGES, _images(), image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
        window_size=4,
    ),
    "switch-transformers": _by_name(
        "SwitchTransformers", "ForConditionalGeneration", _texts, vocab_size=100, d_model=32, d_kv=8, d_ff=64,
        num_layers=2, num_heads=4, num_experts=3,
    ),
    "t5": _by_name(
        "T5", "ForConditionalGeneration", _texts, vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    ),
    "timesformer": _by_name(
        "Timesformer", "ForVideoClassification", _video(2), **{**_VISION, "image_size": 16}, num_frames=2
    ),
    "upernet": _by_name(
        "UperNet", "ForSemanticSegmentation", _images(64),
        backbone_config=Config("ConvNextConfig", {**_STAGES, "out_features": _ALL_STAGES}),
        hidden_size=32, auxiliary_in_channels=24, auxiliary_channels=16,
    ),
    "videomae": _by_name(
        "VideoMAE", "ForVideoClassification", _video(4), **{**_VISION, "image_size": 16}, num_frames=4
    ),
    "vilt": _by_name(
        "Vilt", "ForQuestionAnswering", lambda: {**_plain_text(), **_images()()}, **_TEXT, image_size=32, patch_size=8
    ),
    "vit": _by_name("ViT", _IMAGES, _images(), **_VISION),
    "wav2vec2": _by_name("Wav2Vec2", _CTC, _speech, **_SPEECH),
    "whisper": _by_name(
        "Whisper", "ForConditionalGeneration",
        lambda: {"input_features": torch.randn(2, 20, 100), "decoder_input_ids": _tokens()}, **_CODER,
        max_source_positions=50, num_mel_bins=20, max_target_positions=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    ),
    "xlnet": _by_name("XLNet", _CLASSES, _plain_text, vocab_size=100, d_model=32, n_layer=2, n_head=4, d_inner=64),
    "yolos": _by_name(
        "Yolos", "ForObjectDetection", _images(), **{**_VISION, "image_size": [32, 32]}, num_detection_tokens=5
    ),
}  # fmt: skip

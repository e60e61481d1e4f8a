"""Tiny networks, each with one awkward construct: cut at random, proven, trained, traced again.

``PRUNABLE`` says for each how much of its parameters lies in tensors that a cut may reach while staying exact, and what
stays whole and why.
"""

from __future__ import annotations

import pytest
import torch

from examples.benchmarks.awkward import MODELS
from lightning_prune.errors import ShrinkError
from lightning_prune.graph.program import tensors_in
from lightning_prune.surgery import shrink, trace
from tests.helpers import difference, disagreeing_attributes, masked_copy, prunable_share, random_keep, randomise

TOLERANCE = {"bfloat16": 3e-2, "autocast": 3e-2}
KEPT = [0.5, pytest.param(0.9, marks=pytest.mark.slow), pytest.param(0.1, marks=pytest.mark.slow)]

OUTPUT = "the bias of the output"
NOTHING = "nothing"

PRUNABLE: dict[str, tuple[float, str]] = {
    "fused_qkv": (0.99, OUTPUT),
    "fused_qkv_stream_width": (0.22, "stream and heads: one reshape takes both widths from the stream"),
    "chunked_qkv": (0.99, OUTPUT),
    "separate_qkv": (0.99, OUTPUT),
    "einsum_attention": (0.99, OUTPUT),
    "single_head_attention": (0.99, OUTPUT),
    "linear_attention": (0.99, OUTPUT),
    "sdpa": (0.99, OUTPUT),
    "sdpa_scale": (0.99, OUTPUT),
    "sdpa_causal": (0.99, OUTPUT),
    "sdpa_head_bias": (0.99, OUTPUT),
    "gqa_repeat_interleave": (0.99, OUTPUT),
    "gqa_enabled": (0.99, OUTPUT),
    "mha": (0.99, OUTPUT),
    "mha_bias_kv": (0.99, OUTPUT),
    "mha_weights": (0.49, "stream and heads: torch wants both of one width, and the mean over heads is an output"),
    "mha_masks": (0.32, "stream and heads: torch wants both of one width"),
    "mha_cross": (0.99, OUTPUT),
    "transformer_encoder": (0.36, "stream under LayerNorm, and heads with it"),
    "transformer_encoder_norm_first": (0.34, "stream under LayerNorm, and heads with it"),
    "transformer_decoder": (0.22, "stream under LayerNorm, heads and memory with it"),
    "window_attention": (0.99, OUTPUT),
    "class_token": (0.99, OUTPUT),
    "rotary_halves": (0.99, OUTPUT),
    "rotary_complex": (0.99, OUTPUT),
    "cosine_attention": (0.99, OUTPUT),
    "query_key_norm": (0.98, "head width under LayerNorm"),
    "channel_attention": (0.96, "keys and values: softmax runs over their channels"),
    "group_norm": (1.00, OUTPUT),
    "group_norm_plain": (1.00, OUTPUT),
    "group_norm_single": (0.99, "the normalised channels: one mean over all"),
    "group_norm_each": (1.00, OUTPUT),
    "group_norm_twice": (1.00, OUTPUT),
    "instance_norm": (1.00, OUTPUT),
    "instance_norm_affine": (1.00, OUTPUT),
    "instance_norm_running": (1.00, OUTPUT),
    "layer_norm_image": (0.72, "the normalised channels: one mean over all"),
    "layer_norm_places": (0.97, "the norm's own weights, one for each place"),
    "local_response_norm": (0.99, "the normalised channels: neighbours count"),
    "batch_norm_live": (1.00, OUTPUT),
    "layer_norm": (0.60, "stream under LayerNorm"),
    "rms_norm": (0.61, "stream under RMSNorm"),
    "rms_norm_by_hand": (0.61, "stream under RMSNorm"),
    "sum_of_squares_norm": (0.98, OUTPUT),
    "layer_norm_permuted": (0.99, "the normalised channels: one mean over all"),
    "weight_standardisation_batch_norm": (0.24, "inputs of standardised weights: their statistics count them"),
    "weight_standardisation_by_hand": (0.24, "inputs of standardised weights: their statistics count them"),
    "batch_norm_1d": (0.99, OUTPUT),
    "prelu": (1.00, OUTPUT),
    "global_response_norm": (0.99, "the normalised channels: one mean over all"),
    "lstm": (0.99, OUTPUT),
    "lstm_bidirectional": (1.00, OUTPUT),
    "lstm_projected": (0.99, OUTPUT),
    "lstm_no_bias": (0.99, OUTPUT),
    "gru": (0.99, OUTPUT),
    "gru_bidirectional": (1.00, OUTPUT),
    "rnn": (0.99, OUTPUT),
    "rnn_relu": (0.99, OUTPUT),
    "lstm_given_state": (0.99, OUTPUT),
    "gru_packed": (0.99, OUTPUT),
    "lstm_cell": (0.99, OUTPUT),
    "gru_cell": (0.99, OUTPUT),
    "tied_embedding": (1.00, "words"),
    "tied_embedding_module": (0.91, "words"),
    "embedding_padding": (0.98, OUTPUT),
    "embedding_bag": (0.98, OUTPUT),
    "embedding_bag_max": (0.98, OUTPUT),
    "embeddings_combined": (0.99, OUTPUT),
    "conv_transpose_1d": (0.99, OUTPUT),
    "conv_transpose_2d": (1.00, OUTPUT),
    "conv_transpose_3d": (0.99, OUTPUT),
    "conv_transpose_grouped": (0.99, OUTPUT),
    "conv_transpose_depthwise": (0.99, OUTPUT),
    "grouped_two": (1.00, OUTPUT),
    "grouped_many": (1.00, OUTPUT),
    "grouped_sequence": (1.00, OUTPUT),
    "depthwise_separable": (0.99, OUTPUT),
    "inverted_residual": (0.99, OUTPUT),
    "pixel_shuffle": (1.00, OUTPUT),
    "pixel_unshuffle": (1.00, OUTPUT),
    "pixel_shuffle_by_hand": (1.00, OUTPUT),
    "channel_shuffle_view": (1.00, OUTPUT),
    "channel_shuffle_module": (1.00, OUTPUT),
    "channel_shuffle_grouped": (1.00, "one unit: shuffle and groups tie all together"),
    "channel_shuffle_split": (1.00, OUTPUT),
    "padded_conv": (0.99, OUTPUT),
    "squeeze_excitation": (1.00, OUTPUT),
    "efficient_channel_attention": (0.82, "a convolution runs along the channels"),
    "selective_kernel": (1.00, OUTPUT),
    "dynamic_convolution": (1.00, OUTPUT),
    "literal_view": (1.00, "channels under the literal view"),
    "literal_slice": (0.99, "the fifteen channels of the literal slice"),
    "literal_slice_tail": (0.99, OUTPUT),
    "strided_slice": (0.71, "every other channel is picked"),
    "slice_by_attribute": (0.99, OUTPUT),
    "uneven_split": (0.99, OUTPUT),
    "narrow_select": (0.74, "channels picked by literal numbers"),
    "index_buffer": (0.81, "the channels that are picked by number"),
    "index_select_buffer": (0.79, "the channels that are picked by number"),
    "flipped_channels": (0.81, "a roll by a literal number"),
    "boolean_buffer": (0.79, "the channels that are picked by a mask"),
    "mask_buffer": (0.98, OUTPUT),
    "where_expand": (0.99, OUTPUT),
    "reshape_by_size": (0.99, "outputs of the shared layer: five by a literal"),
    "flatten_linear": (1.00, OUTPUT),
    "flatten_channels_last": (1.00, OUTPUT),
    "unflatten_decoder": (1.00, OUTPUT),
    "slice_writes": (0.99, OUTPUT),
    "in_place_residual": (1.00, OUTPUT),
    "einsum_forms": (0.77, "tokens"),
    "mixer": (0.98, "tokens"),
    "dataclass_output": (0.64, "hidden features are an output"),
    "dictionary_output": (0.54, "a mean over channels is an output"),
    "unfold_fold": (0.99, OUTPUT),
    "unfold_matmul": (1.00, OUTPUT),
    "patch_merging": (0.99, OUTPUT),
    "folded_batch": (0.99, OUTPUT),
    "repeated_channels": (0.99, "one unit: both repeats tie all together"),
    "weight_norm": (1.00, OUTPUT),
    "weight_norm_inputs": (1.00, OUTPUT),
    "spectral_norm": (1.00, OUTPUT),
    "orthogonal": (0.96, "the orthogonal weight"),
    "own_parametrization": (1.00, OUTPUT),
    "symmetric_parametrization": (0.98, OUTPUT),
    "raw_parameters": (0.98, OUTPUT),
    "parameter_list": (0.98, OUTPUT),
    "parameter_dict": (1.00, NOTHING),
    "unregistered_list": (0.85, "what the unknown layer reads"),
    "unregistered_dictionary": (0.85, "what the unknown layer reads"),
    "shared_module": (1.00, OUTPUT),
    "shared_convolution": (1.00, OUTPUT),
    "siamese": (1.00, OUTPUT),
    "tied_autoencoder": (1.00, NOTHING),
    "parameter_two_ways": (0.77, "the first layer's inputs come back as features"),
    "low_rank": (0.98, OUTPUT),
    "low_rank_adapter": (0.98, OUTPUT),
    "complex_weights": (0.99, OUTPUT),
    "fourier_filter": (1.00, OUTPUT),
    "fourier_mixer": (0.78, "channels under the Fourier transform"),
    "bfloat16": (1.00, OUTPUT),
    "mixed_precision": (0.98, OUTPUT),
    "autocast": (0.98, OUTPUT),
    "channels_last": (1.00, OUTPUT),
    "layer_scale": (1.00, OUTPUT),
    "glu": (0.99, OUTPUT),
    "swiglu": (0.99, OUTPUT),
    "maxout": (0.99, OUTPUT),
    "maxout_thirds": (0.99, OUTPUT),
    "softmax_channels": (0.81, "channels under softmax"),
    "cumsum_channels": (0.81, "channels under a running sum"),
    "mean_channels": (0.81, "channels under a mean"),
    "sum_channels": (0.98, OUTPUT),
    "spatial_gate": (0.80, "channels under a largest value and a mean"),
    "sorted_channels": (0.81, "ranked channels"),
    "topk_channels": (0.77, "ranked channels"),
    "normalised_channels": (0.98, OUTPUT),
    "cosine_similarity": (1.00, NOTHING),
    "prototype_distances": (1.00, NOTHING),
    "bilinear": (0.99, OUTPUT),
    "outer_product": (0.87, "one of two factors of a flattened dimension"),
    "gram_matrix": (0.75, "channels that make both dimensions of a flattened one"),
    "highway": (0.99, OUTPUT),
    "dense_connections": (1.00, OUTPUT),
    "padded_shortcut": (1.00, OUTPUT),
    "input_joined": (0.99, OUTPUT),
    "input_added": (0.96, "what meets the network's input"),
    "film": (1.00, OUTPUT),
    "experts_soft": (0.99, "the number of experts"),
    "experts_topk": (0.99, "the number of experts"),
    "experts_stacked": (0.99, "the number of experts"),
    "state_space": (0.98, OUTPUT),
    "data_dependent_branch": (0.99, OUTPUT),
    "data_dependent_loop": (0.98, OUTPUT),
    "feature_dependent_branch": (0.98, OUTPUT),
    "data_dependent_rows": (0.99, OUTPUT),
    "auxiliary_head": (1.00, "outputs"),
    "stochastic_depth": (1.00, OUTPUT),
    "layer_drop": (0.99, OUTPUT),
    "second_method": (0.83, "the layer that forward never reaches"),
    "dropouts": (0.99, OUTPUT),
    "training_noise": (0.98, OUTPUT),
    "compiled": (0.99, OUTPUT),
    "compiled_aot": (0.99, OUTPUT),
    "scripted_function": (0.98, OUTPUT),
    "checkpointed": (0.99, OUTPUT),
    "checkpointed_reentrant": (0.99, OUTPUT),
    "custom_function": (0.98, OUTPUT),
    "lambda_modules": (0.98, OUTPUT),
    "hooked": (0.98, OUTPUT),
    "vmapped": (0.97, "the layer under vmap, whose tensors lose a dimension in place"),
    "functional_call": (0.99, OUTPUT),
    "moving_average": (0.98, OUTPUT),
    "asserted_width": (0.97, OUTPUT),
    "detection_head": (1.00, "scores and boxes"),
    "anchor_head": (1.00, "outputs"),
    "feature_pyramid": (1.00, OUTPUT),
    "deformable": (0.99, "offsets and masks"),
    "deformable_module": (0.99, "offsets"),
    "region_features": (0.99, OUTPUT),
    "spatial_transformer": (0.99, "the pose"),
    "interpolation": (1.00, OUTPUT),
    "pooling": (1.00, OUTPUT),
    "max_unpool": (0.99, OUTPUT),
    "unet": (1.00, OUTPUT),
    "unet_cropped": (1.00, OUTPUT),
    "correlation": (0.99, OUTPUT),
    "correlation_scaled": (0.74, "channels whose number is computed with"),
    "convex_upsampling": (0.98, "flow and mask"),
}

SINGLE = {
    ("lstm_projected", 0.1): "got an incorrect number of RNN parameters",
    ("data_dependent_rows", 0.1): "__setitem__ cannot follow a change of width",
}
"""Cuts down to a single channel with which torch takes another way: refused in the shrink, and nothing is changed."""


def traced(name):
    """A network that is not cut yet, its inputs and its graph."""
    model = randomise(MODELS[name].build())
    inputs = MODELS[name].inputs()
    return model, inputs, trace(model, inputs)


WHOLE = {}
"""Networks that one test has traced and the next may cut."""


def outputs(model, inputs):
    """Like ``run``, for outputs that are dataclasses too."""
    model.eval()
    with torch.no_grad():
        found = list(tensors_in(model(*inputs)))
    return [value for value in found if value.is_floating_point() or value.is_complex()]


def train_step(model, inputs):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loss = sum(value.abs().float().square().mean() for value in tensors_in(model(*inputs)) if value.requires_grad)
    loss.backward()
    optimizer.step()


def storage(model):
    """How each parameter is stored: its type, and whether four-dimensional ones have their channels last."""
    return {
        name: (tensor.dtype, tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
        for name, tensor in model.named_parameters()
        if tensor.dim() != 4 or (tensor.shape[1] > 1 and max(tensor.shape[2:]) > 1)
    }


def test_the_table_names_every_network() -> None:
    assert PRUNABLE.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_prunable(name) -> None:
    model, _, graph = WHOLE[name] = traced(name)
    share = prunable_share(model, graph)
    expected, whole = PRUNABLE[name]
    assert abs(share - expected) <= 0.02, f"{share:.3f} prunable; {whole} should stay whole; refused: {graph.refused}"
    assert graph.groups or graph.refused


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", MODELS)
def test_a_random_cut_is_exact(name, kept) -> None:
    model, inputs, graph = WHOLE.pop(name, None) or traced(name)
    keep = random_keep(graph, kept)
    dense = outputs(model, inputs)
    masked = outputs(masked_copy(model, graph, keep), inputs)
    stored = storage(model)
    if kept == 0.5 and max(graph.widths.values(), default=1) > 1:
        assert difference(dense, masked) > 1e-3

    if (name, kept) in SINGLE:
        with pytest.raises(ShrinkError, match=SINGLE[name, kept]):
            shrink(model, graph, keep)
        assert difference(dense, outputs(model, inputs)) == 0
        return
    result = shrink(model, graph, keep)
    tolerance = TOLERANCE.get(name, 1e-4)
    assert difference(masked, outputs(model, inputs)) <= tolerance
    assert (result.error or 0.0) <= tolerance
    assert disagreeing_attributes(model) == []
    left = storage(model)
    assert left == {name: stored[name] for name in left}

    train_step(model, inputs)
    found = trace(model, inputs).widths
    expected = {name: len(units) for name, units in keep.items() if len(units) > 1}
    assert {name: found.get(name) for name in expected} == expected
    # A group of one unit cannot be cut any more, and what it tied together may come free.
    if len(expected) == len(keep):
        assert found.keys() == expected.keys()

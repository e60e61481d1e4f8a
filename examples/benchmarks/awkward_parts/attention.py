"""Attention written in the ways people write it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from examples.benchmarks.awkward_parts.base import Collection, Net, parameter, sequence

ATTENTION = Collection()
HEADS, WIDTH = 4, 5
INNER = HEADS * WIDTH


def transformer(attend, **parts):
    """One residual block of attention and one of a small MLP over seven tokens of ten features."""

    def forward(net, x, *rest):
        x = net.embed(x)
        x = x + attend(net, x, *rest)
        x = x + net.down(F.gelu(net.up(x)))
        return net.head(x.mean(1))

    ends = {"embed": nn.Linear(6, 10), "up": nn.Linear(10, 14), "down": nn.Linear(14, 10), "head": nn.Linear(10, 9)}
    return Net(forward, **ends, **parts)


def separate():
    return {
        "q": nn.Linear(10, INNER),
        "k": nn.Linear(10, INNER),
        "v": nn.Linear(10, INNER),
        "proj": nn.Linear(INNER, 10),
        "heads": HEADS,
        "width": WIDTH,
    }


def fused(**more):
    return {"qkv": nn.Linear(10, 3 * INNER), "proj": nn.Linear(INNER, 10), "heads": HEADS, "width": WIDTH, **more}


def split_heads(net, x, layer):
    return layer(x).view(*x.shape[:2], -1, net.width).transpose(1, 2)


def softmax_attention(q, k, v, scale):
    return (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v


@ATTENTION.add("qkv in one linear layer, reshaped to [B, N, 3, H, D]", sequence)
def fused_qkv():
    def attend(net, x):
        b, n, _ = x.shape
        q, k, v = net.qkv(x).reshape(b, n, 3, net.heads, net.width).permute(2, 0, 3, 1, 4).unbind(0)
        return net.proj(softmax_attention(q, k, v, net.width**-0.5).transpose(1, 2).flatten(2))

    return transformer(attend, **fused())


@ATTENTION.add("the same, but the last reshape takes its width from the residual stream", sequence)
def fused_qkv_stream_width():
    def forward(net, x):
        x = net.embed(x)
        b, n, c = x.shape
        q, k, v = net.qkv(x).reshape(b, n, 3, net.heads, c // net.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + net.proj(softmax_attention(q, k, v, (c // net.heads) ** -0.5).transpose(1, 2).reshape(b, n, c))
        return net.head((x + net.down(F.gelu(net.up(x)))).mean(1))

    parts = {"embed": nn.Linear(6, 20), "qkv": nn.Linear(20, 60), "proj": nn.Linear(20, 20)}
    parts |= {"up": nn.Linear(20, 14), "down": nn.Linear(14, 20), "head": nn.Linear(20, 9)}
    return Net(forward, heads=HEADS, **parts)


@ATTENTION.add("qkv in one linear layer, cut in three by chunk", sequence)
def chunked_qkv():
    def attend(net, x):
        q, k, v = (t.unflatten(-1, (-1, net.width)).transpose(1, 2) for t in net.qkv(x).chunk(3, dim=-1))
        return net.proj(softmax_attention(q, k, v, net.width**-0.5).transpose(1, 2).flatten(2))

    return transformer(attend, **fused())


@ATTENTION.add("separate query, key and value layers", sequence)
def separate_qkv():
    def attend(net, x):
        q, k, v = (split_heads(net, x, layer) for layer in (net.q, net.k, net.v))
        return net.proj(softmax_attention(q, k, v, net.width**-0.5).transpose(1, 2).flatten(2))

    return transformer(attend, **separate())


@ATTENTION.add("heads as einsum", sequence)
def einsum_attention():
    def attend(net, x):
        q, k, v = (layer(x).unflatten(-1, (-1, net.width)) for layer in (net.q, net.k, net.v))
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(net.width)).softmax(-1)
        return net.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))

    return transformer(attend, **separate())


@ATTENTION.add("attention of one head, width free", sequence)
def single_head_attention():
    def attend(net, x):
        return net.proj(softmax_attention(net.q(x), net.k(x), net.v(x), 0.3))

    return transformer(attend, **separate())


@ATTENTION.add("linear attention: the head width, not the tokens, is contracted first", sequence)
def linear_attention():
    def attend(net, x):
        q, k, v = (split_heads(net, x, layer) for layer in (net.q, net.k, net.v))
        return net.proj((q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)).transpose(1, 2).flatten(2))

    return transformer(attend, **separate())


@ATTENTION.add("scaled_dot_product_attention, heads joined by view(..., -1)", sequence)
def sdpa():
    def attend(net, x):
        q, k, v = (split_heads(net, x, layer) for layer in (net.q, net.k, net.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return net.proj(y.transpose(1, 2).contiguous().view(*x.shape[:2], -1))

    return transformer(attend, **separate())


@ATTENTION.add("scaled_dot_product_attention with a scale of its own", sequence)
def sdpa_scale():
    def attend(net, x):
        q, k, v = (split_heads(net, x, layer) for layer in (net.q, net.k, net.v))
        return net.proj(F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2).flatten(2))

    return transformer(attend, **separate())


@ATTENTION.add("causal scaled_dot_product_attention", sequence)
def sdpa_causal():
    def attend(net, x):
        q, k, v = (split_heads(net, x, layer) for layer in (net.q, net.k, net.v))
        return net.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    return transformer(attend, **separate())


@ATTENTION.add("scaled_dot_product_attention with a learned bias for each head", sequence)
def sdpa_head_bias():
    def attend(net, x):
        q, k, v = (split_heads(net, x, layer) for layer in (net.q, net.k, net.v))
        return net.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=net.bias).transpose(1, 2).flatten(2))

    return transformer(attend, bias=parameter(HEADS, 7, 7), **separate())


def grouped_query():
    return separate() | {"k": nn.Linear(10, 2 * WIDTH), "v": nn.Linear(10, 2 * WIDTH)}


@ATTENTION.add("grouped queries: two key heads for four query heads by repeat_interleave", sequence)
def gqa_repeat_interleave():
    def attend(net, x):
        q, k, v = (split_heads(net, x, layer) for layer in (net.q, net.k, net.v))
        k, v = (t.repeat_interleave(net.repeats, dim=1) for t in (k, v))
        return net.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return transformer(attend, repeats=2, **grouped_query())


@ATTENTION.add("grouped queries by enable_gqa", sequence)
def gqa_enabled():
    def attend(net, x):
        q, k, v = (split_heads(net, x, layer) for layer in (net.q, net.k, net.v))
        return net.proj(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    return transformer(attend, **grouped_query())


def multihead(**options):
    def attend(net, x):
        return net.attention(x, x, x, need_weights=False)[0]

    return transformer(attend, attention=nn.MultiheadAttention(10, 5, batch_first=True, **options))


@ATTENTION.add("nn.MultiheadAttention", sequence)
def mha():
    return multihead()


@ATTENTION.add("nn.MultiheadAttention with extra key and value rows", sequence)
def mha_bias_kv():
    return multihead(add_bias_kv=True, add_zero_attn=True)


@ATTENTION.add("nn.MultiheadAttention whose weights are an output too", sequence)
def mha_weights():
    def forward(net, x):
        y, weights = net.attention(*[net.embed(x)] * 3)
        return net.head(F.relu(net.hidden(y)).mean(1)), weights

    parts = {"embed": nn.Linear(6, 10), "hidden": nn.Linear(10, 14), "head": nn.Linear(14, 9)}
    return Net(forward, attention=nn.MultiheadAttention(10, 5, batch_first=True), **parts)


@ATTENTION.add("nn.MultiheadAttention, tokens first, with a mask and padding", sequence)
def mha_masks():
    def attend(net, x):
        y = x.transpose(0, 1)
        mask = torch.ones(len(y), len(y), dtype=torch.bool).triu(1)
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[1, -2:] = True
        y, weights = net.attention(y, y, y, key_padding_mask=padding, attn_mask=mask)
        return y.transpose(0, 1) * weights.mean()

    return transformer(attend, attention=nn.MultiheadAttention(10, 5))


@ATTENTION.add("nn.MultiheadAttention over another sequence of other widths", sequence)
def mha_cross():
    def attend(net, x):
        memory = net.memory(x[:, :4].detach())
        return net.attention(x, memory, net.value(memory), need_weights=False)[0]

    attention = nn.MultiheadAttention(10, 5, batch_first=True, kdim=12, vdim=13)
    return transformer(attend, attention=attention, memory=nn.Linear(10, 12), value=nn.Linear(12, 13))


@ATTENTION.add("nn.TransformerEncoder of two layers", sequence)
def transformer_encoder():
    layer = nn.TransformerEncoderLayer(12, 4, 18, batch_first=True)

    def forward(net, x):
        return net.head(net.encoder(net.embed(x)).mean(1))

    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Net(forward, embed=nn.Linear(6, 12), encoder=encoder, head=nn.Linear(12, 9))


@ATTENTION.add("nn.TransformerEncoderLayer with its norms first", sequence)
def transformer_encoder_norm_first():
    layer = nn.TransformerEncoderLayer(12, 4, 18, norm_first=True, activation="gelu")

    def forward(net, x):
        return net.head(net.layer(net.embed(x).transpose(0, 1)).mean(0))

    return Net(forward, embed=nn.Linear(6, 12), layer=layer, head=nn.Linear(12, 9))


@ATTENTION.add("nn.TransformerDecoderLayer with a causal mask and memory", sequence)
def transformer_decoder():
    def forward(net, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return net.head(net.layer(net.embed(x), net.memory(x[:, :4]), tgt_mask=mask))

    layer = nn.TransformerDecoderLayer(12, 4, 18, batch_first=True)
    return Net(forward, embed=nn.Linear(6, 12), memory=nn.Linear(6, 12), layer=layer, head=nn.Linear(12, 9))

"""Attention with positions: windows, relative tables, rotary embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from examples.benchmarks.awkward_parts.attention import (
    HEADS,
    INNER,
    WIDTH,
    separate,
    softmax_attention,
    split_heads,
    transformer,
)
from examples.benchmarks.awkward_parts.base import Collection, Net, conv, image, parameter, sequence

POSITIONS = Collection()


def relative_index(height, width):
    """For each pair of places of a window, the row of the relative-position table."""
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).flatten(1)
    offsets = places[:, :, None] - places[:, None, :]
    return (offsets[0] + height - 1) * (2 * width - 1) + offsets[1] + width - 1


class WindowAttention(nn.Module):
    def __init__(self, stream, window, shift):
        super().__init__()
        self.window, self.shift, self.heads, self.width = window, shift, HEADS, WIDTH
        self.qkv, self.proj = nn.Linear(stream, 3 * INNER), nn.Linear(INNER, stream)
        rows, columns = window
        self.table = parameter((2 * rows - 1) * (2 * columns - 1), HEADS)
        self.register_buffer("index", relative_index(rows, columns))

    def mask(self, height, width):
        rows, columns = self.window
        regions = torch.zeros(height, width)
        regions[-self.shift[0] :] += 1
        regions[:, -self.shift[1] :] += 2
        regions = regions.view(height // rows, rows, width // columns, columns).transpose(1, 2).flatten(0, 1).flatten(1)
        return (regions[:, None, :] != regions[:, :, None]).float() * -100

    def forward(self, x):
        b, h, w, c = x.shape
        rows, columns = self.window
        x = torch.roll(x, (-self.shift[0], -self.shift[1]), (1, 2))
        x = x.view(b, h // rows, rows, w // columns, columns, c).transpose(2, 3).reshape(-1, rows * columns, c)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * self.width**-0.5
        scores = scores + self.table[self.index].permute(2, 0, 1)
        mask = self.mask(h, w)
        scores = scores.unflatten(0, (b, len(mask))) + mask[:, None]
        y = self.proj((scores.flatten(0, 1).softmax(-1) @ v).transpose(1, 2).flatten(2))
        y = y.view(b, h // rows, w // columns, rows, columns, c).transpose(2, 3).reshape(b, h, w, c)
        return torch.roll(y, self.shift, (1, 2))


@POSITIONS.add("shifted windows with a relative-position table", image)
def window_attention():
    def forward(net, x):
        x = net.embed(x).permute(0, 2, 3, 1)
        x = x + net.attention(x)
        return net.head(F.gelu(net.hidden(x)).mean((1, 2)))

    attention = WindowAttention(10, (4, 3), (2, 1))
    return Net(forward, embed=conv(3, 10), attention=attention, hidden=nn.Linear(10, 14), head=nn.Linear(14, 9))


@POSITIONS.add("learned absolute positions and a class token", sequence)
def class_token():
    def forward(net, x):
        x = net.embed(x)
        x = torch.cat([net.token.expand(len(x), -1, -1), x], dim=1) + net.positions
        q, k, v = (split_heads(net, x, layer) for layer in (net.q, net.k, net.v))
        x = x + net.proj(softmax_attention(q, k, v, net.width**-0.5).transpose(1, 2).flatten(2))
        return net.head(F.gelu(net.hidden(x[:, 0])))

    parts = separate() | {"token": parameter(1, 1, 10), "positions": parameter(1, 8, 10)}
    return Net(forward, embed=nn.Linear(6, 10), hidden=nn.Linear(10, 14), head=nn.Linear(14, 9), **parts)


def angles(width):
    return torch.outer(torch.arange(7.0), 1.0 / 10 ** torch.linspace(0, 1, width // 2))


@POSITIONS.add("rotary positions by halves, cosine and sine", sequence)
def rotary_halves():
    def rotated(net, x):
        first, second = x.chunk(2, dim=-1)
        return x * net.cosine + torch.cat([-second, first], dim=-1) * net.sine

    def attend(net, x):
        q, k, v = (layer(x).unflatten(-1, (-1, net.width)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        y = softmax_attention(rotated(net, q), rotated(net, k), v, net.width**-0.5)
        return net.proj(y.transpose(1, 2).flatten(2))

    both = torch.cat([angles(6), angles(6)], dim=-1)
    return transformer(attend, cosine=both.cos(), sine=both.sin(), **even_heads())


def even_heads():
    layers = {name: nn.Linear(10, 24) for name in "qkv"}
    return layers | {"proj": nn.Linear(24, 10), "heads": 4, "width": 6}


@POSITIONS.add("rotary positions by complex numbers", sequence)
def rotary_complex():
    def rotated(net, x):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * net.turns).flatten(-2)

    def attend(net, x):
        q, k, v = (layer(x).unflatten(-1, (-1, net.width)).transpose(1, 2) for layer in (net.q, net.k, net.v))
        y = softmax_attention(rotated(net, q), rotated(net, k), v, net.width**-0.5)
        return net.proj(y.transpose(1, 2).flatten(2))

    return transformer(attend, turns=torch.polar(torch.ones(7, 3), angles(6)), **even_heads())


@POSITIONS.add("queries and keys normalised to length one for each head", sequence)
def cosine_attention():
    def attend(net, x):
        q, k, v = (split_heads(net, x, layer) for layer in (net.q, net.k, net.v))
        y = softmax_attention(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, net.temperature)
        return net.proj(y.transpose(1, 2).flatten(2))

    return transformer(attend, temperature=parameter(HEADS, 1, 1), **separate())


@POSITIONS.add("queries and keys under a LayerNorm of the head width", sequence)
def query_key_norm():
    def attend(net, x):
        q, k, v = (split_heads(net, x, layer) for layer in (net.q, net.k, net.v))
        y = softmax_attention(net.q_norm(q), net.k_norm(k), v, net.width**-0.5)
        return net.proj(y.transpose(1, 2).flatten(2))

    return transformer(attend, q_norm=nn.LayerNorm(WIDTH), k_norm=nn.LayerNorm(WIDTH), **separate())


@POSITIONS.add("attention over channels instead of tokens", image)
def channel_attention():
    def forward(net, x):
        x = F.relu(net.stem(x))
        q, k, v = (layer(x).flatten(2) for layer in (net.q, net.k, net.v))
        y = softmax_attention(q, k, v, q.shape[-1] ** -0.5).view(len(x), -1, *x.shape[2:])
        return net.head(net.proj(y).mean((2, 3)))

    layers = {"q": conv(10, 12, 1), "k": conv(10, 14, 1), "v": conv(10, 14, 1), "proj": conv(12, 11, 1)}
    return Net(forward, stem=conv(3, 10), head=nn.Linear(11, 9), **layers)

"""More building blocks of random networks: those that do something unusual with their channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from tests.fuzz.blocks import (
    BODY,
    CHOICES,
    FLAGS,
    IMAGE,
    SEQUENCE,
    WIDTHS,
    along,
    axis,
    block,
    channels,
    divisors,
    layer,
    one_of,
    pick,
    projected,
)
from tests.helpers import Net

FOLDED = {
    "swap": lambda n, y, d: y.transpose(d, d + 1),
    "softmax outer": lambda n, y, d: y.softmax(d),
    "softmax inner": lambda n, y, d: y.softmax(d + 1),
    "mean outer": lambda n, y, d: y.mean(d, keepdim=True),
    "mean inner": lambda n, y, d: y.mean(d + 1, keepdim=True),
    "sum outer": lambda n, y, d: y.sum(d, keepdim=True),
    "max inner": lambda n, y, d: y.amax(d + 1, keepdim=True),
    "centre inner": lambda n, y, d: y - y.mean(d + 1, keepdim=True),
    "normalise inner": lambda n, y, d: F.normalize(y, dim=d + 1, eps=1e-3),
    "cumsum outer": lambda n, y, d: y.cumsum(d),
    "flip outer": lambda n, y, d: y.flip(d),
    "roll inner": lambda n, y, d: y.roll(1, d + 1),
    "first outer": lambda n, y, d: y.narrow(d, 0, 1),
    "unbind inner": lambda n, y, d: torch.stack(y.unbind(d + 1)[::-1], d + 1),
    "scale outer": lambda n, y, d: y * n.outer.reshape(-1, *[1] * (y.dim() - d - 1)),
    "scale inner": lambda n, y, d: y * n.inner.reshape(-1, *[1] * (y.dim() - d - 2)),
    "mix inner": lambda n, y, d: torch.einsum("bgc...,gck->bgk...", y.movedim((d, d + 1), (1, 2)), n.mix).movedim(
        (1, 2), (d, d + 1)
    ),
}


@block(CHOICES, one_of("literal", "attributes", "outer", "inner", "computed"), one_of(*FOLDED), FLAGS)
def folded(shape, choice, sizes, operation, flat):
    """Channels seen as (outer, inner), something done with that, and merged back."""
    width, dim = channels(shape), axis(shape)
    outer = pick(divisors(width), choice)
    inner = width // outer

    def forward(n, x):
        size = {
            "literal": (outer, inner),
            "attributes": (n.outer_size, n.inner_size),
            "outer": (n.outer_size, -1),
            "inner": (-1, n.inner_size),
            "computed": (n.outer_size, x.shape[dim] // n.outer_size),
        }[sizes]
        y = FOLDED[operation](n, x.reshape(*x.shape[:dim], *size, *x.shape[dim + 1 :]), dim)
        return y.flatten(dim, dim + 1) if flat else y.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])

    parts = {"outer": torch.randn(outer), "inner": torch.randn(inner), "mix": torch.randn(outer, inner, 3)}
    parts = {name: nn.Parameter(value) for name, value in parts.items() if name in operation}
    return Net(forward, **parts, outer_size=outer, inner_size=inner)


@block(CHOICES, kinds=(IMAGE,))
def channel_shuffle(shape, choice):
    return nn.ChannelShuffle(pick(divisors(channels(shape)), choice))


@block(one_of("first", "last", "half", "attribute", "even", "swap halves"), CHOICES)
def sliced(shape, how, choice):
    dim, width = axis(shape), channels(shape)
    size = 1 + choice % width

    def forward(n, x):
        y = x.movedim(dim, 0)
        half = len(y) // 2
        return {
            "first": lambda: y[:size],
            "last": lambda: y[-size:],
            "half": lambda: y[: max(half, 1)],
            "attribute": lambda: y[: n.size],
            "even": lambda: y[::2],
            "swap halves": lambda: torch.cat([y[half:], y[:half]]),
        }[how]().movedim(0, dim)

    return Net(forward, size=size)


@block(one_of("flip", "roll", "index", "index_select", "repeat", "interleave", "pad", "zeros", "shuffle back"), CHOICES)
def rearranged(shape, how, choice):
    dim, width = axis(shape), channels(shape)
    index = torch.randperm(width)

    def forward(n, x):
        y = x.movedim(dim, -1)
        y = {
            "flip": lambda: y.flip(-1),
            "roll": lambda: y.roll(choice, -1),
            "index": lambda: y[..., n.index],
            "index_select": lambda: y.index_select(-1, n.index),
            "repeat": lambda: y.repeat(*[1] * (y.dim() - 1), 2),
            "interleave": lambda: y.repeat_interleave(2, -1),
            "pad": lambda: F.pad(y, (choice % 3, choice % 2)),
            "zeros": lambda: torch.cat([y, torch.zeros_like(y)], -1),
            "shuffle back": lambda: y[..., n.index][..., n.index.argsort()],
        }[how]()
        return y.movedim(-1, dim)

    return Net(forward, index=index)


@block(WIDTHS, CHOICES, FLAGS, FLAGS, one_of("rest", "attributes", "computed"), kinds=(SEQUENCE,))
def attention(shape, width, choice, fused, sdpa, merge):
    heads = pick(divisors(width), choice)
    size = width // heads

    def forward(n, x):
        b, t, _ = x.shape
        if fused:
            q, k, v = n.qkv(x).reshape(b, t, 3, n.heads, -1).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (part(x).view(b, t, n.heads, n.size).transpose(1, 2) for part in (n.q, n.k, n.v))
        y = F.scaled_dot_product_attention(q, k, v) if sdpa else ((q * n.scale) @ k.mT).softmax(-1) @ v
        y = y.transpose(1, 2)
        merged = {"rest": -1, "attributes": n.heads * n.size, "computed": y.shape[2] * y.shape[3]}[merge]
        return n.out(y.reshape(b, t, merged))

    own = {"qkv": layer(shape, 3 * width)} if fused else {name: layer(shape, width) for name in "qkv"}
    return Net(forward, **own, out=nn.Linear(width, channels(shape)), heads=heads, size=size, scale=size**-0.5)


@block(CHOICES, kinds=(SEQUENCE,))
def multihead(shape, choice):
    heads = pick(divisors(channels(shape)), choice)
    made = nn.MultiheadAttention(channels(shape), heads, batch_first=True)
    return Net(lambda n, x: n.attention(x, x, x)[0], attention=made)


@block(kinds=(SEQUENCE,))
def cross_covariance(shape):
    return Net(lambda n, x: x @ (F.normalize(x, dim=1).mT @ F.normalize(x, dim=1)).softmax(-1))


@block(one_of("lstm", "gru"), WIDTHS, FLAGS, one_of(1, 2), kinds=(SEQUENCE,))
def recurrent(shape, kind, width, bidirectional, layers):
    made = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](
        channels(shape), width, layers, batch_first=True, bidirectional=bidirectional
    )
    return Net(lambda n, x: n.cells(x)[0], cells=made)


@block(WIDTHS, one_of("weight norm", "spectral norm"), st.sampled_from((0, 1)))
def reparametrised(shape, width, how, dim):
    made = layer(shape, width)
    return parametrizations.weight_norm(made, dim=dim) if how == "weight norm" else parametrizations.spectral_norm(made)


@block(BODY, WIDTHS, one_of("twice", "tied", "sum"))
def shared(shape, body, width, how):
    """One layer used at several places."""
    module = projected(body, shape, channels(shape))
    if how != "tied":
        return Net(
            lambda n, x: n.same(n.body(n.same(x))) if how == "twice" else n.same(x) + n.same(n.body(x)),
            same=layer(shape, channels(shape)),
            body=module,
        )
    dim = axis(shape)

    def forward(n, x):
        hidden = F.relu(F.linear(n.body(x).movedim(dim, -1), n.weight))
        return F.linear(hidden, n.weight.t(), n.bias).movedim(-1, dim)

    weight, bias = torch.randn(width, channels(shape)) / channels(shape) ** 0.5, torch.randn(channels(shape))
    return Net(forward, body=module, weight=nn.Parameter(weight), bias=nn.Parameter(bias))


OVER_CHANNELS = {
    "softmax": lambda x, d: x.softmax(d),
    "mean": lambda x, d: x - x.mean(d, keepdim=True),
    "max": lambda x, d: x - x.amax(d, keepdim=True),
    "sum": lambda x, d: x * x.sum(d, keepdim=True),
    "only sum": lambda x, d: x.sum(d, keepdim=True),
    "std": lambda x, d: x / (x.var(d, keepdim=True, unbiased=False) + 1).sqrt(),
    "cumsum": lambda x, d: x.cumsum(d),
    "normalize": lambda x, d: F.normalize(x, dim=d, eps=1e-3),
    "logsumexp": lambda x, d: x.logsumexp(d, keepdim=True),
    "sort": lambda x, d: x.sort(d).values,
    "scaled by size": lambda x, d: x * x.shape[d] ** -0.5,
    "constant of size": lambda x, d: x / torch.tensor(float(x.shape[d])).sqrt(),
    "ramp of size": lambda x, d: x + torch.arange(x.shape[d]).to(x).reshape(-1, *[1] * (x.dim() - d - 1)),
    "ones of size": lambda x, d: x + torch.full((x.shape[d],), 0.5).to(x).reshape(-1, *[1] * (x.dim() - d - 1)),
    "difference": lambda x, d: x - x.roll(1, d),
}


@block(one_of(*OVER_CHANNELS))
def over_channels(shape, how):
    dim = axis(shape)
    return Net(lambda n, x: OVER_CHANNELS[how](x, dim))


@block(WIDTHS, FLAGS)
def einsum(shape, width, transposed):
    equation = {1: "bc,{}->bo", 2: "bnc,{}->bno", 3: "bchw,{}->bohw"}[len(shape)].format("co" if transposed else "oc")
    size = (channels(shape), width) if transposed else (width, channels(shape))
    return Net(lambda n, x: torch.einsum(equation, x, n.weight), weight=nn.Parameter(torch.randn(size)))


@block(one_of("scale some", "overwrite some", "zero some", "add buffer", "masked", "copy"), CHOICES)
def in_place(shape, how, choice):
    dim = axis(shape)
    size = 1 + choice % channels(shape)

    def forward(n, x):
        x = x.clone()
        y = x.movedim(dim, -1)
        if how == "scale some":
            y[..., :size] *= 2
        elif how == "overwrite some":
            y[..., :size] = torch.sigmoid(y[..., -size:])
        elif how == "zero some":
            y[..., : n.size].zero_()
        elif how == "add buffer":
            y.add_(n.buffer)
        elif how == "masked":
            y.masked_fill_(y < 0, 0.5)
        else:
            new = torch.empty_like(y)
            new[..., :size], new[..., size:] = y[..., :size], torch.cos(y[..., size:])
            x = new.movedim(-1, dim)
        return x

    return Net(forward, size=size, buffer=torch.randn(channels(shape)))


@block(one_of("add buffer", "multiply buffer", "add parameter", "multiply parameter", "position", "expand"))
def constant(shape, how):
    value = along(shape, torch.randn(channels(shape)))
    value = torch.randn(shape) if how == "position" else value
    value = nn.Parameter(value) if "parameter" in how or how in ("position", "expand") else value

    def forward(n, x):
        if how == "expand":
            return torch.cat([x, n.value.expand_as(x)], axis(shape))
        return x * n.value if "multiply" in how else x + n.value

    return Net(forward, value=value)


@block(FLAGS)
def dropout(shape, whole):
    return nn.Dropout2d(0.3) if whole and len(shape) == IMAGE else nn.Dropout(0.3)


@block(BODY, BODY, WIDTHS)
def conditional(shape, first, second, width):
    parts = {name: projected(body, shape, width) for name, body in (("a", first), ("b", second))}
    return Net(lambda n, x: n.a(x) if x.mean() > 0 else n.b(x), **parts)

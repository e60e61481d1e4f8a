"""The building blocks of random networks: each takes the shape of one sample and returns a module that accepts it.

Every block accepts every value of its arguments and every shape of its kinds, so that any description can be built:
a number that does not fit (a divisor, say) is used as an index into those that do. A block is described by its name
and arguments alone. Where the same thing can be written in several ways (sizes as literals, attributes or computed from
the input) the way is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from tests.helpers import Net

IMAGE, SEQUENCE, VECTOR = KINDS = (3, 2, 1)
"""Kinds of samples, by their number of dimensions: [C, H, W], [N, C] and [C]."""

BODY = "body"
"""Stands for an argument that is itself a tuple of blocks, all of which keep the kind and the positions."""

WIDTHS = st.one_of(st.sampled_from((4, 6, 8)), st.integers(1, 12))
CHOICES = st.integers(0, 5)
FLAGS = st.booleans()


class Block(NamedTuple):
    """How to build a block, which kinds of samples it accepts, its arguments and what becomes of the samples."""

    build: Callable
    kinds: tuple[int, ...]
    arguments: tuple
    keeps: bool
    becomes: int | None


BLOCKS: dict[str, Block] = {}


def block(*arguments, kinds=KINDS, keeps=True, becomes=None):
    """Enter a function in the catalogue."""

    def enter(build):
        BLOCKS[build.__name__] = Block(build, kinds, arguments, keeps and becomes is None, becomes)
        return build

    return enter


def one_of(*values):
    return st.sampled_from(values)


def pick(options, choice):
    return options[choice % len(options)]


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


def axis(shape):
    """The dimension of the channels in a batch."""
    return 2 if len(shape) == SEQUENCE else 1


def channels(shape):
    return shape[axis(shape) - 1]


def along(shape, vector):
    """A vector with one entry per channel, so that it broadcasts against a batch."""
    return vector.reshape(-1, 1, 1) if len(shape) == IMAGE else vector


def layer(shape, width, bias=True):
    """The layer that mixes channels at each position."""
    return (
        nn.Conv2d(channels(shape), width, 1, bias=bias)
        if len(shape) == IMAGE
        else nn.Linear(channels(shape), width, bias)
    )


def after(module, shape):
    """The shape of a sample after a module."""
    with torch.no_grad():
        return tuple(module.eval()(torch.randn(2, *shape)).shape[1:])


def chain(blocks, shape):
    """The blocks one after another, and the shape of a sample after them."""
    modules = []
    for name, *arguments in blocks:
        modules.append(BLOCKS[name].build(shape, *arguments))
        shape = after(modules[-1], shape)
    return nn.Sequential(*modules), shape


def projected(body, shape, width):
    """The body, made to end in so many channels."""
    module, found = chain(body, shape)
    return module if channels(found) == width else nn.Sequential(module, layer(found, width))


@block(WIDTHS, FLAGS)
def linear(shape, width, bias):
    return layer(shape, width, bias)


@block(WIDTHS, one_of(1, 3), FLAGS, CHOICES, kinds=(IMAGE, SEQUENCE))
def conv(shape, width, kernel, bias, choice):
    groups = pick(divisors(math.gcd(channels(shape), width)), choice)
    kind = nn.Conv2d if len(shape) == IMAGE else nn.Conv1d
    made = kind(channels(shape), width, kernel, padding=kernel // 2, bias=bias, groups=groups)
    return made if len(shape) == IMAGE else Net(lambda n, x: n.conv(x.transpose(1, 2)).transpose(1, 2), conv=made)


@block(one_of(1, 2), FLAGS, kinds=(IMAGE,))
def depthwise(shape, multiplier, bias):
    width = channels(shape)
    return nn.Conv2d(width, width * multiplier, 3, padding=1, groups=width, bias=bias)


@block(WIDTHS, FLAGS, CHOICES, kinds=(IMAGE,), keeps=False)
def conv_transpose(shape, width, bias, choice):
    groups = pick(divisors(math.gcd(channels(shape), width)), choice)
    size = 2 if shape[1] * shape[2] <= 30 else 1
    return nn.ConvTranspose2d(channels(shape), width, size, stride=size, bias=bias, groups=groups)


@block(one_of("batch", "plain batch", "layer", "group", "instance", "plain instance", "rms"), CHOICES)
def norm(shape, kind, choice):
    width, image = channels(shape), len(shape) == IMAGE
    if kind in ("layer", "rms"):
        made = nn.LayerNorm(width) if kind == "layer" else nn.RMSNorm(width)
        return Net(lambda n, x: n.norm(x.movedim(1, -1)).movedim(-1, 1), norm=made) if image else made
    if kind == "group":
        made = nn.GroupNorm(pick(divisors(width), choice), width)
    elif "instance" in kind and math.prod(shape) > width:
        made = (nn.InstanceNorm2d if image else nn.InstanceNorm1d)(width, affine=kind == "instance")
    else:
        made = (nn.BatchNorm2d if image else nn.BatchNorm1d)(width, affine=kind != "plain batch")
    return made if axis(shape) == 1 else Net(lambda n, x: n.norm(x.transpose(1, 2)).transpose(1, 2), norm=made)


ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "sigmoid": torch.sigmoid,
    "exp": lambda x: torch.exp(x.clamp(max=2)),
    "cos": torch.cos,
    "softplus": F.softplus,
    "hardtanh": lambda x: F.hardtanh(x, 0.5, 2.0),
    "plus one": lambda x: x + 1,
}
FUNCTIONS = one_of(*ACTIVATIONS)


@block(FUNCTIONS)
def activation(shape, name):
    return Net(lambda n, x: ACTIVATIONS[name](x))


@block(FLAGS)
def prelu(shape, each):
    return Net(
        lambda n, x: n.act(x.movedim(2, 1)).movedim(1, 2) if x.dim() == 3 else n.act(x),
        act=nn.PReLU(channels(shape) if each else 1),
    )


@block(BODY, FLAGS, FLAGS)
def residual(shape, body, shortcut, inplace):
    module, found = chain(body, shape)
    if found != shape and not shortcut:
        module = nn.Sequential(module, layer(found, channels(shape)))
    skip = layer(shape, channels(found)) if shortcut else nn.Identity()
    return Net(
        lambda n, x: n.body(x).clone().add_(n.skip(x)) if inplace else n.body(x) + n.skip(x), body=module, skip=skip
    )


@block(BODY, FLAGS)
def dense(shape, body, first):
    module, _ = chain(body, shape)
    dim = axis(shape)
    return Net(lambda n, x: torch.cat([n.body(x), x] if first else [x, n.body(x)], dim), body=module)


@block(BODY, BODY, one_of("add", "mul", "cat", "maximum", "sub", "stack"), WIDTHS)
def branches(shape, left, right, how, width):
    a, b = (projected(body, shape, width) for body in (left, right))
    dim = axis(shape)
    combine = {
        "add": torch.add,
        "mul": torch.mul,
        "cat": lambda y, z: torch.cat([y, z], dim),
        "maximum": torch.maximum,
        "sub": torch.sub,
        "stack": lambda y, z: torch.stack([y, z], dim).amax(dim),
    }[how]
    return Net(lambda n, x: combine(n.a(x), n.b(x)), a=a, b=b)


@block(WIDTHS, one_of("sigmoid", "tanh", "softplus"))
def squeeze_excite(shape, width, gate):
    positions = {IMAGE: (2, 3), SEQUENCE: (1,), VECTOR: ()}[len(shape)]
    pooled = (lambda x: x.mean(positions, keepdim=True)) if positions else (lambda x: x)
    narrow = layer(shape, width)
    return Net(
        lambda n, x: x * ACTIVATIONS[gate](n.up(F.relu(n.down(pooled(x))))),
        down=narrow,
        up=layer(after(narrow, shape), channels(shape)),
    )


@block(WIDTHS, one_of("glu", "chunk", "split", "slices"), FUNCTIONS)
def gated(shape, width, how, name):
    dim = axis(shape)

    def forward(n, x):
        y = n.both(x)
        if how == "glu":
            return F.glu(y, dim)
        if how == "slices":
            half = y.shape[dim] // 2
            a, b = y.narrow(dim, 0, half), y.narrow(dim, half, half)
        else:
            a, b = y.chunk(2, dim) if how == "chunk" else y.split(n.width, dim)
        return a * ACTIVATIONS[name](b)

    return Net(forward, both=layer(shape, 2 * width), width=width)


@block(WIDTHS, WIDTHS, FLAGS)
def uneven(shape, first, second, literal):
    """Two unequal parts of one layer, the first through a layer of its own, and put together the other way round."""
    dim, found = axis(shape), list(shape)
    found[dim - 1] = first

    def forward(n, x):
        a, b = n.both(x).split([first, second] if literal else n.sizes, dim)
        return torch.cat([b, n.own(a)], dim)

    return Net(forward, both=layer(shape, first + second), own=layer(found, second), sizes=[first, second])


@block(one_of("shuffle", "unshuffle"), WIDTHS, kinds=(IMAGE,), keeps=False)
def pixels(shape, how, width):
    if how == "shuffle" and shape[1] * shape[2] <= 30:
        return nn.Sequential(layer(shape, 4 * width), nn.PixelShuffle(2))
    if how == "unshuffle" and shape[1] > 2 and shape[2] > 2:
        return nn.Sequential(nn.ZeroPad2d((0, shape[2] % 2, 0, shape[1] % 2)), nn.PixelUnshuffle(2))
    return layer(shape, width)


@block(one_of("max", "average", "adaptive", "nearest", "bilinear", "stride"), kinds=(IMAGE,), keeps=False)
def resample(shape, how):
    if how in ("nearest", "bilinear"):
        factor = 2 if shape[1] * shape[2] <= 30 else 0.5
        return nn.Upsample(scale_factor=factor, mode=how) if min(shape[1:]) > 1 else nn.Identity()
    if min(shape[1:]) < 4:
        return nn.Identity()
    width = channels(shape)
    return {"max": nn.MaxPool2d(2), "average": nn.AvgPool2d(2), "adaptive": nn.AdaptiveAvgPool2d((3, 2))}.get(how) or (
        nn.Conv2d(width, width, 3, stride=2, padding=1)
    )


@block(one_of("flatten", "view", "literal"), WIDTHS, kinds=(IMAGE, SEQUENCE), becomes=VECTOR)
def flatten(shape, how, width):
    size = math.prod(shape)
    flat = {
        "flatten": lambda x: x.flatten(1),
        "view": lambda x: x.reshape(x.shape[0], -1),
        "literal": lambda x: x.reshape(-1, size),
    }[how]
    return Net(lambda n, x: n.read(flat(x)), read=nn.Linear(size, width))


@block(one_of("mean", "max", "last"), kinds=(IMAGE, SEQUENCE), becomes=VECTOR)
def pooled(shape, how):
    positions = (2, 3) if len(shape) == IMAGE else (1,)
    last = (lambda x: x[:, :, -1, -1]) if len(shape) == IMAGE else (lambda x: x[:, -1])
    return Net(
        lambda n, x: {"mean": lambda: x.mean(positions), "max": lambda: x.amax(positions), "last": lambda: last(x)}[
            how
        ]()
    )


@block(FLAGS, kinds=(IMAGE,), becomes=SEQUENCE)
def tokens(shape, literal):
    count = shape[1] * shape[2]
    return Net(lambda n, x: (x.view(x.shape[0], x.shape[1], count) if literal else x.flatten(2)).transpose(1, 2))

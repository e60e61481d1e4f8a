"""Literal sizes, slices, index buffers, reshapes and joins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.benchmarks.awkward_parts.base import Collection, Net, conv, image, parameter, sequence, vector

SHAPES = Collection()


def dense(middle, width=12, after=None, **parts):
    """Two linear layers with something between them, and two more behind."""

    def forward(net, x):
        x = middle(net, torch.tanh(net.first(x)))
        return net.head(F.relu(net.hidden(F.relu(net.second(x)))))

    layers = {"first": nn.Linear(7, width), "second": nn.Linear(after or width, 11), "hidden": nn.Linear(11, 14)}
    return Net(forward, head=nn.Linear(14, 9), **layers, **parts)


@SHAPES.add("a literal view(-1, 576) before a linear layer", image)
def literal_view():
    def forward(net, x):
        return net.head(F.relu(net.hidden(F.relu(net.last(F.relu(net.first(x)))).view(-1, 576))))

    return Net(forward, first=conv(3, 10), last=conv(10, 12), hidden=nn.Linear(576, 14), head=nn.Linear(14, 9))


@SHAPES.add("a literal slice [:, :15]", vector)
def literal_slice():
    return dense(lambda net, x: x[:, :15], 20, 15)


@SHAPES.add("a literal slice from the end [:, 5:]", vector)
def literal_slice_tail():
    return dense(lambda net, x: x[:, 5:], 20, 15)


@SHAPES.add("every other channel [:, ::2]", vector)
def strided_slice():
    return dense(lambda net, x: x[:, ::2], 20, 10)


@SHAPES.add("slices at an attribute, one half gated by the other", vector)
def slice_by_attribute():
    def middle(net, x):
        return x[:, : net.half] * torch.sigmoid(x[:, net.half :])

    return dense(middle, 24, 12, half=12)


@SHAPES.add("uneven split and join by attributes", vector)
def uneven_split():
    def middle(net, x):
        a, b, c = torch.split(x, net.sizes, dim=1)
        return torch.cat([c, F.relu(a), net.between(b)], dim=1)

    return dense(middle, 22, 28, sizes=[4, 5, 13], between=nn.Linear(5, 11))


@SHAPES.add("narrow and select", vector)
def narrow_select():
    return dense(lambda net, x: x.narrow(1, 2, 15) * x.select(1, 0)[:, None], 20, 15)


@SHAPES.add("a fixed permutation in an index buffer", vector)
def index_buffer():
    return dense(lambda net, x: x[:, net.order], 12, order=torch.randperm(12))


@SHAPES.add("index_select of some channels by a buffer, one of them twice", vector)
def index_select_buffer():
    picked = torch.tensor([3, 0, 11, 7, 7, 5, 2, 9])
    return dense(lambda net, x: x.index_select(1, net.picked), 12, 8, picked=picked)


@SHAPES.add("flip and roll of the channels", vector)
def flipped_channels():
    return dense(lambda net, x: x.flip(1).roll(3, 1))


@SHAPES.add("a boolean buffer that picks channels", vector)
def boolean_buffer():
    chosen = torch.tensor([True, False, True, True, False, True, True, True, False, True, True, False])
    return dense(lambda net, x: x[:, net.chosen], 12, 8, chosen=chosen)


@SHAPES.add("a boolean buffer that masks channels, and an integer counter", vector)
def mask_buffer():
    def middle(net, x):
        return x.masked_fill(net.chosen, 0.5) * (1 + net.count % 2)

    return dense(middle, 12, chosen=torch.arange(12) % 3 == 0, count=torch.tensor(4))


@SHAPES.add("where, view_as and expand_as", image)
def where_expand():
    def forward(net, x):
        x = net.first(x)
        mean = x.mean((2, 3)).view(len(x), -1, 1, 1).expand_as(x)
        y = torch.where(x > mean, x, net.level.view(1, -1, 1, 1) * mean)
        return net.head(F.relu(net.last(y.flatten(2).view_as(x))).mean((2, 3)))

    return Net(forward, level=parameter(10), first=conv(3, 10), last=conv(10, 14), head=nn.Linear(14, 9))


@SHAPES.add("a reshape that depends on x.size(1)", image)
def reshape_by_size():
    def forward(net, x):
        x = F.relu(net.first(x))
        y = x.reshape(x.size(0) * x.size(1), 1, *x.shape[2:])
        y = F.relu(net.shared(y)).reshape(x.size(0), x.size(1) * 5, *x.shape[2:])
        return net.head(F.relu(net.last(y)).mean((2, 3)))

    return Net(forward, first=conv(3, 10), shared=conv(1, 5), last=conv(50, 14), head=nn.Linear(14, 9))


@SHAPES.add("flatten of channels and places into a linear layer", image)
def flatten_linear():
    def forward(net, x):
        return net.head(F.relu(net.hidden(F.max_pool2d(F.relu(net.first(x)), 2).flatten(1))))

    return Net(forward, first=conv(3, 10), hidden=nn.Linear(120, 14), head=nn.Linear(14, 9))


@SHAPES.add("flatten with the channels last", image)
def flatten_channels_last():
    def forward(net, x):
        return net.head(F.relu(net.hidden(F.relu(net.first(x)).permute(0, 2, 3, 1).flatten(1))))

    return Net(forward, first=conv(3, 10), hidden=nn.Linear(480, 14), head=nn.Linear(14, 9))


@SHAPES.add("unflatten of a linear layer into an image, decoded", vector)
def unflatten_decoder():
    def forward(net, x):
        x = F.relu(net.first(x)).unflatten(1, (-1, 4, 3))
        return net.last(F.relu(net.up(x)))

    return Net(forward, first=nn.Linear(7, 120), up=nn.ConvTranspose2d(10, 13, 2, 2), last=conv(13, 3))


@SHAPES.add("in-place writes into slices", vector)
def slice_writes():
    def middle(net, x):
        y = x.new_zeros(len(x), x.shape[1] + net.more)
        y[:, : x.shape[1]] = x
        y[:, x.shape[1] :] += net.side(x)
        return y

    return dense(middle, 12, 17, more=5, side=nn.Linear(12, 5))


@SHAPES.add("in-place arithmetic on a residual stream", image)
def in_place_residual():
    def forward(net, x):
        x = net.first(x)
        x = x + net.second(x)
        x[:, :, 1:-1].mul_(0.5)
        x.add_(1).relu_()
        return net.head(net.last(x).clamp_(min=0).mean((2, 3)))

    convs = {"first": conv(3, 10), "second": conv(10, 10), "last": conv(10, 14)}
    return Net(forward, head=nn.Linear(14, 9), **convs)


@SHAPES.add("einsum of several forms", sequence)
def einsum_forms():
    def forward(net, x):
        x = torch.einsum("bnc,dc->bnd", x, net.first)
        x = torch.einsum("bnd,mn->bmd", F.relu(x), net.tokens)
        scores = torch.einsum("bmd,bnd->bmn", x, x).softmax(-1)
        x = torch.einsum("...mn,...nd->...md", scores, x)
        x = torch.einsum("bmd,d->bmd", x, net.scale)
        return torch.einsum("bmd,dk->bk", F.relu(x), net.last)

    weights = {"first": parameter(12, 6), "tokens": parameter(8, 7), "scale": parameter(12), "last": parameter(12, 9)}
    return Net(forward, **weights)


@SHAPES.add("mixing tokens and channels in turn by transposing", sequence)
def mixer():
    def forward(net, x):
        x = net.embed(x)
        x = x + net.token_down(F.gelu(net.token_up(x.transpose(1, 2)))).transpose(1, 2)
        x = x + net.down(F.gelu(net.up(x)))
        return net.head(x.mean(1))

    layers = {"embed": nn.Linear(6, 10), "token_up": nn.Linear(7, 12), "token_down": nn.Linear(12, 7)}
    layers |= {"up": nn.Linear(10, 14), "down": nn.Linear(14, 10)}
    return Net(forward, head=nn.Linear(10, 9), **layers)


@dataclass
class Prediction:
    scores: Tensor
    features: Tensor


@SHAPES.add("a dataclass as output, hidden features in it", vector)
def dataclass_output():
    def forward(net, x):
        x = F.relu(net.hidden(F.relu(net.first(x))))
        return Prediction(net.head(x), x)

    return Net(forward, first=nn.Linear(7, 12), hidden=nn.Linear(12, 14), head=nn.Linear(14, 9))


@SHAPES.add("a nested dictionary as output", vector)
def dictionary_output():
    def forward(net, x):
        x = F.relu(net.first(x))
        return {"scores": net.head(x), "more": [net.side(F.relu(net.hidden(x))), {"mean": x.mean()}]}

    layers = {
        "first": nn.Linear(7, 12),
        "hidden": nn.Linear(12, 14),
        "side": nn.Linear(14, 5),
        "head": nn.Linear(12, 9),
    }
    return Net(forward, **layers)


@SHAPES.add("unfold and fold of patches", image)
def unfold_fold():
    def forward(net, x):
        x = F.relu(net.first(x))
        patches = F.unfold(x, 2, stride=2) * 0.5
        x = F.fold(patches, x.shape[2:], 2, stride=2)
        return net.head(F.relu(net.last(x)).mean((2, 3)))

    return Net(forward, first=conv(3, 10), last=conv(10, 14), head=nn.Linear(14, 9))


@SHAPES.add("a convolution by unfold and matmul", image)
def unfold_matmul():
    def forward(net, x):
        x = F.relu(net.first(x))
        y = net.weight @ F.unfold(x, 3, padding=1)
        return net.head(F.relu(net.last(F.relu(y).unflatten(2, x.shape[2:]))).mean((2, 3)))

    return Net(forward, first=conv(3, 10), weight=parameter(12, 90), last=conv(12, 14), head=nn.Linear(14, 9))


@SHAPES.add("patches of space moved into channels by view (space to depth)", image)
def patch_merging():
    def forward(net, x):
        x = F.relu(net.first(x)).permute(0, 2, 3, 1)
        parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return net.head(F.relu(net.merge(torch.cat(parts, dim=-1))).mean((1, 2)))

    return Net(forward, first=conv(3, 10), merge=nn.Linear(40, 14), head=nn.Linear(14, 9))


@SHAPES.add("batch and channels folded together around a pooling layer", image)
def folded_batch():
    def forward(net, x):
        x = F.relu(net.first(x))
        y = F.avg_pool1d(x.flatten(0, 1), 2).unflatten(0, (len(x), -1))
        return net.head(F.relu(net.last(y)).mean((2, 3)))

    return Net(forward, first=conv(3, 10), last=conv(10, 14), head=nn.Linear(14, 9))


@SHAPES.add("repeat_interleave and tile of channels", vector)
def repeated_channels():
    return dense(lambda net, x: x.repeat_interleave(2, dim=1) + x.repeat(1, 2), 12, 24)

"""Normalisation with live statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from examples.benchmarks.awkward_parts.base import Collection, Net, conv, image, parameter, sequence, signal

NORMS = Collection()


def normed(norm, width=12):
    """A normalised convolution with a plain one on either side."""

    def forward(net, x):
        x = F.relu(net.before(x))
        x = F.relu(net.norm(net.normed(x)))
        return net.head(F.relu(net.after(x)).mean((2, 3)))

    parts = {"before": conv(3, 10), "normed": conv(10, width), "norm": norm}
    return Net(forward, after=conv(width, 14), head=nn.Linear(14, 9), **parts)


def shaken(norm):
    """The same norm with an affine part that does something."""
    with torch.no_grad():
        for tensor in norm.parameters():
            tensor.uniform_(0.5, 1.5)
    return norm


@NORMS.add("GroupNorm of four groups", image)
def group_norm():
    return normed(nn.GroupNorm(4, 12))


@NORMS.add("GroupNorm of two groups without affine part", image)
def group_norm_plain():
    return normed(nn.GroupNorm(2, 12, affine=False))


@NORMS.add("GroupNorm of one group", image)
def group_norm_single():
    return normed(nn.GroupNorm(1, 12))


@NORMS.add("GroupNorm of one channel per group", image)
def group_norm_each():
    return normed(nn.GroupNorm(12, 12))


@NORMS.add("two GroupNorms of different group sizes on one residual stream", image)
def group_norm_twice():
    def forward(net, x):
        x = net.stem(x)
        x = x + net.first(F.relu(net.norm_a(x)))
        x = x + net.second(F.relu(net.norm_b(x)))
        return net.head(F.relu(net.hidden(x)).mean((2, 3)))

    norms = {"norm_a": nn.GroupNorm(4, 12), "norm_b": nn.GroupNorm(6, 12)}
    convs = {"stem": conv(3, 12), "first": conv(12, 12), "second": conv(12, 12), "hidden": conv(12, 14)}
    return Net(forward, head=nn.Linear(14, 9), **norms, **convs)


@NORMS.add("InstanceNorm", image)
def instance_norm():
    return normed(nn.InstanceNorm2d(12))


@NORMS.add("InstanceNorm with affine part", image)
def instance_norm_affine():
    return normed(shaken(nn.InstanceNorm2d(12, affine=True)))


@NORMS.add("InstanceNorm with running statistics", image)
def instance_norm_running():
    return normed(shaken(nn.InstanceNorm2d(12, affine=True, track_running_stats=True)))


@NORMS.add("LayerNorm over channels, height and width", image)
def layer_norm_image():
    return normed(nn.LayerNorm([12, 8, 6]))


@NORMS.add("LayerNorm over height and width only", image)
def layer_norm_places():
    return normed(nn.LayerNorm([8, 6]))


@NORMS.add("LocalResponseNorm across neighbouring channels", image)
def local_response_norm():
    return normed(nn.LocalResponseNorm(3, alpha=0.5))


@NORMS.add("BatchNorm without running statistics", image)
def batch_norm_live():
    return normed(nn.BatchNorm2d(12, track_running_stats=False))


def token_net(norm):
    def forward(net, x):
        x = net.embed(x)
        x = x + net.down(F.gelu(net.up(net.norm(x))))
        return net.head(x.mean(1))

    parts = {"embed": nn.Linear(6, 10), "up": nn.Linear(10, 14), "down": nn.Linear(14, 10)}
    return Net(forward, norm=norm, head=nn.Linear(10, 9), **parts)


@NORMS.add("LayerNorm on a residual stream", sequence)
def layer_norm():
    return token_net(nn.LayerNorm(10))


@NORMS.add("RMSNorm on a residual stream", sequence)
def rms_norm():
    return token_net(shaken(nn.RMSNorm(10)))


class OwnRMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = parameter(width)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


@NORMS.add("RMSNorm by hand", sequence)
def rms_norm_by_hand():
    return token_net(OwnRMSNorm(10))


@NORMS.add("length normalisation by a sum, with no count in it", sequence)
def sum_of_squares_norm():
    class Unit(nn.Module):
        def forward(self, x):
            return x / (x.pow(2).sum(-1, keepdim=True) + 1).sqrt()

    return token_net(Unit())


@NORMS.add("LayerNorm over channels of images by permuting", image)
def layer_norm_permuted():
    class Permuted(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return normed(Permuted(12))


class StandardisedByNorm(nn.Conv2d):
    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, eps=1e-5).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class StandardisedByHand(nn.Conv2d):
    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        return F.conv2d(x, (self.weight - mean) / deviation, self.bias, self.stride, self.padding)


def standardised(kind):
    def forward(net, x):
        x = F.relu(net.last(F.relu(net.middle(F.relu(net.first(x))))))
        return net.head(F.relu(net.hidden(x.mean((2, 3)))))

    convs = {"first": kind(3, 10, 3, padding=1), "middle": kind(10, 12, 3, padding=1), "last": kind(12, 11, 1)}
    return Net(forward, hidden=nn.Linear(11, 14), head=nn.Linear(14, 9), **convs)


@NORMS.add("weights standardised by batch_norm", image)
def weight_standardisation_batch_norm():
    return standardised(StandardisedByNorm)


@NORMS.add("weights standardised by mean and deviation", image)
def weight_standardisation_by_hand():
    return standardised(StandardisedByHand)


@NORMS.add("BatchNorm after flattening and a BatchNorm1d over time", signal)
def batch_norm_1d():
    def forward(net, x):
        x = F.relu(net.norm(net.conv(x)))
        return net.head(F.relu(net.flat_norm(net.hidden(x.flatten(1)))))

    parts = {"conv": nn.Conv1d(4, 10, 3), "norm": nn.BatchNorm1d(10), "hidden": nn.Linear(90, 14)}
    return Net(forward, flat_norm=nn.BatchNorm1d(14), head=nn.Linear(14, 9), **parts)


@NORMS.add("channels scaled by learned PReLU slopes", image)
def prelu():
    return normed(nn.PReLU(12))


@NORMS.add("global response normalisation: divided by the mean over channels", image)
def global_response_norm():
    class Response(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.scale, self.shift = parameter(1, width, 1, 1), parameter(1, width, 1, 1)

        def forward(self, x):
            norms = x.norm(dim=(2, 3), keepdim=True)
            return x + self.scale * (x * (norms / (norms.mean(1, keepdim=True) + 1e-6))) + self.shift

    return normed(Response(12))

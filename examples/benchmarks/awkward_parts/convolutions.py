"""Grouped, transposed, shuffled and deformed convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from examples.benchmarks.awkward_parts.base import Collection, Net, conv, image, signal, volume

CONVOLUTIONS = Collection()


def chain(**layers):
    """Layers in their order with a relu after each, then a mean over all places and a linear layer."""

    def forward(net, x):
        for name in layers:
            x = F.relu(getattr(net, name)(x))
        return net.head(x.flatten(2).mean(2))

    return Net(forward, head=nn.LazyLinear(9), **layers)


def ready(net, inputs):
    """The network with its lazy layer filled in."""
    with torch.no_grad():
        net.eval()(*inputs())
    return net.train()


@CONVOLUTIONS.add("transposed convolutions, one dimension", signal)
def conv_transpose_1d():
    layers = {"down": nn.Conv1d(4, 10, 3, 2), "up": nn.ConvTranspose1d(10, 12, 4, 2), "last": nn.Conv1d(12, 14, 1)}
    return ready(chain(**layers), signal)


@CONVOLUTIONS.add("transposed convolutions, two dimensions, with batch norm", image)
def conv_transpose_2d():
    layers = {"down": conv(3, 10), "norm": nn.BatchNorm2d(10), "up": nn.ConvTranspose2d(10, 12, 4, 2)}
    return ready(chain(**layers, up_norm=nn.BatchNorm2d(12), last=conv(12, 14)), image)


@CONVOLUTIONS.add("transposed convolutions, three dimensions", volume)
def conv_transpose_3d():
    layers = {"down": nn.Conv3d(3, 10, 2), "up": nn.ConvTranspose3d(10, 12, 2), "last": nn.Conv3d(12, 14, 1)}
    return ready(chain(**layers), volume)


@CONVOLUTIONS.add("transposed convolution of four groups", image)
def conv_transpose_grouped():
    layers = {"first": conv(3, 16), "up": nn.ConvTranspose2d(16, 20, 3, groups=4), "last": conv(20, 14, 1)}
    return ready(chain(**layers), image)


@CONVOLUTIONS.add("transposed depthwise convolution", image)
def conv_transpose_depthwise():
    layers = {"first": conv(3, 10), "up": nn.ConvTranspose2d(10, 10, 3, 2, groups=10), "last": conv(10, 14, 1)}
    return ready(chain(**layers), image)


@CONVOLUTIONS.add("convolution of two groups", image)
def grouped_two():
    return ready(chain(first=conv(3, 12), grouped=conv(12, 16, groups=2), last=conv(16, 14)), image)


@CONVOLUTIONS.add("convolution of many groups", image)
def grouped_many():
    return ready(chain(first=conv(3, 24), grouped=conv(24, 36, groups=12), last=conv(36, 14)), image)


@CONVOLUTIONS.add("grouped convolutions of different numbers of groups in sequence", image)
def grouped_sequence():
    layers = {"first": conv(3, 24), "four": conv(24, 24, groups=4), "six": conv(24, 36, groups=6)}
    return ready(chain(**layers, last=conv(36, 14)), image)


@CONVOLUTIONS.add("depthwise separable convolutions with a channel multiplier", image)
def depthwise_separable():
    layers = {"first": conv(3, 10), "deep": conv(10, 20, groups=10), "wide": conv(20, 14, 1)}
    return ready(chain(**layers, deep_again=conv(14, 14, 5, groups=14), wide_again=conv(14, 11, 1)), image)


@CONVOLUTIONS.add("inverted residual block", image)
def inverted_residual():
    def forward(net, x):
        x = net.stem(x)
        y = F.relu6(net.norm_b(net.deep(F.relu6(net.norm_a(net.wide(x))))))
        return net.head((x + net.narrow(y)).mean((2, 3)))

    layers = {"stem": conv(3, 10), "wide": conv(10, 30, 1), "deep": conv(30, 30, groups=30), "narrow": conv(30, 10, 1)}
    norms = {"norm_a": nn.BatchNorm2d(30), "norm_b": nn.BatchNorm2d(30)}
    return Net(forward, head=nn.Linear(10, 9), **layers, **norms)


@CONVOLUTIONS.add("PixelShuffle", image)
def pixel_shuffle():
    return ready(chain(first=conv(3, 10), wide=conv(10, 44), up=nn.PixelShuffle(2), last=conv(11, 14)), image)


@CONVOLUTIONS.add("PixelUnshuffle", image)
def pixel_unshuffle():
    return ready(chain(first=conv(3, 10), down=nn.PixelUnshuffle(2), last=conv(40, 14)), image)


@CONVOLUTIONS.add("PixelShuffle by view and permute", image)
def pixel_shuffle_by_hand():
    def forward(net, x):
        x = F.relu(net.wide(F.relu(net.first(x))))
        b, _, h, w = x.shape
        x = x.view(b, -1, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, -1, 2 * h, 2 * w)
        return net.head(F.relu(net.last(x)).mean((2, 3)))

    return Net(forward, first=conv(3, 10), wide=conv(10, 44), last=conv(11, 14), head=nn.Linear(14, 9))


def shuffled(x, groups):
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


@CONVOLUTIONS.add("channel shuffle by view and transpose", image)
def channel_shuffle_view():
    def forward(net, x):
        x = shuffled(F.relu(net.first(x)), net.groups)
        return net.head(F.relu(net.last(x)).mean((2, 3)))

    return Net(forward, groups=4, first=conv(3, 20), last=conv(20, 14), head=nn.Linear(14, 9))


@CONVOLUTIONS.add("nn.ChannelShuffle", image)
def channel_shuffle_module():
    return ready(chain(first=conv(3, 20), shuffle=nn.ChannelShuffle(4), last=conv(20, 14)), image)


@CONVOLUTIONS.add("channel shuffle between grouped convolutions", image)
def channel_shuffle_grouped():
    layers = {"first": conv(3, 20), "grouped": conv(20, 20, groups=4), "shuffle": nn.ChannelShuffle(4)}
    return ready(chain(**layers, again=conv(20, 20, groups=4), last=conv(20, 14)), image)


@CONVOLUTIONS.add("two branches, joined and shuffled, one of them passed on", image)
def channel_shuffle_split():
    def forward(net, x):
        x = F.relu(net.stem(x))
        for block in net.blocks:
            kept, changed = x.chunk(2, dim=1)
            x = shuffled(torch.cat([kept, block(changed)], dim=1), 2)
        return net.head(F.relu(net.last(x)).mean((2, 3)))

    blocks = nn.ModuleList(nn.Sequential(conv(10, 13), nn.BatchNorm2d(13), nn.ReLU(), conv(13, 10)) for _ in range(2))
    return Net(forward, blocks=blocks, stem=conv(3, 20), last=conv(20, 14), head=nn.Linear(14, 9))


@CONVOLUTIONS.add("strided and dilated convolutions with reflection padding", image)
def padded_conv():
    layers = {"first": nn.Conv2d(3, 10, 3, 2, padding=1, padding_mode="reflect"), "pad": nn.ZeroPad2d((1, 2, 0, 1))}
    return ready(chain(**layers, last=nn.Conv2d(10, 14, 2, dilation=2)), image)


@CONVOLUTIONS.add("squeeze and excitation", image)
def squeeze_excitation():
    def forward(net, x):
        x = F.relu(net.first(x))
        gate = torch.sigmoid(net.grow(F.relu(net.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return net.head(F.relu(net.last(x * gate)).mean((2, 3)))

    layers = {"first": conv(3, 20), "squeeze": conv(20, 5, 1), "grow": conv(5, 20, 1), "last": conv(20, 14)}
    return Net(forward, head=nn.Linear(14, 9), **layers)


@CONVOLUTIONS.add("excitation across neighbouring channels by a Conv1d over them", image)
def efficient_channel_attention():
    def forward(net, x):
        x = F.relu(net.first(x))
        gate = net.across(x.mean((2, 3))[:, None]).sigmoid()
        return net.head(F.relu(net.last(x * gate[:, 0, :, None, None])).mean((2, 3)))

    across = nn.Conv1d(1, 1, 3, padding=1)
    return Net(forward, first=conv(3, 20), across=across, last=conv(20, 14), head=nn.Linear(14, 9))


@CONVOLUTIONS.add("selective kernels: softmax over branches", image)
def selective_kernel():
    def forward(net, x):
        x = F.relu(net.stem(x))
        branches = torch.stack([net.small(x), net.large(x)], dim=1)
        scores = net.grow(F.relu(net.squeeze(branches.sum(1).mean((2, 3)))))
        weights = scores.view(len(x), 2, -1, 1, 1).softmax(1)
        return net.head((branches * weights).sum(1).mean((2, 3)))

    convs = {"stem": conv(3, 10), "small": conv(10, 12), "large": conv(10, 12, 5)}
    return Net(forward, squeeze=nn.Linear(12, 5), grow=nn.Linear(5, 24), head=nn.Linear(12, 9), **convs)


@CONVOLUTIONS.add("weights made by the input: one depthwise kernel for each sample", image)
def dynamic_convolution():
    def forward(net, x):
        x = F.relu(net.first(x))
        kernels = net.kernels(x.mean((2, 3))).view(-1, 1, 3, 3)
        y = F.conv2d(x.flatten(0, 1)[None], kernels, padding=1, groups=len(kernels)).view_as(x)
        return net.head(F.relu(net.last(y)).mean((2, 3)))

    return Net(forward, first=conv(3, 10), kernels=nn.Linear(10, 90), last=conv(10, 14), head=nn.Linear(14, 9))

"""Parametrised, shared, raw, complex and unregistered parameters."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from examples.benchmarks.awkward_parts.base import Collection, Net, conv, image, parameter, sequence, vector

PARAMETERS = Collection()


def images(forward=None, **layers):
    """Three convolutions with a relu after each, and a linear layer."""

    def plain(net, x):
        x = F.relu(net.last(F.relu(net.middle(F.relu(net.first(x))))))
        return net.head(x.mean((2, 3)))

    convs = {"first": conv(3, 10), "middle": conv(10, 12), "last": conv(12, 14), "head": nn.Linear(14, 9)} | layers
    return Net(forward or plain, **convs)


@PARAMETERS.add("weight_norm as a parametrization", image)
def weight_norm():
    net = images()
    for layer in (net.first, net.middle, net.last):
        parametrizations.weight_norm(layer)
    return net


@PARAMETERS.add("weight_norm over the input dimension", image)
def weight_norm_inputs():
    net = images()
    parametrizations.weight_norm(net.middle, dim=1)
    return net


@PARAMETERS.add("spectral_norm as a parametrization", image)
def spectral_norm():
    net = images()
    parametrizations.spectral_norm(net.middle)
    return net


@PARAMETERS.add("orthogonal weights as a parametrization", image)
def orthogonal():
    net = images(head=nn.Linear(14, 9))
    parametrizations.orthogonal(net.head)
    return net


class Softened(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.strength = nn.Parameter(torch.rand(width, 1, 1, 1) + 0.5)

    def forward(self, weight):
        return torch.tanh(weight * self.strength)


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(-1, -2)


@PARAMETERS.add("a parametrization of the user's own, with a parameter for each channel", image)
def own_parametrization():
    net = images()
    parametrize.register_parametrization(net.middle, "weight", Softened(12))
    return net


@PARAMETERS.add("a symmetric square weight by a parametrization", vector)
def symmetric_parametrization():
    def forward(net, x):
        return net.head(F.relu(net.hidden(F.relu(net.square(F.relu(net.first(x)))))))

    layers = {"first": nn.Linear(7, 12), "square": nn.Linear(12, 12), "hidden": nn.Linear(12, 14)}
    net = Net(forward, head=nn.Linear(14, 9), **layers)
    parametrize.register_parametrization(net.square, "weight", Symmetric())
    return net


@PARAMETERS.add("raw parameters in functional calls", image)
def raw_parameters():
    def forward(net, x):
        x = F.relu(F.conv2d(x, net.kernel, net.shift, padding=1))
        x = F.batch_norm(x, net.mean, net.variance, net.scale, training=net.training)
        x = F.relu(F.linear(x.mean((2, 3)), net.weight))
        return x @ net.last + net.offset

    buffers = {"mean": torch.randn(10) / 9, "variance": torch.rand(10) + 0.5}
    weights = {"kernel": parameter(10, 3, 3, 3), "shift": parameter(10), "scale": parameter(10)}
    weights |= {"weight": parameter(14, 10), "last": parameter(14, 9), "offset": parameter(9)}
    return Net(forward, **buffers, **weights)


@PARAMETERS.add("weights in a ParameterList", vector)
def parameter_list():
    def forward(net, x):
        for weight, bias in zip(net.weights, net.biases, strict=True):
            x = torch.addmm(bias, torch.tanh(x), weight)
        return x

    sizes = [7, 12, 14, 9]
    weights = nn.ParameterList(parameter(a, b) for a, b in pairwise(sizes))
    return Net(forward, weights=weights, biases=nn.ParameterList(parameter(b) for b in sizes[1:]))


@PARAMETERS.add("weights in a ParameterDict", vector)
def parameter_dict():
    def forward(net, x):
        x = F.relu(F.linear(x, net.weights["in"]))
        return F.linear(x * net.weights["gate"].sigmoid(), net.weights["out"])

    return Net(
        forward, weights=nn.ParameterDict({"in": parameter(12, 7), "gate": parameter(12), "out": parameter(9, 12)})
    )


@PARAMETERS.add("modules in a plain Python list, unknown to the network", image)
def unregistered_list():
    return images(unregistered, hidden=[conv(10, 12)], middle=nn.Identity())


@PARAMETERS.add("modules in a plain dictionary, unknown to the network", image)
def unregistered_dictionary():
    return images(lambda net, x: unregistered(net, x, "only"), hidden={"only": conv(10, 12)}, middle=nn.Identity())


def unregistered(net, x, key=0):
    x = F.relu(net.hidden[key](F.relu(net.first(x))))
    return net.head(F.relu(net.last(x)).mean((2, 3)))


@PARAMETERS.add("one module used twice in a row", image)
def shared_module():
    def forward(net, x):
        x = F.relu(net.first(x))
        x = F.relu(net.shared(F.relu(net.shared(x))))
        return net.head(F.relu(net.last(x)).mean((2, 3)))

    return images(forward, shared=conv(10, 10), last=conv(10, 14), middle=nn.Identity())


@PARAMETERS.add("one convolution under two names with a norm for each use", image)
def shared_convolution():
    def forward(net, x):
        x = F.relu(net.first(x))
        y = F.relu(net.norm_a(net.a(x))) + F.relu(net.norm_b(net.b(x.flip(3))))
        return net.head(F.relu(net.last(y)).mean((2, 3)))

    tied = conv(10, 12)
    norms = {"norm_a": nn.BatchNorm2d(12), "norm_b": nn.BatchNorm2d(12)}
    return images(forward, a=tied, b=tied, middle=nn.Identity(), **norms)


@PARAMETERS.add("siamese branches and their difference", image)
def siamese():
    def forward(net, x):
        a, b = (net.last(F.relu(net.middle(F.relu(net.first(y))))).mean((2, 3)) for y in (x, x.flip(3)))
        return net.head((a - b).abs())

    return images(forward)


@PARAMETERS.add("a tied autoencoder: the decoder is the transposed encoder", vector)
def tied_autoencoder():
    def forward(net, x):
        code = torch.tanh(net.inner(torch.tanh(net.outer(x))))
        return F.linear(torch.tanh(F.linear(code, net.inner.weight.t(), net.bias)), net.outer.weight.t())

    return Net(forward, outer=nn.Linear(7, 12), inner=nn.Linear(12, 5), bias=parameter(12))


@PARAMETERS.add("one matrix as weight of a layer and as a table of rows", vector)
def parameter_two_ways():
    def forward(net, x):
        x = F.relu(net.first(x))
        return net.head(F.relu(F.linear(x, net.first.weight.t()[:, :12] @ net.square)))

    return Net(forward, first=nn.Linear(7, 12), square=parameter(12, 12), head=nn.Linear(7, 9))


@PARAMETERS.add("weights of low rank, multiplied in forward", vector)
def low_rank():
    def forward(net, x):
        return net.head(F.relu(F.linear(F.relu(net.first(x)), net.up @ net.down)))

    return Net(forward, first=nn.Linear(7, 12), up=parameter(14, 5), down=parameter(5, 12), head=nn.Linear(14, 9))


@PARAMETERS.add("a frozen layer with trained low-rank matrices beside it", vector)
def low_rank_adapter():
    def forward(net, x):
        x = F.relu(net.first(x))
        return net.head(F.relu(net.hidden(x) + x @ net.down @ net.up * 0.5))

    hidden = nn.Linear(12, 14).requires_grad_(False)
    parts = {"down": parameter(12, 5), "up": parameter(5, 14), "head": nn.Linear(14, 9)}
    return Net(forward, first=nn.Linear(7, 12), hidden=hidden, **parts)


@PARAMETERS.add("complex weights between Fourier transforms over places", sequence)
def complex_weights():
    def forward(net, x):
        x = torch.fft.rfft(net.first(x), dim=1)
        x = torch.einsum("bfc,fcd->bfd", x, net.filter)
        return net.head(F.relu(net.hidden(torch.fft.irfft(x, n=7, dim=1))).mean(1))

    parts = {"first": nn.Linear(6, 10), "filter": nn.Parameter(torch.randn(4, 10, 12, dtype=torch.complex64) / 3)}
    return Net(forward, hidden=nn.Linear(12, 14), head=nn.Linear(14, 9), **parts)


@PARAMETERS.add("a complex filter for each channel, stored as pairs of numbers", image)
def fourier_filter():
    def forward(net, x):
        x = F.relu(net.first(x))
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(net.filter)
        x = torch.fft.irfft2(spectrum, s=x.shape[2:], norm="ortho")
        return net.head(F.relu(net.last(x)).mean((2, 3)))

    return Net(forward, first=conv(3, 10), filter=parameter(10, 8, 4, 2), last=conv(10, 14), head=nn.Linear(14, 9))


@PARAMETERS.add("Fourier transform over tokens and channels", sequence)
def fourier_mixer():
    def forward(net, x):
        x = net.first(x)
        x = x + torch.fft.fft2(x).real
        return net.head(F.relu(net.hidden(x)).mean(1))

    return Net(forward, first=nn.Linear(6, 10), hidden=nn.Linear(10, 14), head=nn.Linear(14, 9))


@PARAMETERS.add("half precision (bfloat16)", lambda: (image()[0].bfloat16(),))
def bfloat16():
    return images(middle=nn.Sequential(conv(10, 12), nn.BatchNorm2d(12))).bfloat16()


@PARAMETERS.add("double precision beside single", vector)
def mixed_precision():
    def forward(net, x):
        return net.head(F.relu(net.hidden(F.relu(net.first(x)).double())).float())

    return Net(forward, first=nn.Linear(7, 12), hidden=nn.Linear(12, 14).double(), head=nn.Linear(14, 9))


@PARAMETERS.add("autocast inside forward", vector)
def autocast():
    def forward(net, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = F.relu(net.hidden(F.relu(net.first(x))))
        return net.head(x.float())

    return Net(forward, first=nn.Linear(7, 12), hidden=nn.Linear(12, 14), head=nn.Linear(14, 9))


@PARAMETERS.add("channels_last", lambda: (image()[0].to(memory_format=torch.channels_last),))
def channels_last():
    return images().to(memory_format=torch.channels_last)


@PARAMETERS.add("layer scale on two residual branches", image)
def layer_scale():
    def forward(net, x):
        x = net.first(x)
        for block, gamma in zip(net.blocks, net.gammas, strict=True):
            x = x + gamma[:, None, None] * block(x)
        return net.head(F.relu(net.last(x)).mean((2, 3)))

    blocks = nn.ModuleList(nn.Sequential(conv(10, width), nn.GELU(), conv(width, 10)) for width in (12, 13))
    gammas = nn.ParameterList(parameter(10) for _ in blocks)
    return images(forward, blocks=blocks, gammas=gammas, last=conv(10, 14), middle=nn.Identity())

"""What the tiny awkward networks are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AwkwardModel:
    """A tiny network with one construct that pruning libraries find hard."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple]
    note: str


class Net(nn.Module):
    """A network from a function and its parts: ``Net(lambda net, x: net.b(net.a(x)), a=..., b=...)``."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def image():
    return (torch.randn(2, 3, 8, 6),)


def sequence():
    return (torch.randn(2, 7, 6),)


def signal():
    return (torch.randn(2, 4, 11),)


def vector():
    return (torch.randn(2, 7),)


def volume():
    return (torch.randn(2, 3, 4, 6, 5),)


def words():
    return (torch.randint(1, 23, (2, 7)),)


def conv(inside, outside, size=3, **options):
    return nn.Conv2d(inside, outside, size, padding=size // 2, **options)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape) / 3)


class Collection(dict):
    """Networks by name, filled by decorating the functions that build them."""

    def add(self, note, inputs):
        def register(build):
            self[build.__name__] = AwkwardModel(build, inputs, note)
            return build

        return register

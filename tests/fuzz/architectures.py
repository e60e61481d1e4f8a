"""Random networks as descriptions that can be printed, pasted and built again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import nn

from tests.fuzz import oddities  # noqa: F401 - enters its blocks in the catalogue
from tests.fuzz.blocks import BLOCKS, BODY, IMAGE, KINDS, SEQUENCE, WIDTHS, axis, chain, channels, layer
from tests.helpers import Net, randomise

SIZES = {"image": (6, 5), "sequence": (5,), "vector": ()}
HEADS = ("classifier", "dict", "plain", "several")


class Architecture(NamedTuple):
    """A network: what its samples are, how many channels they have, its blocks, what it hands out, and its seed."""

    kind: str
    channels: int
    blocks: tuple
    head: str = "classifier"
    seed: int = 0


class Removal(NamedTuple):
    """Which units go: a random share of every group, or of a single one (an index), and the seed."""

    share: float
    single: int | None = None
    seed: int = 0


class Example(NamedTuple):
    """Everything that a run of the property depends on."""

    architecture: Architecture
    removal: Removal


def sample_shape(architecture):
    positions = SIZES[architecture.kind]
    return (
        (*positions, architecture.channels)
        if architecture.kind == "sequence"
        else (
            architecture.channels,
            *positions,
        )
    )


def _classified(shape):
    """Reads the mean over positions into three classes."""
    positions = {3: (2, 3), 2: (1,), 1: ()}[len(shape)]
    mean = (lambda x: x.mean(positions)) if positions else (lambda x: x)
    return Net(lambda n, x: n.read(mean(x)), read=nn.Linear(channels(shape), 3))


def _whole(architecture):
    shape = sample_shape(architecture)
    trunk, found = chain((*architecture.blocks,), shape)
    if architecture.head == "plain":
        return nn.Sequential(trunk, layer(found, 2))
    head = _classified(found)
    if architecture.head == "classifier":
        return nn.Sequential(trunk, head)
    if architecture.head == "dict":
        return Net(
            lambda n, x: {"logits": n.head(y := n.trunk(x)), "map": (n.side(y), y.shape)},
            trunk=trunk,
            head=head,
            side=layer(found, 2),
        )
    stem = layer(shape, 5)
    dim = axis(shape)
    return Net(
        lambda n, x: [n.head(n.trunk(x)), n.read(torch.relu(n.stem(x)).movedim(dim, -1))],
        trunk=trunk,
        head=head,
        stem=stem,
        read=nn.Linear(5, 2),
    )


def build(architecture):
    """The network, in float64, with weights that let nothing hide: no zeros, no ones, and norms that do something."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(architecture.seed)
        network = randomise(_whole(architecture)).double()
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if "weight" in name else parameter.normal_(0, 0.5)
    return network.train()


def inputs_of(architecture):
    generator = torch.Generator().manual_seed(architecture.seed + 1)
    return torch.randn(2, *sample_shape(architecture), generator=generator, dtype=torch.float64)


@st.composite
def blocks(draw, kind, depth, most):
    """Blocks for one kind of samples; inside others (``depth`` above 0) only those that keep the positions."""
    drawn = []
    for _ in range(draw(st.integers(1 if depth == 0 else 0, most))):
        names = sorted(
            name
            for name, block in BLOCKS.items()
            if kind in block.kinds and (depth == 0 or block.keeps) and (depth < 2 or BODY not in block.arguments)
        )
        name = draw(st.sampled_from(names))
        arguments = [
            draw(blocks(kind, depth + 1, 3 - depth)) if argument is BODY else draw(argument)
            for argument in BLOCKS[name].arguments
        ]
        drawn.append((name, *arguments))
        kind = BLOCKS[name].becomes or kind
    return tuple(drawn)


@st.composite
def architectures(draw):
    name = draw(st.sampled_from(tuple(SIZES)))
    kind = dict(zip(SIZES, (IMAGE, SEQUENCE, KINDS[-1]), strict=True))[name]
    # Nothing can be cut before the first layer, and with a stem every later block sees channels that can be.
    stem = (("linear", draw(WIDTHS), draw(st.booleans())),)
    drawn = stem + draw(blocks(kind, 0, 6))
    return Architecture(name, draw(st.integers(1, 4)), drawn, draw(st.sampled_from(HEADS)), draw(st.integers(0, 9)))


def removals():
    single = st.one_of(st.none(), st.none(), st.integers(0, 7))
    return st.builds(Removal, st.sampled_from((0.5, 0.1, 0.9)), single, st.integers(0, 9))


def examples():
    return st.builds(Example, architectures(), removals())

"""Operations that compare, rank or count channels, and the shapes of whole networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from examples.benchmarks.awkward_parts.base import Collection, Net, conv, image, parameter, sequence, vector
from examples.benchmarks.awkward_parts.shapes import dense

MIXING = Collection()


@MIXING.add("GLU", vector)
def glu():
    return dense(lambda net, x: F.glu(x, dim=1), 24, 12)


@MIXING.add("SwiGLU by chunk", sequence)
def swiglu():
    def forward(net, x):
        x = net.embed(x)
        gate, value = net.up(x).chunk(2, dim=-1)
        return net.head((x + net.down(F.silu(gate) * value)).mean(1))

    return Net(forward, embed=nn.Linear(6, 10), up=nn.Linear(10, 28), down=nn.Linear(14, 10), head=nn.Linear(10, 9))


@MIXING.add("maxout: the largest of three neighbours", vector)
def maxout():
    return dense(lambda net, x: x.view(len(x), -1, 3).amax(2), 36, 12)


@MIXING.add("maxout over thirds of the channels", vector)
def maxout_thirds():
    return dense(lambda net, x: x.view(len(x), 3, -1).max(1).values, 36, 12)


@MIXING.add("softmax over channels", vector)
def softmax_channels():
    return dense(lambda net, x: x.softmax(1))


@MIXING.add("cumulative sum over channels", vector)
def cumsum_channels():
    return dense(lambda net, x: x.cumsum(1))


@MIXING.add("mean over channels beside the channels", vector)
def mean_channels():
    return dense(lambda net, x: x - x.mean(1, keepdim=True))


@MIXING.add("sum over channels beside the channels", vector)
def sum_channels():
    return dense(lambda net, x: x * x.square().sum(1, keepdim=True))


@MIXING.add("largest and mean value over channels as a spatial gate", image)
def spatial_gate():
    def forward(net, x):
        x = F.relu(net.first(x))
        summary = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], dim=1)
        return net.head(F.relu(net.last(x * torch.sigmoid(net.gate(summary)))).mean((2, 3)))

    return Net(forward, first=conv(3, 10), gate=conv(2, 1, 5), last=conv(10, 14), head=nn.Linear(14, 9))


@MIXING.add("channels sorted", vector)
def sorted_channels():
    return dense(lambda net, x: x.sort(dim=1).values)


@MIXING.add("the five largest channels", vector)
def topk_channels():
    return dense(lambda net, x: x.topk(5, dim=1).values, 12, 5)


@MIXING.add("channels normalised to length one", vector)
def normalised_channels():
    return dense(lambda net, x: F.normalize(x, dim=1))


@MIXING.add("cosine similarity with learned prototypes", vector)
def cosine_similarity():
    def forward(net, x):
        x = net.hidden(torch.tanh(net.first(x)))
        return F.cosine_similarity(x[:, None], net.prototypes[None], dim=-1)

    return Net(forward, first=nn.Linear(7, 12), hidden=nn.Linear(12, 14), prototypes=parameter(9, 14))


@MIXING.add("distances to learned prototypes", vector)
def prototype_distances():
    def forward(net, x):
        return torch.cdist(net.hidden(torch.tanh(net.first(x))), net.prototypes)

    return Net(forward, first=nn.Linear(7, 12), hidden=nn.Linear(12, 14), prototypes=parameter(9, 14))


@MIXING.add("bilinear layer of two branches", vector)
def bilinear():
    def forward(net, x):
        y = net.both(torch.tanh(net.a(x)), torch.tanh(net.b(x)))
        return net.head(F.relu(y))

    parts = {"a": nn.Linear(7, 10), "b": nn.Linear(7, 12), "both": nn.Bilinear(10, 12, 5)}
    return Net(forward, head=nn.Linear(5, 9), **parts)


@MIXING.add("outer product of two branches, flattened", vector)
def outer_product():
    def forward(net, x):
        y = torch.tanh(net.a(x))[:, :, None] * torch.tanh(net.b(x))[:, None]
        return net.head(F.relu(net.hidden(y.flatten(1))))

    parts = {"a": nn.Linear(7, 10), "b": nn.Linear(7, 12), "hidden": nn.Linear(120, 5)}
    return Net(forward, head=nn.Linear(5, 9), **parts)


@MIXING.add("Gram matrix of the channels as features", image)
def gram_matrix():
    def forward(net, x):
        x = torch.tanh(net.last(F.relu(net.first(x)))).flatten(2)
        return net.head((x @ x.transpose(1, 2)).flatten(1))

    return Net(forward, first=conv(3, 10), last=conv(10, 5), head=nn.Linear(25, 9))


@MIXING.add("highway layers", vector)
def highway():
    def middle(net, x):
        for value, gate in zip(net.values, net.gates, strict=True):
            openness = torch.sigmoid(gate(x))
            x = openness * F.relu(value(x)) + (1 - openness) * x
        return x

    layers = [nn.ModuleList(nn.Linear(12, 12) for _ in range(2)) for _ in range(2)]
    return dense(middle, values=layers[0], gates=layers[1])


@MIXING.add("dense connections: every layer reads all before it", image)
def dense_connections():
    def forward(net, x):
        features = [net.stem(x)]
        for norm, layer in zip(net.norms, net.layers, strict=True):
            features.append(layer(F.relu(norm(torch.cat(features, dim=1)))))
        return net.head(torch.cat(features, dim=1).mean((2, 3)))

    widths = [10, 15, 20]
    norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
    layers = nn.ModuleList(conv(width, 5) for width in widths)
    return Net(forward, stem=conv(3, 10), norms=norms, layers=layers, head=nn.Linear(25, 9))


@MIXING.add("residual blocks with a padded shortcut", image)
def padded_shortcut():
    def forward(net, x):
        x = F.relu(net.first(x))
        y = net.wide(F.relu(net.middle(x)))
        shortcut = F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return net.head(F.relu(y + shortcut).mean((2, 3)))

    return Net(forward, first=conv(3, 10), middle=conv(10, 13), wide=conv(13, 14), head=nn.Linear(14, 9))


@MIXING.add("the input joined to hidden features", vector)
def input_joined():
    def forward(net, x):
        y = F.relu(net.first(x))
        return net.head(F.relu(net.hidden(torch.cat([x, y, x * 2], dim=1))))

    return Net(forward, first=nn.Linear(7, 12), hidden=nn.Linear(26, 14), head=nn.Linear(14, 9))


@MIXING.add("the input added to hidden features", vector)
def input_added():
    def forward(net, x):
        y = x + net.down(F.relu(net.up(x)))
        return net.head(F.relu(net.hidden(y)))

    return Net(forward, up=nn.Linear(7, 12), down=nn.Linear(12, 7), hidden=nn.Linear(7, 14), head=nn.Linear(14, 9))


@MIXING.add("layers that multiply: FiLM conditioning by a second input", lambda: (*image(), *vector()))
def film():
    def forward(net, x, condition):
        scale, shift = net.condition(condition).unflatten(1, (2, -1)).unbind(1)
        x = net.first(x) * scale[:, :, None, None] + shift[:, :, None, None]
        return net.head(F.relu(net.last(F.relu(x))).mean((2, 3)))

    parts = {"first": conv(3, 10), "condition": nn.Linear(7, 20), "last": conv(10, 14)}
    return Net(forward, head=nn.Linear(14, 9), **parts)


@MIXING.add("mixture of experts with soft routing", vector)
def experts_soft():
    def middle(net, x):
        weights = net.router(x).softmax(-1)
        return torch.stack([expert(x) for expert in net.experts], dim=1).mul(weights[:, :, None]).sum(1)

    experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 12)) for _ in range(4))
    return dense(middle, router=nn.Linear(12, 4), experts=experts)


@MIXING.add("mixture of experts with top-2 dispatch by index_add", sequence)
def experts_topk():
    def forward(net, x):
        x = net.embed(x).flatten(0, 1)
        weights, chosen = net.router(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(net.experts):
            rows, places = torch.where(chosen == number)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, places, None])
        return net.head((x + out).view(2, 7, -1).mean(1))

    experts = nn.ModuleList(nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 10)) for _ in range(4))
    return Net(forward, embed=nn.Linear(6, 10), router=nn.Linear(10, 4), experts=experts, head=nn.Linear(10, 9))


@MIXING.add("experts stacked in one parameter and multiplied by bmm", sequence)
def experts_stacked():
    def forward(net, x):
        x = net.embed(x)
        weights = net.router(x.mean(1)).softmax(-1)
        hidden = F.relu(torch.einsum("bnc,ech->benh", x, net.up))
        y = torch.einsum("benh,ehc,be->bnc", hidden, net.down, weights)
        return net.head(y.mean(1))

    parts = {"up": parameter(4, 10, 12), "down": parameter(4, 12, 10), "router": nn.Linear(10, 4)}
    return Net(forward, embed=nn.Linear(6, 10), head=nn.Linear(10, 9), **parts)


@MIXING.add("a state-space scan: one decay for each channel and state", sequence)
def state_space():
    def forward(net, x):
        x, gate = net.embed(x).chunk(2, dim=-1)
        state, seen = x.new_zeros(len(x), x.shape[-1], net.states), []
        write, read = net.write(x), net.read(x)
        for step in range(x.shape[1]):
            state = state * torch.exp(-net.decay.exp()) + x[:, step, :, None] * write[:, step, None]
            seen.append((state * read[:, step, None]).sum(-1))
        return net.head((torch.stack(seen, dim=1) * F.silu(gate)).mean(1))

    parts = {"embed": nn.Linear(6, 24), "write": nn.Linear(12, 5), "read": nn.Linear(12, 5), "decay": parameter(12, 5)}
    return Net(forward, states=5, head=nn.Linear(12, 9), **parts)

"""Control flow, second paths, checkpointing, compiled and scripted parts."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision.ops import StochasticDepth

from examples.benchmarks.awkward_parts.base import Collection, Net, conv, image, sequence, signal, vector
from examples.benchmarks.awkward_parts.shapes import dense

FLOW = Collection()


def dense_flow(middle, **parts):
    """Like ``dense``, where what lies between sees the network's input too."""

    def forward(net, x):
        y = middle(net, torch.tanh(net.first(x)), x)
        return net.head(F.relu(net.hidden(F.relu(y))))

    return Net(forward, first=nn.Linear(7, 12), hidden=nn.Linear(12, 14), head=nn.Linear(14, 9), **parts)


def two_kinds():
    """One sample above zero and one below."""
    return (torch.rand(2, 7) * torch.tensor([[1.0], [-1.0]]),)


@FLOW.add("for each sample a branch that depends on the data", two_kinds)
def data_dependent_branch():
    def middle(net, y, x):
        chosen = [net.one if float(sample.sum()) > 0 else net.other for sample in x]
        return torch.stack([layer(row) for layer, row in zip(chosen, y, strict=True)])

    return dense_flow(middle, one=nn.Linear(12, 12), other=nn.Linear(12, 12))


@FLOW.add("a loop whose length depends on the data", vector)
def data_dependent_loop():
    def middle(net, y, x):
        for _ in range(2 + int(x.abs().max() > 0.1)):
            y = torch.tanh(net.again(y))
        return y

    return dense_flow(middle, again=nn.Linear(12, 12))


@FLOW.add("a branch that depends on hidden features", vector)
def feature_dependent_branch():
    def middle(net, y, x):
        return net.again(y) if y.square().sum() > 1e-9 else y

    return dense_flow(middle, again=nn.Linear(12, 12))


@FLOW.add("samples routed by a mask computed from the data", two_kinds)
def data_dependent_rows():
    def middle(net, y, x):
        rows = x.sum(1) > 0
        routed = torch.empty_like(y)
        routed[rows] = net.one(y[rows])
        routed[~rows] = net.other(y[~rows])
        return routed

    return dense_flow(middle, one=nn.Linear(12, 12), other=nn.Linear(12, 12))


@FLOW.add("an auxiliary head that only training uses", image)
def auxiliary_head():
    def forward(net, x):
        x = F.relu(net.first(x))
        y = net.head(F.relu(net.last(x)).mean((2, 3)))
        return (y, net.side_head(F.relu(net.side(x)).mean((2, 3)))) if net.training else y

    parts = {"first": conv(3, 10), "last": conv(10, 14), "side": conv(10, 13), "side_head": nn.Linear(13, 5)}
    return Net(forward, head=nn.Linear(14, 9), **parts)


@FLOW.add("stochastic depth", image)
def stochastic_depth():
    def forward(net, x):
        x = net.first(x)
        for block in net.blocks:
            x = x + net.drop(block(x))
        return net.head(F.relu(net.last(x)).mean((2, 3)))

    blocks = nn.ModuleList(nn.Sequential(conv(10, width), nn.ReLU(), conv(width, 10)) for width in (12, 13))
    parts = {"first": conv(3, 10), "blocks": blocks, "drop": StochasticDepth(0.5, "row"), "last": conv(10, 14)}
    return Net(forward, head=nn.Linear(14, 9), **parts)


@FLOW.add("layers skipped at random by Python in train mode", vector)
def layer_drop():
    def middle(net, x):
        for layer in net.layers:
            if not net.training or torch.rand(()) > 0.5:
                x = x + torch.tanh(layer(x))
        return x

    return dense(middle, layers=nn.ModuleList(nn.Linear(12, 12) for _ in range(3)))


class TwoFaced(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.hidden, self.head = nn.Linear(7, 12), nn.Linear(12, 14), nn.Linear(14, 9)
        self.embedding = nn.Linear(14, 5)

    def features(self, x):
        return F.relu(self.hidden(F.relu(self.first(x))))

    def embed(self, x):
        return self.embedding(self.features(x))

    def forward(self, x):
        return self.head(self.features(x))


@FLOW.add("a second method with a layer of its own that forward never reaches", vector)
def second_method():
    return TwoFaced()


@FLOW.add("dropout of single values and of whole channels", signal)
def dropouts():
    def forward(net, x):
        x = net.drop_channels(F.relu(net.first(x)))
        x = net.alpha(F.relu(net.last(net.drop_images(x[..., None])[..., 0])))
        return net.head(net.drop(x.mean(2)))

    drops = {"drop_channels": nn.Dropout1d(0.3), "drop_images": nn.Dropout2d(0.3), "alpha": nn.FeatureAlphaDropout(0.3)}
    layers = {"first": nn.Conv1d(4, 10, 3), "last": nn.Conv1d(10, 14, 3), "head": nn.Linear(14, 9)}
    return Net(forward, drop=nn.Dropout(0.3), **drops, **layers)


@FLOW.add("noise added in train mode, and a random mask", vector)
def training_noise():
    def middle(net, x):
        if net.training:
            x = x + 0.1 * torch.randn_like(x)
            x = x * torch.bernoulli(torch.full_like(x, 0.8))
        return x

    return dense(middle)


@FLOW.add("a compiled part", vector)
def compiled():
    part = nn.Sequential(nn.Linear(12, 13), nn.ReLU(), nn.Linear(13, 12))
    return dense(lambda net, x: net.part(x), part=torch.compile(part, backend="eager"))


@FLOW.add("a part compiled together with its gradients", vector)
def compiled_aot():
    part = nn.Sequential(nn.Linear(12, 13), nn.ReLU(), nn.Linear(13, 12))
    return dense(lambda net, x: net.part(x), part=torch.compile(part, backend="aot_eager"))


@FLOW.add("a scripted function", vector)
def scripted_function():
    return dense(lambda net, x: bent(x) * 2)


@torch.jit.script
def bent(x: torch.Tensor) -> torch.Tensor:
    if x.dim() > 1:
        x = x.relu() + 0.1 * x
    return x


@FLOW.add("gradient checkpointing", image)
def checkpointed():
    def forward(net, x):
        x = checkpoint(net.first, x, use_reentrant=False)
        x = checkpoint(net.last, x.relu(), use_reentrant=False)
        return net.head(F.relu(x).mean((2, 3)))

    return Net(forward, first=conv(3, 10), last=conv(10, 14), head=nn.Linear(14, 9))


@FLOW.add("gradient checkpointing of a sequence, the older way", vector)
def checkpointed_reentrant():
    def middle(net, x):
        return checkpoint_sequential(net.parts, 2, x, use_reentrant=True)

    parts = nn.Sequential(nn.Linear(12, 13), nn.ReLU(), nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 12))
    return dense(middle, parts=parts)


class Straight(torch.autograd.Function):
    """Rounds on the way forward and passes the gradient through."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x * 8) / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@FLOW.add("an autograd function of the user's own", vector)
def custom_function():
    return dense(lambda net, x: Straight.apply(x))


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@FLOW.add("identities and lambda modules in a Sequential", vector)
def lambda_modules():
    steps = [nn.Linear(7, 12), nn.Identity(), Lambda(lambda x: x.relu() ** 2), nn.Linear(12, 14), Lambda(torch.tanh)]
    return nn.Sequential(*steps, nn.Linear(14, 9))


@FLOW.add("hooks that change what a layer gives", vector)
def hooked():
    net = dense(lambda net, x: x)
    net.first.register_forward_hook(lambda layer, inputs, y: y * 2 + 1)
    net.hidden.register_forward_pre_hook(lambda layer, inputs: (inputs[0].abs(),))
    return net


@FLOW.add("generated by a function transform (vmap)", vector)
def vmapped():
    return dense(lambda net, x: torch.vmap(net.inner)(x), inner=nn.Linear(12, 12))


@FLOW.add("layers called by functional_call with changed weights", vector)
def functional_call():
    def middle(net, x):
        weights = {name: 0.5 * weight for name, weight in net.inner.named_parameters()}
        return torch.func.functional_call(net.inner, weights, (x,))

    return dense(middle, inner=nn.Linear(12, 12))


@FLOW.add("a moving average of the features in a buffer", vector)
def moving_average():
    def middle(net, x):
        if net.training:
            with torch.no_grad():
                net.average.lerp_(x.detach().mean(0), 0.1)
        return x - net.average

    return dense(middle, average=torch.randn(12))


@FLOW.add("width checked by an assertion", sequence)
def asserted_width():
    def forward(net, x):
        x = net.first(x)
        if x.shape[-1] != net.width:
            raise ValueError(f"expected {net.width} features")
        return net.head(F.relu(net.hidden(x)).mean(1))

    return Net(forward, width=10, first=nn.Linear(6, 10), hidden=nn.Linear(10, 14), head=nn.Linear(14, 9))


@FLOW.add("positions that a function remembers for the last size (lru_cache)", image)
def remembered_positions():
    @lru_cache(maxsize=1)
    def positions(height, width):
        return torch.arange(height)[:, None] * torch.arange(width) / 10

    def forward(net, x):
        x = net.first(x)
        return net.head(F.relu(net.hidden(x + positions(*x.shape[2:]))).mean((2, 3)))

    return Net(forward, first=nn.Conv2d(3, 10, 3), hidden=nn.Conv2d(10, 14, 3), head=nn.Linear(14, 9))


@FLOW.add("a branch that gets no data, as a detector's when nothing is found", image)
def no_data():
    def forward(net, x):
        x = net.first(x)
        found = net.refined(net.upper(x[:0]).relu())
        return net.head(F.relu(net.hidden(x)).mean((2, 3))) + found.sum((0, 2, 3))

    parts = {"first": nn.Conv2d(3, 10, 3), "hidden": nn.Conv2d(10, 14, 3), "head": nn.Linear(14, 9)}
    return Net(forward, **parts, upper=nn.ConvTranspose2d(10, 6, 2, 2), refined=nn.Conv2d(6, 9, 1))

"""Every optimizer trains on after a shrink as if the network had always been small."""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from lightning_prune import Linear, OneShot, trace
from lightning_prune.surgery.resize import plan_cuts, resize, resize_optimizers
from tests.fits import BATCHES, CLASSES, Liveness, SmallNet, equal, fit, images, pruning, small_net, widths
from tests.unit.test_bit_identical import odd_ones_go, rest

STEPS = BATCHES + 2  # optimizer steps before the shrink
CLASSES_OF_OPTIMIZERS = {
    name: kind
    for name, kind in sorted(vars(torch.optim).items())
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
DENSE = [name for name in CLASSES_OF_OPTIMIZERS if name != "SparseAdam"]
MOMENTUM = {"momentum": 0.9}
SETTINGS = {"SGD": MOMENTUM, "RMSprop": MOMENTUM, "LBFGS": {"max_iter": 2}}


class Matrices(SmallNet):
    """All its parameters are matrices, the only ones that some optimizers take."""

    def __init__(self, width=12):
        super().__init__(width)
        layers = [nn.Linear(72, width, bias=False), nn.ReLU(), nn.Linear(width, 2 * width, bias=False), nn.ReLU()]
        self.net = nn.Sequential(nn.Flatten(), *layers, nn.Linear(2 * width, CLASSES, bias=False))


def takes(kind, module, **settings):
    try:
        kind(module.parameters(), **settings)
    except ValueError:
        return False
    return True


def network(kind, width):
    """A LightningModule of that width whose parameters the optimizer takes."""
    torch.manual_seed(0)
    module = SmallNet(width)
    return module if takes(kind, module) else Matrices(width)


def fitted(module, kind, **settings):
    module.configure_optimizers = lambda: kind(module.parameters(), **settings)
    return module


def halved(value, full, small):
    """Every second position along each dimension of a parameter that was cut, for its state too."""
    if not isinstance(value, Tensor) or value.dim() != len(full):
        return copy.deepcopy(value)
    for dim, (before, after) in enumerate(zip(full, small, strict=True)):
        if before != after and value.shape[dim] == before:
            value = value.index_select(dim, torch.arange(0, before, 2))
    return value.clone()


def small_twin(module, optimizer, small, other):
    """Give a small network and its optimizer the even half of what a wide network and its optimizer hold."""
    shapes = {name: value.shape for name, value in small.state_dict().items()}
    small.load_state_dict({n: halved(v, v.shape, shapes[n]) for n, v in module.state_dict().items()})
    state = copy.deepcopy(optimizer.state_dict())
    if isinstance(optimizer, torch.optim.LBFGS):
        state["state"] = {}
    pairs = list(zip(module.parameters(), small.parameters(), strict=True))
    for number, slots in state["state"].items():
        wide, narrow = pairs[number]
        state["state"][number] = {k: halved(v, wide.shape, narrow.shape) for k, v in slots.items()}
    other.load_state_dict(state)


class Fork(L.Callback):
    """Makes the small twin of the network right before the shrink."""

    def __init__(self, small, build):
        self.small, self.build = small, build

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == STEPS:
            self.twin_state = self.build(self.small.parameters())
            small_twin(pl_module, trainer.optimizers[0], self.small, self.twin_state)


class Begin(L.Callback):
    def __init__(self, fork):
        self.fork = fork

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].load_state_dict(copy.deepcopy(self.fork.twin_state.state_dict()))


@pytest.mark.parametrize("name", DENSE)
def test_a_fit_goes_on_bit_for_bit_as_that_of_a_network_that_was_always_small(name):
    kind, settings = CLASSES_OF_OPTIMIZERS[name], SETTINGS.get(name, {})
    wide, small = (fitted(network(kind, width), kind, **settings) for width in (12, 6))
    callback = pruning(schedule=OneShot(STEPS, "step"))
    callback.select = odd_ones_go
    fork = Fork(small, lambda parameters: kind(parameters, **settings))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, used = fit(fork, callback, module=wide, epochs=3)
    _, again = fit(Begin(fork), module=small, data=rest(), epochs=1)
    assert equal(wide.state_dict(), small.state_dict())
    # LBFGS counts its evaluations, and those of the time before the shrink are forgotten with its history.
    assert equal(used.optimizers[0].state_dict(), again.optimizers[0].state_dict())
    said = [str(warning.message) for warning in caught if "afresh" in str(warning.message)]
    assert said == (
        ["LBFGS keeps its history for all parameters in one vector; it starts afresh"] if name == "LBFGS" else []
    )


def variants(name):
    """Settings to try: every switch of an optimizer by itself, every implementation, learning rates as tensors."""
    kind = CLASSES_OF_OPTIMIZERS[name]
    known = inspect.signature(kind).parameters
    yield {}
    yield from ({key: not value.default} for key, value in known.items() if isinstance(value.default, bool))
    yield from ({key: True} for key in ("foreach", "fused") if key in known)
    if "foreach" in known:
        yield {"foreach": False}
        yield {"foreach": False, "lr": torch.tensor(0.01)}
    if {"centered", "momentum"} <= known.keys():
        yield {"centered": True, **MOMENTUM}
    if "nesterov" in known:
        yield {"nesterov": True, **MOMENTUM}


def train(module, optimizer, batches):
    for inputs, labels in batches:

        def closure(inputs=inputs, labels=labels):
            optimizer.zero_grad()
            loss = cross_entropy(module(inputs), labels)
            loss.backward()
            return loss

        optimizer.step(closure)


def runs(kind, settings, batches):
    """Whether this machine and this torch can train with an optimizer at all."""
    module = Matrices()
    try:
        train(module, kind(module.parameters(), **settings), batches[:2])
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", DENSE)
def test_every_way_to_run_an_optimizer_goes_on_bit_for_bit(name):
    kind, data = CLASSES_OF_OPTIMIZERS[name], images()
    batches = [(data[i : i + 8][0], data[i : i + 8][1]) for i in range(0, 48, 8)]
    initial, tried = Matrices(), 0  # linear layers go by the sizes of their weights alone
    graph = trace(initial, batches[0][0])
    keep = {group: torch.arange(0, graph.groups[group].width, 2) for group in graph.groups}
    cuts = plan_cuts(graph.groups, dict(initial.named_parameters()), keep)
    for settings in variants(name):
        settings = {**SETTINGS.get(name, {}), **settings}
        if not runs(kind, settings, batches):
            continue
        tried += 1
        module, small = copy.deepcopy(initial), Matrices(6)
        optimizer, other = (kind(m.parameters(), **copy.deepcopy(settings)) for m in (module, small))
        train(module, optimizer, batches[:3])
        small_twin(module, optimizer, small, other)
        tensors = dict(module.named_parameters())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if name == "LBFGS" else "error")
            resize_optimizers([optimizer], tensors, cuts, resize(tensors, cuts))
        train(module, optimizer, batches[3:])
        train(small, other, batches[3:])
        assert equal(module.state_dict(), small.state_dict()), settings
        assert equal(optimizer.state_dict(), other.state_dict()), settings
    assert tried >= 1


class Two(SmallNet):
    """Trains its features and its head by optimizers of its own, norms and biases without weight decay."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self(batch[0]), batch[1])
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            self.clip_gradients(optimizer, 0.5, "norm")
            optimizer.step()

    def configure_optimizers(self):
        features = dict(self.net[:9].named_parameters())
        groups = [
            {"params": [p for p in features.values() if p.dim() > 1], "weight_decay": 0.1, "lr": 0.02},
            {"params": [p for p in features.values() if p.dim() == 1], "weight_decay": 0.0, "lr": 0.01},
        ]
        return [torch.optim.AdamW(groups), torch.optim.SGD(self.net[9].parameters(), lr=0.05, momentum=0.9)]


@pytest.mark.parametrize("shrink", ["rounds", "end"])
def test_several_optimizers_and_their_groups_keep_what_they_hold(shrink):
    module, before = Two(), []

    class Groups(L.Callback):
        def on_train_start(self, trainer, pl_module):
            before.extend(groups(trainer))

    def groups(used):
        every = itertools.chain.from_iterable(optimizer.param_groups for optimizer in used.optimizers)
        return [({k: v for k, v in g.items() if k != "params"}, [id(p) for p in g["params"]]) for g in every]

    callback = pruning(scope="group", shrink=shrink, schedule=Linear(1, 3, 1, "epoch"))
    _, used = fit(Groups(), Liveness(), callback, module=module, epochs=4)
    assert widths(module) == [6, 12, 12]
    assert groups(used) == before
    assert [len(ids) for _, ids in before] == [5, 9, 2]
    shapes = [state["exp_avg"].shape for state in used.optimizers[0].state.values()]
    assert shapes == [p.shape for g in used.optimizers[0].param_groups for p in g["params"]]


SCHEDULES = {
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.02, 0.05], total_steps=4 * BATCHES),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[7]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, threshold=0.9),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheduler_goes_its_way_whatever_is_removed(name):
    class Scheduled(SmallNet):
        def training_step(self, batch, batch_idx):
            self.log("flat", 1.0)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            head = list(self.net[9].parameters())
            groups = [{"params": list(self.net[:9].parameters())}, {"params": head, "lr": 0.005}]
            optimizer = torch.optim.AdamW(groups, lr=0.01)
            each = "epoch" if name == "ReduceLROnPlateau" else "step"
            config = {"scheduler": SCHEDULES[name](optimizer), "interval": each, "monitor": "flat"}
            return {"optimizer": optimizer, "lr_scheduler": config}

    class Rates(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, *args):
            self.seen.append([(g["lr"], g["betas"]) for g in trainer.optimizers[0].param_groups])

    plain, pruned = Rates(), Rates()
    fit(plain, module=Scheduled(), epochs=4)
    callback = pruning(scope="group", schedule=Linear(1, 3, 1, "epoch"))
    module, _ = fit(Liveness(), callback, pruned, module=Scheduled(), epochs=4)
    assert widths(module) == [6, 12, 12]
    assert pruned.seen == plain.seen
    assert len({str(rates) for rates in plain.seen}) > 1


def test_clipping_by_value():
    module, _ = fit(pruning(), Liveness(), epochs=2, gradient_clip_val=0.1, gradient_clip_algorithm="value")
    assert sum(widths(module)) == 30


@pytest.mark.parametrize("shrink", ["rounds", "end", "never"])
def test_sparse_gradients_of_an_embedding(shrink):
    class Lookup(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.table = nn.Embedding(7, 8, sparse=True)
            self.rest = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, CLASSES))

        def training_step(self, batch, batch_idx):
            inputs = batch[0].mean((1, 2, 3)).mul(2).long().clamp(0, 6)
            loss = cross_entropy(self.rest(self.table(inputs)), batch[1])
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SparseAdam(self.table.parameters(), lr=0.01), torch.optim.Adam(self.rest.parameters())]

    module = Lookup()
    _, used = fit(pruning(scope="group", shrink=shrink), module=module, epochs=3)
    width = 8 if shrink == "never" else 4
    assert module.table.weight.shape == (7, width)
    assert module.table.embedding_dim == width
    assert used.optimizers[0].state[module.table.weight]["exp_avg"].shape == (7, width)
    assert int((module.rest[0].weight == 0).all(dim=0).sum()) == (4 if shrink == "never" else 0)


class Whitening(torch.optim.Optimizer):
    """Keeps for each matrix a list of statistics whose sizes are not those of the matrix, as Shampoo does."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for parameter in self.param_groups[0]["params"]:
            gradient, state = parameter.grad, self.state[parameter]
            if parameter.dim() > 1:
                rows = gradient.flatten(1)
                left = state.setdefault("left", [torch.eye(len(rows))])[0]
                left += rows @ rows.T
                gradient = torch.linalg.solve(left, rows).view_as(parameter)
            parameter -= 0.05 * gradient
        return loss


def test_state_that_cannot_be_cut_is_dropped_with_one_warning_for_each_parameter():
    module = fitted(small_net(), Whitening)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, used = fit(pruning(scope="group"), module=module, epochs=3)
    assert widths(module) == [6, 12, 12]
    said = sorted(str(w.message).split(" for ")[1].split()[0] for w in caught if "keeps state for" in str(w.message))
    cut = ["net.0", "net.3.depthwise", "net.3.expand", "net.3.project", "net.4", "net.9"]
    assert said == [f"{name}.weight" for name in cut]
    assert all(len(used.optimizers[0].state[p]["left"][0]) == len(p) for p in module.parameters() if p.dim() > 1)


class Preconditioned(torch.optim.Optimizer):
    """Keeps a square matrix beside a momentum for every matrix, as second-order optimizers do."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                rows = parameter.reshape(len(parameter), -1)
                if not state:
                    state["pre"] = torch.eye(len(parameter))
                    state["momentum"] = torch.zeros_like(parameter)
                state["pre"].lerp_(torch.eye(len(parameter)) * 2, 0.1)
                torch.linalg.cholesky(state["pre"])
                gradient = torch.linalg.solve(state["pre"], parameter.grad.reshape(rows.shape)).reshape(parameter.shape)
                parameter.sub_(state["momentum"].mul_(0.9).add_(gradient), alpha=group["lr"])
        return loss


class Lookahead(torch.optim.Optimizer):
    """Steps through another optimizer that works on the same groups."""

    def __init__(self, params):
        super().__init__(params, {})
        self.inner = torch.optim.Adam(self.param_groups, lr=0.01)

    def step(self, closure=None):
        return self.inner.step(closure)


class Square(SmallNet):
    """Two linear layers, the first of them square."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.net = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(72, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU(),
            torch.nn.Linear(16, 3),
        )  # fmt: skip

    def configure_optimizers(self):
        return self.kind(self.parameters())


@pytest.mark.parametrize("shrink", ["rounds", "end"])
def test_square_state_is_not_taken_for_a_momentum(shrink):
    callback = pruning(remove=0.25, scope="group", include=["net.3"], shrink=shrink)
    module = Square(Preconditioned)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(callback, module=module)
    dropped = [str(w.message) for w in caught if "starts afresh for that parameter" in str(w.message)]
    assert any("net.3.weight" in message for message in dropped)
    assert module.net[3].out_features == 12


def test_an_optimizer_inside_another_one_is_cut_along():
    module, _ = fit(pruning(scope="group"), Liveness(), module=Square(Lookahead))
    assert module.net[3].out_features == 8


class Compressed(torch.Tensor):
    """State in a form of its own, as that of optimizers in eight bits is; it cannot be read along an axis."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.index_select:
            raise NotImplementedError(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class EightBits(torch.optim.SGD):
    """Keeps its momentum in such a form."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.05)

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter).as_subclass(Compressed)
        return loss


def test_state_in_a_form_of_its_own_starts_afresh():
    module = Square(EightBits)
    with pytest.warns(UserWarning, match=r"EightBits keeps state for net\.3\.weight in a form that cannot be cut"):
        fit(pruning(remove=0.25, scope="group", include=["net.3"]), module=module)
    assert module.net[3].weight.shape == (12, 16)

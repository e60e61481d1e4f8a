"""What tests that run whole fits share: a small network of the user's, its data, a Trainer, and witnesses."""

from __future__ import annotations

import copy

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune import ChannelPruning
from lightning_prune.callbacks.network import Network
from tests.helpers import difference, masked_copy

BATCHES, BATCH_SIZE, CLASSES = 6, 8, 3
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
}


class Residual(nn.Module):
    """Expansion, depthwise convolution and projection beside a shortcut."""

    def __init__(self, width):
        super().__init__()
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.norm = nn.BatchNorm2d(2 * width)
        self.project = nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        return x + self.project(torch.relu(self.norm(self.depthwise(self.expand(x)))))


class SmallNet(L.LightningModule):
    """A classifier of 2x6x6 images; an ordinary LightningModule that knows nothing of pruning."""

    def __init__(self, width=12, optimizer="adamw"):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Residual(width),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, CLASSES),
        )

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = OPTIMIZERS[self.hparams.optimizer](self.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StiffNet(SmallNet):
    """From some epoch on it adds an offset of fixed width behind ``net.4``, which then cannot be cut any more.

    Args:
        epoch: The first epoch in which it does.
        rank: The only process in which it does; None for all.
    """

    def __init__(self, epoch=1, rank=None):
        super().__init__()
        self.stiff_from, self.stiff_rank = epoch, rank

    def forward(self, images):
        hidden = self.net[:5](images)
        fit = self._trainer
        if fit is not None and fit.current_epoch >= self.stiff_from and self.stiff_rank in (None, self.global_rank):
            hidden = hidden + torch.zeros(24, 1, 1)
        return self.net[5:](hidden)


def images(batches=BATCHES, seed=1):
    """A data set that can be learnt a little: the label shifts the mean of the image."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(batches * BATCH_SIZE) % CLASSES
    return TensorDataset(torch.randn(len(labels), 2, 6, 6, generator=generator) + labels[:, None, None, None], labels)


class Resumable(DataLoader):
    """Tells how many batches of an epoch it has handed out, and goes on from there."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.done = self.skipped = 0

    def __iter__(self):
        skipped, self.skipped = self.skipped, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= skipped:
                self.done = number + 1
                yield batch

    def state_dict(self):
        return {"done": self.done % len(self)}

    def load_state_dict(self, state):
        self.skipped = state["done"]


def loader(batches=BATCHES, seed=1):
    """Batches in fixed order."""
    return Resumable(images(batches, seed), batch_size=BATCH_SIZE)


def small_net(seed=0, **arguments):
    """The network with weights from a seed, the same for the same seed."""
    torch.manual_seed(seed)
    return SmallNet(**arguments)


def trainer(*callbacks, epochs=3, **arguments):
    """A quiet Trainer on the CPU."""
    quiet = {"logger": False, "enable_checkpointing": False}
    always = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    settings = {"max_epochs": epochs, "num_sanity_val_steps": 0, **quiet, **always, **arguments}
    return L.Trainer(callbacks=list(callbacks), **settings)


def fit(*callbacks, module=None, data=None, **arguments):
    """Fit a (new) small network; returns it with its Trainer."""
    module = small_net() if module is None else module
    used = trainer(*callbacks, **arguments)
    used.fit(module, loader() if data is None else data)
    return module, used


def pruning(**arguments):
    """Channel pruning of half the channels at the start of the second epoch, unless told otherwise."""
    from lightning_prune import OneShot

    defaults = {"remove": 0.5, "of": "channels", "schedule": OneShot(at=1, unit="epoch"), "criterion": "l1"}
    return ChannelPruning(**{**defaults, **arguments})


def widths(module):
    """Widths of the three channel groups, as the modules remember them."""
    return [module.net[0].out_channels, module.net[3].depthwise.groups, module.net[4].out_channels]


def macs(module, *inputs):
    """Multiply-accumulates per sample of one forward, counted while it runs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(*inputs)
    return counter.get_total_flops() / 2 / len(inputs[0])


def parameters(module):
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def equal(first, second):
    """Whether two nested states are equal to the last bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def surface(module):
    """Everything that could be left hanging on a module: attributes and hooks of all its modules and tensors."""
    found = {}
    for path, part in module.named_modules():
        found[path] = set(vars(part))
        found[path, "hooks"] = {name: list(hooks) for name, hooks in vars(part).items() if name.endswith("_hooks")}
        found[path, "forward"] = type(part), "forward" in vars(part)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        hooks = tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)
        found[name] = type(tensor), hooks, set(vars(tensor))
    return found


def optimizer_hooks(optimizers):
    """Number of hooks of each kind on each optimizer."""
    return [{name: len(hooks) for name, hooks in vars(o).items() if name.endswith("_hooks")} for o in optimizers]


class Rows(Logger):
    """Keeps every logged row in memory."""

    def __init__(self):
        super().__init__()
        self.rows = []

    name = "rows"
    version = 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


class Exactness:
    """Compares the module with the masked original, made by plain indexing, at every shrink of a fit.

    Args:
        monkeypatch: Of the test.
        outputs: What to compare: takes a module and returns tensors.

    Attributes:
        differences: Relative difference of the outputs at each shrink.
        changed: How far each shrink is from changing nothing, relative difference of masked and dense output.
    """

    def __init__(self, monkeypatch, outputs):
        self.differences, self.changed = [], []
        original = Network.shrink

        def shrink(network, keep, verify):
            units = {name: mask.nonzero().flatten() for name, mask in keep.items()}
            dense = outputs(copy.deepcopy(network.module))
            masked = outputs(masked_copy(network.module, network.graph, units))
            result = original(network, keep, verify)
            if result.cuts:
                self.differences.append(difference(masked, outputs(network.module)))
                self.changed.append(difference(dense, masked))
            return result

        monkeypatch.setattr(Network, "shrink", shrink)


class Liveness(L.Callback):
    """After every batch: the optimizers hold the very parameters of the module, all of them moved, state fits.

    Args:
        moving: Whether they should have moved; not in a network of which nothing is trained.
    """

    def __init__(self, moving=True):
        self.batches, self.moving = 0, moving

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = {name: parameter.detach().clone() for name, parameter in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        named = dict(pl_module.named_parameters())
        held = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in named.values()}
        still = [name for name, parameter in named.items() if torch.equal(parameter, self.before[name])]
        assert not (self.moving and still), f"did not move: {still}"
        for optimizer in trainer.optimizers:
            for parameter, state in optimizer.state.items():
                assert all(v.shape == parameter.shape for v in state.values() if torch.is_tensor(v) and v.dim())
        self.batches += 1

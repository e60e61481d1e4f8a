"""Parts of a module that follow others outside of the training step, as averages that a hook keeps do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.graph.channels import ChannelGroup


class Followers:
    """Finds parameters that no optimizer trains and that move all the same, each with the one that it seems to follow.

    That is the trained parameter of its shape whose name ends most like its own.

    Args:
        module: The module.
        optimizers: Gives all optimizers of the fit, as they are now.
    """

    def __init__(self, module: nn.Module, optimizers: Callable[[], Iterable[Optimizer]]) -> None:
        self._module = module
        self._optimizers = optimizers
        named = dict(module.named_parameters())
        trained = self._trained()
        leaders = {name: p for name, p in named.items() if name in trained}
        self._leaders: dict[str, str] = {}
        for name, parameter in named.items():
            alike = [n for n, leader in leaders.items() if leader.shape == parameter.shape and _ending(n, name)]
            if name not in leaders and alike and parameter.is_floating_point():
                self._leaders[name] = max(alike, key=lambda other: _ending(other, name))
        self._moved: set[str] = set()
        self._parted: set[str] = set()
        self.take_down()

    def take_down(self) -> None:
        """Remember where they are now."""
        self._sums = self._measured()

    def moved(self) -> dict[str, str]:
        """Names of those that have moved in this fit, with what they seem to follow."""
        now = self._measured()
        self._moved |= {name for name, value in now.items() if value != self._sums[name]}
        self._moved -= self._trained()  # what was frozen may be trained by now
        return {name: leader for name, leader in self._leaders.items() if name in self._moved}

    def left_behind(self, groups: Mapping[str, ChannelGroup], keep: Mapping[str, Tensor]) -> dict[str, str]:
        """Those of :meth:`moved` that would not lose the same units as what they follow.

        Args:
            groups: The groups of the network by name.
            keep: Bool masks of the units that are kept, by group name.
        """
        return _parted(self.moved(), groups, keep)

    def part(self, groups: Mapping[str, ChannelGroup], keep: Mapping[str, Tensor]) -> None:
        """Remember which will have lost other units than what they would follow, if they did; arguments as before."""
        self._parted |= _parted(self._leaders, groups, keep).keys()

    def mixed(self) -> dict[str, str]:
        """Those that have lost other units than what they seem to follow, and have moved since; each is told once."""
        found = {name: leader for name, leader in self.moved().items() if name in self._parted}
        self._parted -= found.keys()
        return found

    def _trained(self) -> set[str]:
        held = {id(p) for optimizer in self._optimizers() for group in optimizer.param_groups for p in group["params"]}
        return {name for name, p in self._module.named_parameters() if id(p) in held and p.requires_grad}

    def _measured(self) -> dict[str, tuple[float, float]]:
        named = dict(self._module.named_parameters())
        with torch.no_grad():
            found = {name: named[name] for name in self._leaders if name in named}
            values = {name: p.to(torch.promote_types(p.dtype, torch.float32)) for name, p in found.items()}
            return {name: (float(value.sum()), float(value.abs().sum())) for name, value in values.items()}


def _parted(
    leaders: Mapping[str, str], groups: Mapping[str, ChannelGroup], keep: Mapping[str, Tensor]
) -> dict[str, str]:
    """Those that do not lose the same units as their leaders, by the names of both."""
    cut = [groups[name] for name, mask in keep.items() if not bool(mask.all())]

    def touching(tensor: str) -> Collection[tuple[int, str]]:
        return {(slot.dim, group.name) for group in cut for slot in group.slots if slot.tensor == tensor}

    return {name: leader for name, leader in leaders.items() if touching(name) != touching(leader)}


def _ending(first: str, second: str) -> int:
    """How many parts at the end of two dotted names are the same."""
    pairs = zip(reversed(first.split(".")), reversed(second.split(".")), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

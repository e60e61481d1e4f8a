"""The network of a running fit: its channel graph, what is off in it, and its resizing with all that hangs on it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.callbacks.followers import Followers
from lightning_prune.callbacks.support import rewrap, shadows
from lightning_prune.checkpoint import (
    leave_behind,
    left_behind,
    original_settings_of,
    plain_settings,
    settings_of,
)
from lightning_prune.cost import CostModel, checkpoint_bytes
from lightning_prune.errors import ShrinkError, TraceError
from lightning_prune.graph.analysis import Norms
from lightning_prune.graph.known import Known, known_of
from lightning_prune.graph.tracer import named_leaves
from lightning_prune.graph.unregistered import loose_tensors
from lightning_prune.masks import Masks
from lightning_prune.probe import Probe
from lightning_prune.probe.optimizers import optimizers_of
from lightning_prune.report import Totals
from lightning_prune.surgery import Shrunk, keep_whole, resized, shrink, trace_programs
from lightning_prune.surgery.attributes import integer_settings, write_settings
from lightning_prune.surgery.resize import read, resize
from lightning_prune.surgery.symbols import Setting
from lightning_prune.text import listed
from lightning_prune.weight_masks import WeightMasks


class Network:
    """What a pruning callback knows of the module it works on.

    Args:
        trainer: The Trainer.
        module: The user's module.
        probe: Runs the module on real batches.
        record: What an earlier fit left of :meth:`state`; empty for a module that has not been pruned.
        norms: As for :class:`~lightning_prune.ChannelPruning`.
        inner: As for :class:`~lightning_prune.ChannelPruning`.

    Attributes:
        graph: The present channel graph.
        masks: The units that are off.
        weights: The single weights that are off.
        origin: Parameters and buffers as they once were, at their present sizes; empty until :meth:`remember`.
        tensors: Parameters and buffers by full name.
        original: Width of every group before any pruning.
        positions: Which of these units are still there, by group name; those that are masked among them.
        followers: Parameters that seem to follow others outside of the training step.
        used: Names of the parameters and buffers that the runs of the trace have used.
        unused: Parameters that are trained, though none of these runs has used them.
        whole: Groups that turned out in this training to be impossible to cut any further, with their widths.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        probe: Probe,
        record: Mapping[str, Any],
        norms: Norms,
        inner: Sequence[str],
    ) -> None:
        """Trace the module."""
        self._norms: Norms = norms
        self._inner = inner
        self._trainer = trainer
        self.module = module
        self.probe = probe
        record = record or left_behind(module)
        self._settings = settings_of(record)
        self._original_settings = original_settings_of(record)
        self._cut: set[str] = set(record.get("cut", ()))
        self._dims: dict[str, set[int]] = {name: set(dims) for name, dims in record.get("dims", {}).items()}
        self.whole: dict[str, int] = dict(record.get("whole", {}))
        self.original: dict[str, int] = dict(record.get("original", {}))
        self.origin: dict[str, Tensor] = dict(record.get("origin", {}))
        self.weights = WeightMasks(record.get("weights", {}))
        self._known = Known(**record.get("known", {}))
        self._used_late: set[str] = set()
        self.followers = Followers(module, lambda: self.optimizers)
        self._trace()
        self.original = {**self.graph.widths, **self.original}
        whole = {name: torch.arange(width) for name, width in self.original.items()}
        self.positions: dict[str, Tensor] = {**whole, **record.get("positions", {})}
        self._mask(record.get("masks", {}))

    def _trace(self) -> None:
        """Find the channel groups of the module as it is now; all units count as kept."""
        self.tensors = named_leaves(self.module)
        traced = trace_programs(self.module, self.probe.programs(), self._norms, self._inner, self._known)
        if self.original:
            self.whole.update({n: width for n, width in traced.widths.items() if n not in self.original})
        self.graph = keep_whole(traced, {name: self._reason(name) for name in self.whole})
        for slot in (slot for group in self.graph.groups.values() for slot in group.slots):
            self._dims.setdefault(slot.tensor, set()).add(slot.dim)
        self.masks = Masks(self.graph)
        self._cost = CostModel(self.graph, [name for name, _ in self.module.named_parameters()])
        self.used = self.graph.evidence.touched if self.graph.evidence is not None else set(self.tensors)
        self.unused = self._unused()
        used = {*self._known.used, *self.used}
        self._known = known_of(self.graph.groups.values(), used, self.graph.refused)

    def _unused(self) -> dict[str, nn.Parameter]:
        trained = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        return {
            name: parameter
            for name, parameter in self.module.named_parameters()
            if name not in self.used and parameter.requires_grad and id(parameter) in trained
        }

    def likely_feeders(self) -> str:
        """The groups as wide as parameters that no run has used take their inputs, in brackets, for a message."""
        widths = {parameter.shape[1] for parameter in self.unused.values() if parameter.dim() > 1}
        names = [name for name, width in self.graph.widths.items() if width in widths]
        return f" (by its width it may be {listed(names, 60)})" if names else ""

    def _reason(self, name: str) -> str:
        late = name not in self.original
        return "was not used when the fit began" if late else "could not be cut exactly when it came to it"

    def note_late_use(self) -> None:
        """See whether a step has used parameters that no run of the trace did."""
        self._used_late |= {name for name, parameter in self.unused.items() if parameter.grad is not None}

    def _mask(self, masks: Mapping[str, Tensor]) -> None:
        """Take over masks of an earlier graph."""
        self.masks.set({n: mask for n, mask in masks.items() if len(mask) == self.graph.widths.get(n)})

    def refresh(self) -> None:
        """Trace again if a parameter or buffer is another tensor by now, or a step has used one that no run did."""
        present = named_leaves(self.module)
        replaced = present.keys() != self.tensors.keys() or any(present[n] is not t for n, t in self.tensors.items())
        if replaced or self._used_late:
            masks, late = self.masks.keep, self._used_late
            self._used_late = set()
            self._trace()
            self._mask(masks)
            self.rewrap()
            if missed := sorted(late & self.unused.keys()):
                rank_zero_warn(
                    f"steps have used {listed(missed, 90)}, but the training step as it is run to find channels does "
                    f"not: what feeds them may be cut, and then they fail. Exclude that."
                )

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the weights, in plain types."""
        saved = self.module.state_dict().keys()
        tensors = {**self.tensors, **loose_tensors(self.module)}
        return {
            "original": dict(self.original),
            "positions": dict(self.positions),
            "masks": {name: mask.clone() for name, mask in self.masks.keep.items()},
            "weights": self.weights.state_dict(),
            "origin": {name: value.clone() for name, value in self.origin.items()},
            **self._lasting(),
            "whole": dict(self.whole),
            "known": self._known.plain(),
            "unsaved": {n: tensors[n].detach().cpu().clone() for n in self._cut if n not in saved and n in tensors},
        }

    def _lasting(self) -> dict[str, Any]:
        """What checkpoints of later fits must hold as well, whichever callbacks are in them."""
        return {
            "settings": plain_settings(self._settings, self._original_settings),
            "cut": sorted(self._cut),
            "dims": {name: sorted(dims) for name, dims in self._dims.items()},
        }

    def widths(self) -> dict[str, int]:
        """Number of units of each original group that are not off."""
        return self.with_others(self.masks.widths)

    def with_others(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Widths of the present groups, with those of original groups that can be cut no further.

        Down to a single channel a group is none any more, and so is one that no run uses just now.
        """
        return {name: widths.get(name, len(self.positions[name])) for name in self.original}

    @property
    def optimizers(self) -> list[Optimizer]:
        """The torch optimizers of the fit, with those that only the module or another optimizer knows of."""
        return list(optimizers_of(self._trainer, self.module))

    def cost_function(self, measure: str) -> Callable[[Mapping[str, int]], float]:
        """Cost of the network with given widths, in ``params``, ``macs`` or ``latency`` (seconds, measured)."""
        costs: dict[str, Callable[[Mapping[str, int]], float]] = {
            "params": self._cost.parameters,
            "macs": self._cost.macs,
            "latency": self._latency_at,
        }
        return costs[measure]

    def _latency_at(self, widths: Mapping[str, int]) -> float:
        keep = {name: torch.arange(widths[name]) for name in self.graph.groups}
        with resized(self.module, self.graph, keep):
            return self._latency()

    def _latency(self) -> float:
        """Measured seconds of one run; that of the first process, so that all decide alike."""
        return float(self._trainer.strategy.broadcast(self.probe.latency(), src=0))

    def totals(self) -> Totals:
        """What the network costs now, masked units counted as long as they are there."""
        return Totals(
            channels=sum(self.with_others(self.graph.widths).values()),
            parameters=self._cost.parameters(self.graph.widths),
            macs=round(self._cost.macs(self.graph.widths)),
            checkpoint_bytes=checkpoint_bytes(self.module.state_dict()),
            latency_seconds=self._latency_if_possible(),
        )

    def _latency_if_possible(self) -> float | None:
        """None for a training step that works in train mode only, as those of detectors do."""
        try:
            return self._latency()
        except TraceError:
            return None

    def average(self, value: Tensor) -> Tensor:
        """Mean over all processes."""
        strategy = self._trainer.strategy
        if strategy.root_device.type == "mps" and value.dtype is torch.float64:
            return value  # there is one process only, and a device that has no such numbers
        mean: Tensor = strategy.reduce(value.to(strategy.root_device), reduce_op="mean")
        return mean

    def hold_masks(self) -> None:
        """Zero what is off, in the weights, in averages of them, and in the optimizers' state."""
        self.mask_weights()
        for copy in shadows(self.module):
            tensors = named_leaves(copy)
            self.masks.apply(tensors)
            self.weights.apply(tensors)
        self.masks.apply_optimizer_state(self.tensors, self.optimizers)
        self.weights.apply_optimizer_state(self.tensors, self.optimizers)

    def remember(self) -> None:
        """Take down what parameters and buffers are now."""
        self.origin = {name: tensor.detach().cpu().clone() for name, tensor in self.tensors.items()}

    def surviving(self) -> dict[str, Tensor]:
        """Bool masks of the entries that belong to no channel that is off, and are not off themselves."""
        kept = {name: torch.ones(tensor.shape, dtype=torch.bool) for name, tensor in self.tensors.items()}
        for name, group in self.graph.groups.items():
            off = ~self.masks.keep[name]
            for slot in group.slots if bool(off.any()) else ():
                kept[slot.tensor].index_fill_(slot.dim, slot.positions(off), False)
        for name, mask in self.weights.keep.items():
            kept[name] &= mask
        return kept

    def living_units(self) -> dict[str, Tensor]:
        """For each group which units still have a weight among those that are zero where they are off; at least one."""
        living = {}
        for name, group in self.graph.groups.items():
            entries = [slot.gather(self.tensors[slot.tensor].detach()) for slot in group.off]
            alive = torch.stack([(part != 0).any(1) for part in entries]).any(0).cpu() if entries else None
            if alive is not None:
                alive[0] |= not bool(alive.any())
                living[name] = alive
        return living

    def mask_weights(self) -> None:
        """Zero what is off."""
        self.masks.apply(self.tensors)
        self.weights.apply(self.tensors)

    def mask_gradients(self) -> None:
        """Zero the gradients of what is off."""
        self.masks.apply_gradients(self.tensors)
        self.weights.apply_gradients(self.tensors)

    def broadcast(self, keep: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the first process has chosen."""
        return self._trainer.strategy.broadcast(keep, src=0)

    def rewrap(self) -> None:
        """Give the strategy a wrapper that knows the parameters as they are now.

        To be called whenever the network may have been resized, be it only for a trial: a parameter that was gets a
        new gradient accumulator, and the hooks of DDP's reducer hang on the old one.
        """
        rewrap(self._trainer)

    def shrink(self, keep: Mapping[str, Tensor], verify: bool) -> Shrunk:
        """Remove units physically in all processes, with everything that hangs on the module, and trace again.

        Afterwards :meth:`rewrap` is due.

        Raises:
            ShrinkError: If the result is not proven exact in every process; then nothing was changed in any.
        """
        before = integer_settings(self.module)
        names = sorted(keep)

        def agree(blamed: Sequence[str]) -> list[str]:
            shares = self.average(torch.tensor([float(name in blamed) for name in names]))
            return [name for name, share in zip(names, shares.tolist(), strict=True) if share > 0]

        self.followers.moved()
        result = shrink(self.module, self.graph, keep, self.optimizers, verify, agree)
        if not result.cuts:
            return result
        self.followers.part(self.graph.groups, keep)
        self.followers.take_down()
        for copy in shadows(self.module):
            tensors = {**named_leaves(copy), **loose_tensors(copy)}
            resize(tensors, {name: cuts for name, cuts in result.cuts.items() if name in tensors})
            write_settings(copy, result.settings)
        self.weights.cut(result.cuts)
        self.origin.update({n: read(self.origin[n], axes) for n, axes in result.cuts.items() if n in self.origin})
        kept = self.graph.widths
        kept.update({name: int(torch.ones(kept[name])[units].sum()) for name, units in keep.items()})
        left = {name: self.positions[name][units] for name, units in keep.items() if name in self.positions}
        self.positions.update(left)
        self.follow_resize(before, result.settings, result.cuts)
        # What the smaller network does not let go any more is as wide as it was left.
        self.whole.update({n: width for n, width in kept.items() if width > 1 and n not in self.graph.groups})
        return result

    def follow_resize(
        self,
        before: Mapping[Setting, int],
        settings: Mapping[Setting, int],
        cuts: Mapping[str, Sequence[tuple[int, Tensor]]],
    ) -> None:
        """Take note of a resize of the module, and trace it again.

        Args:
            before: All integer settings of its modules as they were before.
            settings: Those that were changed, as they are now.
            cuts: Positions that were read along dimensions of the tensors that were resized.
        """
        self._settings.update(settings)
        self._original_settings = {**{s: before[s] for s in settings}, **self._original_settings}
        self._cut.update(cuts)
        self._known = self._known.after(cuts)
        leave_behind(self.module, self._lasting())
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        self._trace()

    def give_up(self, problem: ShrinkError) -> bool:
        """From now on keep the groups whole that could not be cut; returns whether there are any."""
        blamed = {name: self.graph.widths[name] for name in problem.groups if name in self.graph.groups}
        if not blamed:
            return False
        self.whole.update(blamed)
        masks = self.masks.keep
        self._trace()
        self._mask(masks)
        return True

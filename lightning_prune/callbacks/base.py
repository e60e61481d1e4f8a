"""The one lifecycle of all pruning callbacks."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_prune.budget import check_fraction
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.support import length_of, position_of, refuse_unsupported, say, shadows
from lightning_prune.checkpoint import VERSION, OnLoad, OnSave, plain_settings
from lightning_prune.choices import unknown_name
from lightning_prune.errors import ConfigurationError
from lightning_prune.probe import Probe
from lightning_prune.probe.data import NoBatchError
from lightning_prune.reinit import Keep, Reinit, ReinitName, reinit_from
from lightning_prune.report import GroupWidth, PruneReport, Request, Round, Totals
from lightning_prune.schedules import Schedule, ScheduleName, schedule_from

Shrink = Literal["rounds", "end", "never"]


class PruningCallback(Callback, ABC):
    """Base of the callbacks that decide what goes: rounds on a schedule, masks, shrinking, checkpoints, report.

    A subclass scores and selects in :meth:`select`; everything else has a default. See
    :class:`~lightning_prune.ChannelPruning` for the arguments.
    """

    def __init__(
        self,
        remove: float,
        of: str,
        schedule: ScheduleName | Schedule,
        reinit: ReinitName | Reinit,
        shrink: Shrink,
        verify: bool,
        recalibrate: int,
        seed: int,
        directory: str | None,
    ) -> None:
        """Check what can be checked without a network."""
        self.remove = check_fraction(remove)
        self.of = of
        self.schedule = schedule
        self.reinit = reinit
        self.shrink = shrink
        self.verify = verify
        self.recalibrate = recalibrate
        self.seed = seed
        self.directory = directory
        self._schedule = schedule_from(schedule)
        self._reinit = reinit_from(reinit)
        if shrink not in ("rounds", "end", "never"):
            raise unknown_name("shrink", shrink, ["rounds", "end", "never"])
        if recalibrate < 0:
            raise ConfigurationError(f"recalibrate is a number of batches, so at least 0, but is {recalibrate}.")
        self._record: dict[str, Any] = {}
        self._module: weakref.ref[LightningModule] | None = None
        self._network: Network | None = None
        self._probe: Probe | None = None
        self._handles: list[RemovableHandle] = []
        self._report: PruneReport | None = None

    # What a method decides -------------------------------------------------------------------------------------------

    @abstractmethod
    def select(self, network: Network, level: float) -> dict[str, Tensor]:
        """Choose the units to keep.

        Args:
            network: The network as it is.
            level: Share of the budget that must be reached by this round, in (0, 1].

        Returns:
            For each group that may be cut a bool mask of shape ``[units]``, True = keep.
        """

    def prepare(self, network: Network) -> None:
        """Look at the network once before training; raise if the budget cannot work on it."""

    @property
    def report(self) -> PruneReport:
        """What was asked and what was reached, once a fit has ended.

        Raises:
            ConfigurationError: Before that.
        """
        if self._report is None:
            raise ConfigurationError("there is no report before the first fit with this callback has ended")
        return self._report

    # The lifecycle ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        others = [c for c in trainer.callbacks if isinstance(c, PruningCallback) and c is not self]  # type: ignore[attr-defined]
        if others:
            names = ", ".join(type(c).__name__ for c in (self, *others))
            raise ConfigurationError(f"only one callback can decide what is pruned in a fit, but there are: {names}")
        if stage == "fit":
            refuse_unsupported(trainer, self.shrink != "never")
        if self._module is None or self._module() is not pl_module:
            self._module = weakref.ref(pl_module)
            self._record.clear()
        copies = shadows(trainer, pl_module)
        pl_module.on_load_checkpoint = OnLoad(pl_module, self._record, copies)  # type: ignore[method-assign]
        pl_module.on_save_checkpoint = OnSave(pl_module, self._record)  # type: ignore[method-assign]

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for name in ("on_load_checkpoint", "on_save_checkpoint"):
            pl_module.__dict__.pop(name, None)
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._network = self._probe = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._probe = Probe(trainer, pl_module)
        if warning := self._schedule.check(length_of(trainer)):
            rank_zero_warn(warning)
        try:
            self._begin(trainer, pl_module)
        except NoBatchError:
            if pl_module.example_input_array is not None:
                raise
            return
        self._round_if_due(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._round_if_due(trainer)
        if self._record:
            for name in ("removed", "channels", "parameters", "macs"):
                pl_module.log(f"prune/{name}", float(self._record["now"][name]), rank_zero_only=False)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert self._probe is not None
        self._probe.observe(batch)
        if self._network is None:
            self._begin(trainer, pl_module)
        self._round_if_due(trainer, batch_idx)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._network is not None:
            self._network.masks.apply_gradients(self._network.tensors)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = self._network
        if network is None:
            return
        if self.shrink == "end":
            self._cut(trainer, network, network.masks.keep)
            self._note(network)
        self._report = self._make_report(network)
        say(trainer, self._report.table())
        directory = self._output_directory(trainer)
        if directory is not None:
            trainer.save_checkpoint(directory / "pruned.ckpt", weights_only=False)
            if trainer.is_global_zero:
                self._report.save(directory)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # Steps of the lifecycle ------------------------------------------------------------------------------------------

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trace the network; start the record, or go on with the one that a checkpoint brought."""
        assert self._probe is not None
        network = Network(trainer, pl_module, self._probe)
        if not self._record:
            totals = network.totals()
            self._record.update(
                version=VERSION,
                level=0.0,
                original=network.graph.widths,
                before=asdict(totals),
                rounds=[],
            )
        else:
            masks = {name: torch.as_tensor(mask) for name, mask in self._record["masks"].items()}
            network.masks.set({name: mask for name, mask in masks.items() if name in network.graph.groups})
        self._record["original"] = {**network.graph.widths, **self._record["original"]}
        if not network.graph.groups and self._record["level"] == 0:
            rank_zero_warn(self._nothing_prunable(network))
        else:
            self.prepare(network)
        self._network = network
        self._note(network)
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in trainer.optimizers]

    @staticmethod
    def _nothing_prunable(network: Network) -> str:
        reasons = "; ".join(f"{path}: {reason}" for path, reason in network.graph.refused[:5])
        return f"nothing in {type(network.module).__name__} can be pruned, training goes on without it ({reasons})"

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._network is not None:
            self._network.masks.apply(self._network.tensors)

    def _round_if_due(self, trainer: Trainer, batch_idx: int = 0) -> None:
        network = self._network
        if network is None or not network.graph.groups:
            return
        level = self._schedule.level(position_of(trainer, batch_idx), self.remove)
        if level > self._record["level"]:
            self._round(trainer, network, level)

    def _round(self, trainer: Trainer, network: Network, level: float) -> None:
        """Select, mask, shrink, reinitialise, re-estimate, and take note."""
        keep = trainer.strategy.broadcast(self.select(network, level), src=0)
        if self.shrink == "rounds":
            self._cut(trainer, network, keep)
        else:
            network.masks.set(keep)
            network.hold_masks()
        self._reinitialise(network)
        if self.recalibrate:
            network.probe.reestimate_batch_norm(self.recalibrate)
        self._record["level"] = level
        self._note(network)
        removed = self._record["now"]["removed"]
        self._record["rounds"].append([trainer.current_epoch, trainer.global_step, removed])
        say(trainer, f"pruned {removed:.1%} of the {self.of} so far (epoch {trainer.current_epoch})")

    def _reinitialise(self, network: Network) -> None:
        if isinstance(self._reinit, Keep):
            return
        kept = self._reinit(network.module, list(network.tensors), self.generator("reinit"))
        if kept:
            rank_zero_warn(f"these parameters have no reset_parameters of their own and were kept: {', '.join(kept)}")
        for optimizer in network.optimizers:
            optimizer.state.clear()
        network.masks.apply(network.tensors)

    def _cut(self, trainer: Trainer, network: Network, keep: Mapping[str, Tensor]) -> None:
        network.shrink(keep, self.verify)

    def generator(self, purpose: str) -> torch.Generator:
        """A source of randomness that is the same in all processes and in a resumed run."""
        rounds = len(self._record["rounds"])
        return torch.Generator().manual_seed(hash((self.seed, rounds, sum(map(ord, purpose)))) % 2**63)

    def _note(self, network: Network) -> None:
        """Bring the record up to date; it is what goes into checkpoints."""
        kept = network.masks.widths
        now = {measure: network.cost_function(measure)(kept) for measure in ("params", "macs")}
        self._record.update(
            masks={name: mask.clone() for name, mask in network.masks.keep.items()},
            settings=plain_settings(network.settings),
            now={
                "removed": self.removed(network),
                "channels": sum(kept.values()),
                "parameters": now["params"],
                "macs": now["macs"],
            },
        )

    def removed(self, network: Network) -> float:
        """Fraction removed so far, in the measure of the budget."""
        return 0.0

    def _make_report(self, network: Network) -> PruneReport:
        kept, before = network.masks.widths, Totals(**self._record["before"])
        notes = []
        if any(not bool(mask.all()) for mask in network.masks.keep.values()):
            notes.append("masks only: nothing got smaller or faster; set shrink='end' or shrink='rounds' for that")
        return PruneReport(
            groups=tuple(GroupWidth(n, width, kept.get(n, 1)) for n, width in self._record["original"].items()),
            before=before,
            after=network.totals(),
            requested=Request(self.remove, self.of),
            reached=self.removed(network),
            refused=tuple(network.graph.refused),
            notes=tuple(notes),
            history=tuple(Round(int(epoch), int(step), float(share)) for epoch, step, share in self._record["rounds"]),
        )

    def _output_directory(self, trainer: Trainer) -> Path | None:
        checkpoint = trainer.checkpoint_callback
        found = self.directory or getattr(checkpoint, "dirpath", None)
        return Path(found) if found is not None else None

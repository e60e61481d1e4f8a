"""The one lifecycle of all pruning callbacks."""

from __future__ import annotations

import os
import weakref
import zlib
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_prune.budget import check_fraction
from lightning_prune.callbacks.beginning import warn_of_nothing, warn_of_the_unseen
from lightning_prune.callbacks.method import PruningMethod
from lightning_prune.callbacks.monitors import Monitoring, Monitors
from lightning_prune.callbacks.naming import Patterns, as_patterns
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.outcome import (
    log_final_metrics,
    log_metrics,
    make_report,
    save_outcome,
    warn_of_failure,
    warn_of_mixing,
    warn_of_the_end,
)
from lightning_prune.callbacks.rewinding import rewind, taken_down
from lightning_prune.callbacks.steps import Steps
from lightning_prune.callbacks.support import (
    check_schedule,
    last_position_of,
    length_of,
    position_of,
    refuse_own_averages,
    refuse_unsupported,
    say,
    shadows,
    steps_by_itself,
)
from lightning_prune.checkpoint import VERSION, put_record, unwrap_hooks, wrap_hooks
from lightning_prune.choices import check_at_least, check_switches, unknown_name
from lightning_prune.errors import ConfigurationError, PruneError, ShrinkError
from lightning_prune.graph.analysis import Norms
from lightning_prune.probe import Probe
from lightning_prune.reinit import Keep, Reinit, ReinitName, reinit_from
from lightning_prune.reinit.targets import not_frozen
from lightning_prune.report import PruneReport, Request
from lightning_prune.schedules import Position, Schedule, ScheduleName, schedule_from
from lightning_prune.surgery.optimizer_state import leaves_zeros

Shrink = Literal["rounds", "end", "never"]


class PruningCallback(PruningMethod, Callback):
    """Base of the callbacks that decide what goes: rounds on a schedule, masks, shrinking, checkpoints, report.

    What a subclass gives is in :class:`~lightning_prune.callbacks.method.PruningMethod`. Methods that choose channels
    start from :class:`~lightning_prune.callbacks.groups.ChannelCallback`. See
    :class:`~lightning_prune.ChannelPruning` for the arguments.
    """

    def __init__(
        self,
        remove: float,
        of: str,
        schedule: ScheduleName | Schedule,
        reinit: ReinitName | Reinit,
        shrink: Shrink,
        norms: Norms,
        verify: bool,
        recalibrate: int,
        seed: int,
        directory: str | None,
        inner: Patterns | None = None,
        monitors: Monitors = "keep",
    ) -> None:
        """Check what can be checked without a network."""
        self.remove = check_fraction(remove)
        self.of = of
        self.schedule = schedule
        self.reinit = reinit
        self.shrink = shrink
        self.norms = norms
        self.verify = verify
        self.recalibrate = recalibrate
        self.seed = seed
        self.directory = directory
        self.inner = as_patterns("inner", inner)
        self.monitors = monitors
        self._schedule = schedule_from(schedule)
        self._reinit = reinit_from(reinit)
        if shrink not in ("rounds", "end", "never"):
            raise unknown_name("shrink", shrink, ["rounds", "end", "never"])
        if norms not in ("exact", "approximate"):
            raise unknown_name("norms", norms, ["exact", "approximate"])
        check_at_least(0, whole=True, recalibrate=recalibrate, seed=seed)
        check_switches(verify=verify)
        if not isinstance(directory, (str, os.PathLike, type(None))):
            raise ConfigurationError(f"directory must be the path of a folder or None, but is {directory!r}.")
        self._record = {}
        self._module: weakref.ref[LightningModule] | None = None
        self._network: Network | None = None
        self._probe: Probe | None = None
        self._handles: list[RemovableHandle] = []
        self._optimizer_steps = Steps()
        self._monitoring = Monitoring(monitors)
        self._observing = self._works = self._warned_of_steps = False
        self._logged_epoch = -1
        self._report: PruneReport | None = None

    @property
    def report(self) -> PruneReport:
        """What was asked and what was reached, once a fit has ended.

        Raises:
            ConfigurationError: Before that.
        """
        if self._report is None:
            raise ConfigurationError(
                "there is no report until a fit with this callback has come to its end. If it was trained in processes "
                "of its own (ddp_spawn, ddp_fork), it is in report.json, beside the fit's checkpoints or in directory."
            )
        return self._report

    @property
    def kept(self) -> dict[str, Tensor]:
        """Numbers of the units that are left of each channel group, in the order of before any pruning.

        What is masked is not among them, and what has grown has the number of what it was copied from. They are those
        after the latest round, also when the fit is over.

        Raises:
            ConfigurationError: Before a fit has begun.
        """
        if "positions" not in self._record:
            raise ConfigurationError("there is no channel group before a fit with this callback has begun.")
        positions: dict[str, Tensor] = self._record["positions"]
        masks: dict[str, Tensor] = self._record["masks"]
        return {n: units[masks[n]] if n in masks else units for n, units in positions.items()}

    # The lifecycle ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        deciding = [c for c in trainer.callbacks if isinstance(c, (PruningCallback, ModelPruning))]  # type: ignore[attr-defined]
        if len(deciding) > 1:
            names = ", ".join(type(callback).__name__ for callback in deciding)
            raise ConfigurationError(
                f"only one callback can decide what is pruned in a fit, but there are {len(deciding)}: {names}. Keep "
                f"one of them, or fit once with each: channels first, as nothing keeps single weights off in a later "
                f"fit."
            )
        if stage == "fit":
            refuse_unsupported(trainer, self.shrink != "never")
            self._report = None
            self._observing = self._works = False
            self._monitoring.begin()
        if self._module is None or self._module() is not pl_module:
            self._module = weakref.ref(pl_module)
            self._record.clear()
        wrap_hooks(pl_module, self._record, shadows)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Those that save now do it before the module forgets of its record, not after: doing it twice does no harm.
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                callback.on_exception(trainer, pl_module, exception)
        if self._network is not None:
            warn_of_failure(self._record, exception)
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        """Leave nothing of ours on the module and its optimizers."""
        unwrap_hooks(pl_module)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._network = self._probe = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the callback takes along: nothing of the running fit."""
        return {
            **self.__dict__,
            "_module": None,
            "_network": None,
            "_probe": None,
            "_handles": [],
            "_optimizer_steps": Steps(),
        }

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # The module's own hook does this too, for files of weights only; but not after an exception or the fit's end.
        put_record(checkpoint, self._record)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._probe = Probe(trainer, pl_module)
        if self._record.get("level", 0.0) < 1:
            self.check_length(length_of(trainer))
            check_schedule(trainer, self._schedule)
        # Batches of a new loader are preferred to those that training sees: a resumed fit gets the same ones.
        self._observing = not self._probe.ready()
        self._logged_epoch = -1
        if not self._observing:
            self._begin(trainer, pl_module)
            self._round_if_due(trainer, position_of(trainer))

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._network is not None:
            self._network.refresh()
            self._network.mask_weights()
            warn_of_mixing(self._network)
        self._round_if_due(trainer, position_of(trainer))
        self._hold_back_monitors(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hold_back_monitors(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._optimizer_steps.begin_batch()
        if self._observing:
            assert self._probe is not None
            self._probe.observe(batch)
            if self._network is None:
                self._begin(trainer, pl_module)
        # Logged from this hook alone: Lightning tells values of the same name apart by hook, and a fit that is resumed
        # in the middle of an epoch does not come by the start of that epoch.
        if self._round_if_due(trainer, position_of(trainer, batch_idx)) or self._logged_epoch != trainer.current_epoch:
            log_metrics(trainer, pl_module, self._record["now"])
            self._logged_epoch = trainer.current_epoch
        if self._network is not None and self._works:
            self.before_batch(self._network, position_of(trainer, batch_idx))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._optimizer_steps.go_backward()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._network is not None and self._works and self._optimizer_steps.announce(trainer, optimizer):
            self.before_masking(self._network, optimizer)
            self._network.mask_gradients()
            self.before_step(self._network, optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._network is None:
            return
        # A step that was announced and not taken, because another hook kept the optimizer from it.
        if self._optimizer_steps.announced is not None:
            self._after_step(self._optimizer_steps.announced, (), {})
        # The module may have moved its weights by hand.
        elif self._works and not self._optimizer_steps.seen and not steps_by_itself(trainer):
            self._network.mask_weights()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = self._network
        if network is None:
            return
        network.refresh()
        warn_of_mixing(network)
        # What was due after the last batch had started.
        changed = self._round_if_due(trainer, last_position_of(trainer))
        if self.always_finishes and self._record["level"] < 1 and self.can_prune(network):
            self._round(trainer, network, 1.0)
            changed = True
        if self.shrink == "end" and self._works:
            self.before_the_end(network)
            self._note(network)
            changed |= self._shrink_at_end(network)
        if changed:
            log_final_metrics(trainer, self._record["now"])
        request = Request(self.goal, self.of)
        self._report = make_report(self._record, network, request, self.notes(network) if self._works else [])
        say(trainer, self._report.table())
        say(trainer, save_outcome(trainer, self._report, self.directory))
        if self._works:
            warn_of_the_end(trainer, self._record, self._monitoring)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A fit resumed from the checkpoint of its very end has no batch left, and Lightning calls no hook of training
        # in it. The process that wrote the checkpoint may have died before it came to what is due at the end.
        if self._network is not None or not self._record:
            return
        self._probe = Probe(trainer, pl_module)
        if self._probe.ready():
            self._begin(trainer, pl_module)
            self.on_train_end(trainer, pl_module)
        else:
            rank_zero_warn(
                "this fit had no batch left to train on, and its data cannot be looked at without training: nothing "
                "was removed at its end, and there is no report"
            )

    # Steps of the lifecycle ------------------------------------------------------------------------------------------

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trace the network; start the record, or go on with the one that an earlier fit or a checkpoint left."""
        assert self._probe is not None
        method = type(self).__name__
        if self._record.get("method", method) != method:
            raise ConfigurationError(
                f"this fit goes on from a checkpoint that {self._record['method']} has written, but has {method} for a "
                f"callback. Resume with {self._record['method']}, or load the file with load_pruned and start a new "
                f"fit with {method}."
            )
        if pl_module.example_input_array is not None:
            self._probe.example().run()  # says it if that does not fit
        network = Network(trainer, pl_module, self._probe, self._record, self.norms, self.inner or ())
        if not self._record:
            try:
                self._start_record(network)
            except PruneError:
                self._record.clear()
                raise
        self._network = network
        self._works = self.can_prune(network)
        if self._works and self._record["level"] >= 1:
            say(trainer, "no round is left, as all that was to go is gone already; a new callback would prune more")
        if self._works:
            self.resume(network)
        network.rewrap()
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in network.optimizers]
        self._warned_of_steps = False

    def _start_record(self, network: Network) -> None:
        fresh = {"version": VERSION, "level": 0.0, "target": 0.0, "rounds": [], "before": asdict(network.totals())}
        self._record.update(fresh, method=type(self).__name__, original=dict(network.original))
        if not self.can_prune(network):
            warn_of_nothing(network)
        else:
            if self.shrink == "rounds":
                refuse_own_averages(network.module, network.used)
            warn_of_the_unseen(network)
            self.prepare(network)
            if self._reinit.needs_origin:
                network.remember()
        self._note(network)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # With its gradients masked most optimizers leave nothing to undo, and to look costs as much as to mask.
        announced, left_out = self._optimizer_steps.end(optimizer)
        if self._network is None or not self._works:
            return
        if not (announced and leaves_zeros(optimizer)):
            self._network.mask_weights()
        self._network.note_late_use()
        if not any(optimizer is known for known in self._network.module.trainer.optimizers):
            self._warn_of_unknown(optimizer)
        elif not left_out:  # a fused optimizer has been called even so, and has moved nothing
            self.after_step(self._network, optimizer)

    def _warn_of_unknown(self, optimizer: Optimizer) -> None:
        """Warn of a step that neither was announced nor belongs to one that was, if that matters."""
        if self._optimizer_steps.announced is None and self.acts_at_steps and not self._warned_of_steps:
            self._warned_of_steps = True
            rank_zero_warn(
                f"{type(optimizer).__name__} steps without Lightning knowing: what {type(self).__name__} does at each "
                f"step does not take place. Return it from configure_optimizers, and step it by optimizer.step()."
            )

    def _round_if_due(self, trainer: Trainer, position: Position) -> bool:
        """Do now what should be done by this position and is not, according to the record."""
        network = self._network
        if network is None or not self.can_prune(network):
            return False
        self._take_down_if_due(trainer, network)
        level = self._schedule.level(position, self.remove)
        if level <= self._record["level"] and level * self.remove <= self._record["target"]:
            return False
        self._round(trainer, network, level)
        return True

    def _round(self, trainer: Trainer, network: Network, level: float) -> None:
        """Select, mask, shrink, reinitialise, re-estimate, and take note."""
        if self.rewind_to is not None and "rewind" not in self._record:
            raise ConfigurationError(
                f"the first round is at step {trainer.global_step}, before step {self.rewind_to} that it should rewind "
                f"to. Train longer, have fewer rounds, or give rewind_to an earlier step."
            )
        network.refresh()
        before = self._record["now"]["removed"]
        self.carry_out(network, level)
        self._reinitialise(network)
        if self.rewind_to is not None:
            rewind(trainer, network.module, self._record["rewind"])
            network.hold_masks()
        if self.recalibrate:
            network.probe.reestimate_batch_norm(self.recalibrate)
        self._record.update(level=level, target=level * self.remove)
        self._note(network)
        network.rewrap()
        removed = self._record["now"]["removed"]
        self._record["rounds"].append([trainer.current_epoch, trainer.global_step, removed])
        self._monitoring.follow_round(trainer, level, removed != before)
        if removed != before:
            say(trainer, f"pruned {removed:.1%} of the {self.of} so far (epoch {trainer.current_epoch})")

    def _hold_back_monitors(self, trainer: Trainer) -> None:
        if self._works:
            self._monitoring.hold_back(trainer, self._record["level"])

    def _take_down_if_due(self, trainer: Trainer, network: Network) -> None:
        """Remember the network, its optimizers and schedules at the step that is rewound to."""
        if self.rewind_to is None or "rewind" in self._record or trainer.global_step < self.rewind_to:
            return
        network.remember()
        self._record["rewind"] = taken_down(trainer, network.module)
        self._record.update(network.state())

    def _shrink_at_end(self, network: Network) -> bool:
        """Remove what is masked, as far as that is possible; whether anything has changed."""
        before = len(network.whole)
        for name, leader in network.followers.left_behind(network.graph.groups, network.masks.keep).items():
            rank_zero_warn(f"{name} seems to follow {leader} in a hook, but does not lose the same channels")
        while True:
            try:
                keep = network.masks.keep
                cuts = network.shrink(keep, self.verify).cuts
                self.follow(keep, cuts)
                break
            except ShrinkError as problem:
                if not network.give_up(problem):
                    raise
                rank_zero_warn(f"{problem}. The masked channels of {', '.join(problem.groups)} stay, as zeros.")
        if not cuts and len(network.whole) == before:
            return False
        self._note(network)
        network.rewrap()
        return True

    def _reinitialise(self, network: Network) -> None:
        if isinstance(self._reinit, Keep):
            return
        names = not_frozen(network.module, network.tensors)
        kept = self._reinit(network.module, names, self.generator("reinit"), network.origin, network.surviving())
        if kept:
            rank_zero_warn(
                f"no new value is known for {', '.join(kept)} (their modules have no reset_parameters): they were kept"
            )
        for optimizer in network.optimizers:
            optimizer.state.clear()
        network.module.zero_grad()  # what has accumulated so far is of the weights that were replaced
        network.mask_weights()

    def generator(self, purpose: str) -> torch.Generator:
        """A source of randomness that is the same in all processes and in a resumed run."""
        rounds = len(self._record["rounds"])
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {rounds} {purpose}".encode()))

    def _note(self, network: Network) -> None:
        """Bring the record up to date; it is what goes into checkpoints."""
        kept = network.masks.widths
        now = {
            "removed": float(self.removed(network)),
            "channels": sum(network.widths().values()),
            "parameters": network.cost_function("params")(kept),
            "macs": network.cost_function("macs")(kept),
        }
        self._record.update(network.state(), now=now)

"""Searching for the number of units of each layer while the network trains."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lightning import LightningModule, Trainer
from typing_extensions import override

from lightning_prune.callbacks.channels import ChannelPruning
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.support import say, shadows
from lightning_prune.callbacks.width_record import Trial, WidthRecord, WidthSearch
from lightning_prune.checkpoint import original_settings_of, resize_to
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.program import forget_caches
from lightning_prune.graph.tracer import named_leaves
from lightning_prune.graph.unregistered import loose_tensors
from lightning_prune.schedules import OneShot, Schedule, ScheduleName


def budget_for(remove: float | None, search: WidthSearch | None) -> float:
    """What is to be removed: half if nothing is said; nothing yet before a search.

    Raises:
        ConfigurationError: If there is both a budget and a search.
    """
    if search is None:
        return 0.5 if remove is None else remove
    if remove is not None:
        raise ConfigurationError(
            f"a search finds out how much can go, but remove={remove} says how much must. Give one of them; the most "
            f"that a search may take is its argument `most`."
        )
    return 0.0


def schedule_for(schedule: ScheduleName | Schedule, search: WidthSearch | None) -> ScheduleName | Schedule:
    """When rounds are due; with a search from the end of its first cycle on."""
    return schedule if search is None else OneShot(search.cycle, "epoch")


class WidthSearching(ChannelPruning):
    """Channel pruning whose budget may be found by a search; see :class:`WidthSearch`.

    While it searches, ``remove`` is what it has asked for so far, and in the end what it has found.
    """

    search: WidthSearch | None = None
    _since = 0.0

    @property
    def widths_tried(self) -> WidthRecord | None:
        """The record of the search so far; None if there was none or its first cycle is not over."""
        state = self.learnt.get("search")
        if self.search is None or not state or not state["trials"]:
            return None
        trials = [Trial(*trial) for trial in state["trials"]]
        return WidthRecord(self.search.monitor, trials, self.search.chosen([trial.value for trial in trials]))

    @override
    def prepare(self, network: Network) -> None:
        if self.search is not None:
            self.remove = self.search.most  # be sure that it can be reached
            self.learnt["search"] = {"remove": 0.0, "epoch": 0, "trials": [], "over": False}
        super().prepare(network)

    @override
    def resume(self, network: Network) -> None:
        super().resume(network)
        if self.search is not None:
            self.remove = self.learnt["search"]["remove"]
            self._since = time.monotonic()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._measure(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            self._measure(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        changed = self._cycle_if_over(trainer, False)
        super().on_train_epoch_start(trainer, pl_module)
        if changed:
            self._since = time.monotonic()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._cycle_if_over(trainer, True)
        super().on_train_end(trainer, pl_module)
        record = self.widths_tried
        folder = self.directory or getattr(trainer.checkpoint_callback, "dirpath", None)
        if record is None:
            return
        say(trainer, record.table())
        if folder is not None and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            record.save(folder)

    def _measure(self, trainer: Trainer) -> None:
        """Take the value down now: a resumed fit does not know what was logged before."""
        state = self.learnt.get("search")
        if self.search is not None and state and self.search.monitor in trainer.callback_metrics:
            state["value"] = float(trainer.callback_metrics[self.search.monitor])

    def _cycle_if_over(self, trainer: Trainer, last: bool) -> bool:
        """Judge the present width if it was trained for a cycle, and go on to the next; whether a cycle was over."""
        network, search, state = self._network, self.search, self.learnt.get("search")
        if network is None or search is None or not state or state["over"]:
            return False
        state["epoch"] = min(state["epoch"], trainer.current_epoch)  # of a fit that was broken off, another begins at 0
        complete: bool = trainer.current_epoch - state["epoch"] >= search.cycle
        if complete:
            self._try(trainer, network, search, state)
        values = [trial[1] for trial in state["trials"]]
        state["over"] = last or search.misses(values) >= search.patience or state["remove"] >= search.most
        if state["over"] and "best" in state:
            best = state.pop("best")
            if best["place"] != len(values) - 1 or not complete:
                self._go_back(trainer, network, best)
            state["remove"] = best["remove"]
        elif complete and not state["over"]:
            state["remove"] = search.next(state["remove"])
        self.remove = state["remove"]
        return complete

    def _try(self, trainer: Trainer, network: Network, search: WidthSearch, state: dict[str, Any]) -> None:
        """Put the present width on record, with all that is needed to come back if it is the best choice so far."""
        if "value" not in state:
            known = ", ".join(map(repr, trainer.callback_metrics)) or "nothing"
            raise ConfigurationError(
                f"the search for the number of units measures {search.monitor!r}, but that was not logged in the last "
                f"{search.cycle} epochs (logged: {known}). Log it in validation_step, at least once in a cycle, or "
                f"give the search another monitor."
            )
        value = float(network.average(torch.tensor(state.pop("value"), dtype=torch.float64)))
        state["trials"].append([network.widths(), value, time.monotonic() - self._since])
        state["epoch"] = trainer.current_epoch
        if not search.falls_short([trial[1] for trial in state["trials"]]):
            tensors = {**network.tensors, **loose_tensors(network.module)}
            state["best"] = {
                "place": len(state["trials"]) - 1,
                "remove": state["remove"],
                "tensors": {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()},
                "network": network.state(),
            }

    def _go_back(self, trainer: Trainer, network: Network, best: dict[str, Any]) -> None:
        """Give the network the width and the weights that it had before, as if it were loaded from a checkpoint."""
        assert self._probe is not None
        undo = original_settings_of(network.state())
        for module in (network.module, *shadows(network.module)):
            resize_to(module, best["tensors"], best["network"], undo)
            for name, tensor in {**named_leaves(module), **loose_tensors(module)}.items():
                if name in best["tensors"]:
                    with torch.no_grad():
                        tensor.copy_(best["tensors"][name])
            forget_caches(module)
        for optimizer in network.optimizers:
            optimizer.state.clear()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        self._network = Network(trainer, network.module, self._probe, best["network"], self.norms, self.inner or ())
        self._note(self._network)
        self._network.rewrap()
        removed = self._record["now"]["removed"]
        self._record["rounds"].append([trainer.current_epoch, trainer.global_step, removed])
        say(trainer, f"went back to {removed:.1%} of the {self.of} removed, the best choice of the search")

"""What came of a fit: the report, the metrics, and where they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_prune.callbacks.monitors import Monitoring
from lightning_prune.callbacks.network import Network
from lightning_prune.errors import PruneError
from lightning_prune.report import GroupWidth, PruneReport, Request, Round, Totals

_NEAR = 0.005
"""How far from what was requested a fraction may be without a remark."""

_METRICS = {"removed": "max", "channels": "min", "parameters": "min", "macs": "min"}
"""Numbers to log, and how values of one epoch are reduced so that the last one stays: a network never grows."""


def log_metrics(trainer: Trainer, pl_module: LightningModule, now: Mapping[str, float]) -> None:
    """Log the numbers of now through the module, so that loggers and monitoring callbacks see them."""
    if trainer.barebones:
        return
    for name, reduction in _METRICS.items():
        pl_module.log(
            f"prune/{name}", float(now[name]), on_step=False, on_epoch=True, reduce_fx=reduction, rank_zero_only=False
        )


def log_final_metrics(trainer: Trainer, now: Mapping[str, float]) -> None:
    """Hand the numbers of now to the loggers themselves, once the module cannot log any more."""
    for logger in trainer.loggers:
        logger.log_metrics({f"prune/{name}": float(now[name]) for name in _METRICS}, step=trainer.global_step)


def make_report(
    record: Mapping[str, Any], network: Network, requested: Request, notes: Sequence[str] = ()
) -> PruneReport:
    """The report of a fit that has ended, with what the method itself has to remark."""
    kept = network.widths()
    before, after = Totals(**record["before"]), network.totals()
    reached = float(record["now"]["removed"])
    if requested.measure == "latency" and record["rounds"] and before.latency_seconds and after.latency_seconds:
        reached = 1 - after.latency_seconds / before.latency_seconds  # as the table says; each measurement is another
    return PruneReport(
        groups=tuple(GroupWidth(name, width, kept[name]) for name, width in network.original.items()),
        before=before,
        after=after,
        requested=requested,
        reached=reached,
        refused=tuple(network.graph.refused),
        notes=(*notes, *_notes(record, network, requested, reached)),
        weights=tuple(GroupWidth(name, record["eligible"][name], kept) for name, kept in network.weights.kept.items()),
        history=tuple(Round(int(epoch), int(step), float(share)) for epoch, step, share in record["rounds"]),
    )


def _notes(record: Mapping[str, Any], network: Network, requested: Request, reached: float) -> list[str]:
    notes = []
    apart = abs(reached - requested.fraction)
    if record["level"] >= 1 and requested.measure == "latency" and apart > _NEAR:
        notes.append(f"{apart:.1%} from what was requested: latency is measured, at each choice anew")
    elif record["level"] >= 1 and requested.measure != "weights" and apart > _NEAR:
        notes.append(
            f"{apart:.1%} {'less' if reached < requested.fraction else 'more'} than requested: whole channels go, in "
            f"the order of their scores, as round_to, min_channels and what had to stay whole let them, and none of an "
            f"earlier round comes back"
        )
    if record["level"] < 1 and (network.graph.groups or network.weights.keep):
        notes.append("the fit ended before the last round of the schedule, so the budget was not reached")
    if network.weights.keep:
        notes.append(
            "weights that are off are zeros inside tensors, and dense kernels compute with them all the same: only "
            "channels that were removed make the network smaller and faster"
        )
    if any(not bool(mask.all()) for mask in network.masks.keep.values()):
        notes.append("masks only: nothing got smaller or faster; set shrink='end' or shrink='rounds' for that")
    count = sum(group.approximate for group in network.graph.groups.values())
    if count:
        groups = "1 group" if count == 1 else f"{count} groups"
        notes.append(
            f"the channels of {groups} are normalised over, or set the scale of an attention: that follows what is "
            f"left of them, so the network equals the masked one only if it does so there too (norms='approximate')"
        )
    return notes


def save_outcome(trainer: Trainer, report: PruneReport, directory: str | None) -> str:
    """Write the final checkpoint and the report, unless there is no place for them or this is only a trial run.

    Returns:
        What to say of it.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return "nothing was written, as this is a trial run"
    found = directory or getattr(trainer.checkpoint_callback, "dirpath", None)
    if found is None:
        return "nothing was written, as this fit has no folder of checkpoints: give the callback a directory"
    trainer.save_checkpoint(Path(found) / "pruned.ckpt", weights_only=False)
    if trainer.is_global_zero:
        report.save(found)
    return f"written to {found}: pruned.ckpt (load it with load_pruned) and the report"


def warn_of_failure(record: Mapping[str, Any], exception: BaseException) -> None:
    """Warn, where an operator of a network that was cut has failed, that the cut may be why."""
    of_an_operator = isinstance(exception, (RuntimeError, ValueError, IndexError))
    cuts = [step for _, step, removed in record["rounds"] if removed > 0]
    if cuts and of_an_operator and not isinstance(exception, PruneError):
        rank_zero_warn(
            f"the fit failed after channels had gone, since step {cuts[0]}. If the line that failed had not run before "
            f"that (a loss that begins later, a branch taken once in a while), nothing was known of what it joins: "
            f"exclude that, or have the first round after it has run."
        )


def warn_of_mixing(network: Network) -> None:
    """Warn of what began to follow a part of the network after the two had lost different channels."""
    if found := network.followers.mixed():
        name, leader = next(iter(found.items()))
        rank_zero_warn(
            f"{name} has moved though no optimizer has it, so it seems to follow {leader} by now, outside of the "
            f"training step. But {leader} has lost other channels than {name}: unless it is copied whole, the values "
            f"of different channels are mixed ({len(found)} such tensors). Update the one from the other in "
            f"training_step from the beginning, where it is seen, or exclude {leader}."
        )


def warn_of_the_end(trainer: Trainer, record: Mapping[str, Any], monitoring: Monitoring) -> None:
    """Warn of a fit that ended before its last round, and of checkpoints of the best from before the last cut."""
    if record["level"] < 1:
        rank_zero_warn(
            f"the fit ended before the last round of the schedule: {record['now']['removed']:.1%} was removed so far. "
            f"Train longer, have the rounds earlier, or keep early stopping back with monitors='wait'."
        )
    ended_with_a_round = bool(record["rounds"]) and record["rounds"][-1][1] >= trainer.global_step
    anew = "after each round (monitors='reset') or after the last one (monitors='wait')"
    for monitor, path in monitoring.outdated(trainer):
        rank_zero_warn(
            f"the best checkpoint by {monitor} ({path}) is from before the last channels or weights went, so it holds "
            f"a larger network than the fit has ended with. Load pruned.ckpt instead"
            + ("." if ended_with_a_round else f", or have the best chosen anew {anew}.")
        )

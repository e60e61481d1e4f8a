"""What the callbacks ask of a Trainer: how far it is, whether it can carry us, and a line on the screen."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import astuple

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import Position, Schedule

_MANY_ZEROS = 0.1
"""Share of zeros that does not come about by chance."""


def refuse_unsupported(trainer: Trainer, shrinks: bool) -> None:
    """Refuse strategies under which a network cannot change its shape.

    Raises:
        ConfigurationError: With the remedy.
    """
    strategy = trainer.strategy
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise ConfigurationError(
            f"{type(strategy).__name__} shards the parameters, so channels cannot be found or removed under it. Prune "
            f"with strategy='ddp' or on one device, then train the smaller network under this strategy."
        )
    if shrinks and isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ConfigurationError(
            f"{type(strategy).__name__}(start_method={strategy.launcher._start_method!r}) trains in processes of its "
            f"own and afterwards loads their weights into the full-width network of the main process, which cannot "
            f"hold them. Use strategy='ddp' in a script, one device, or shrink='never'."
        )


def refuse_own_averages(module: nn.Module, used: Container[str]) -> None:
    """Refuse averages that a module holds of its own weights, which a cut does not reach.

    Args:
        module: The module.
        used: Names of the parameters that are found by a trace.

    Raises:
        ConfigurationError: With the remedy.
    """
    for name, part in module.named_modules():
        if isinstance(part, AveragedModel) and not any(f"{name}.{n}" in used for n, _ in part.named_parameters()):
            raise ConfigurationError(
                f"{type(module).__name__}.{name} averages weights of the module by itself, which fails once they are "
                f"cut. Use the callback lightning.pytorch.callbacks.WeightAveraging, whose average is cut along, or "
                f"shrink='end'."
            )


def warn_of_zeros(module: nn.Module) -> None:
    """Warn of weights that are zero one by one, as nothing keeps them so."""
    weights = [p.detach() for p in module.parameters() if p.dim() > 1 and p.is_floating_point()]
    zeros = [int((weight == 0).sum()) for weight in weights]
    # Tensors of nothing but zeros are such as begin at zero.
    scattered = sum(count for count, weight in zip(zeros, weights, strict=True) if count < weight.numel())
    share = scattered / max(sum(weight.numel() for weight in weights), 1)
    if share > _MANY_ZEROS:
        rank_zero_warn(
            f"{share:.0%} of the weights are zero one by one, as pruning of single weights leaves them. Nothing keeps "
            f"them so in this fit. Remove channels in a fit before, and single weights in the last."
        )


def refuse_followers(found: Mapping[str, str]) -> None:
    """Refuse a cut that would take other channels of a parameter than of the one that it follows.

    Args:
        found: Names of such parameters, with those of what they follow.

    Raises:
        ConfigurationError: With the remedy.
    """
    for name, leader in found.items():
        raise ConfigurationError(
            f"{name} has moved in this fit though no optimizer has it, so it seems to follow {leader} outside of the "
            f"training step (an average that a hook keeps?). {leader} is to lose channels that {name} would not lose. "
            f"Update the one from the other in training_step, where it is seen; or use the callback "
            f"lightning.pytorch.callbacks.WeightAveraging, whose average is cut along; or exclude {leader}."
        )


def length_of(trainer: Trainer) -> Position:
    """Length of the whole fit; ``inf`` where no end is set or it is not known. Only known once training has started."""
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    steps = math.inf if trainer.max_steps == -1 else float(trainer.max_steps)
    if _automatic(trainer) and math.isfinite(trainer.num_training_batches):
        per_epoch = max(math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches), 1)
        epochs, steps = min(epochs, steps / per_epoch), min(steps, epochs * per_epoch)
    return Position(epochs, steps, 1.0)


def has_no_end(length: Position) -> bool:
    """Whether it is never known which share of a fit of this :func:`length_of` is done."""
    return math.isinf(length.epoch) and math.isinf(length.step)


def warn_of_no_update(every: int, stop: float, length: Position) -> None:
    """Warn where updates, which begin after their first interval, would end before it.

    Args:
        every: Optimizer steps between updates.
        stop: Share of the fit at which they end.
        length: Length of the fit.
    """
    if every >= stop * length.step:
        rank_zero_warn(
            f"the mask never moves: updates are {every} optimizer steps apart, but end after {stop:g} of the "
            f"{length.step:g} steps of this fit. Give every a smaller number, or train longer."
        )


def check_schedule(trainer: Trainer, schedule: Schedule) -> None:
    """Warn of a schedule that does not fit well into the fit.

    Raises:
        ConfigurationError: If it does not fit at all.
    """
    if warning := schedule.check(length_of(trainer)):
        rank_zero_warn(warning)
    if schedule.unit != "step" and math.isinf(trainer.num_training_batches) and trainer.max_steps == -1:
        rank_zero_warn(
            "the training data has no length, so it is not known how far an epoch has come: rounds can only be at the "
            'starts of epochs and at the end. Give the schedule unit="step", or the Trainer max_steps.'
        )


def position_of(trainer: Trainer, batch_idx: int = 0) -> Position:
    """How far the fit has come."""
    batches = trainer.num_training_batches
    inside = batch_idx / batches if math.isfinite(batches) and batches else 0.0
    epoch, step = trainer.current_epoch + inside, trainer.global_step
    # Against the ends that are set, not the estimated ones: a step may take another number of batches in each epoch, or
    # with manual optimization be one of several for the same batch.
    ends = ((epoch, trainer.max_epochs), (step, trainer.max_steps))
    shares = [done / end for done, end in ends if end is not None and end > 0]
    return Position(epoch, step, min(max(shares, default=0.0), 1.0))


def last_position_of(trainer: Trainer) -> Position:
    """How far a fit has come that is over: what was due before its end is due by now, what was due at its end not."""
    return Position(*(done * (1 - 1e-6) for done in astuple(position_of(trainer))))


def _automatic(trainer: Trainer) -> bool:
    return trainer.lightning_module is not None and trainer.lightning_module.automatic_optimization


def steps_by_itself(trainer: Trainer) -> bool:
    """Whether Lightning steps optimizers by itself, so that a batch without a step is one that accumulates."""
    return _automatic(trainer) and bool(trainer.optimizers)


def say(trainer: Trainer, message: str) -> None:
    """Print a message without tearing the progress bar."""
    if not trainer.is_global_zero:
        return
    bar = trainer.progress_bar_callback
    if bar is not None and not getattr(bar, "is_disabled", False):
        bar.print(message)
    else:
        rank_zero_info(message)


def rewrap(trainer: Trainer) -> None:
    """Give a network that was resized a new DDP wrapper, if it has one; the old reducer remembers the old sizes."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        module = strategy.lightning_module
        strategy.model = None
        strategy.model = strategy._setup_model(module)  # type: ignore[arg-type]
        strategy._register_ddp_hooks()
        strategy._pl_static_graph_delay_done = False


def steps_with_plain_gradients(trainer: Trainer, optimizer: Optimizer, went_backward: bool) -> bool:
    """Take the factor off gradients that half precision has scaled; whether the optimizer will step with them at all.

    Most optimizers get them plain by now, but fused ones would take off the factor within their step.

    Args:
        trainer: The trainer.
        optimizer: The optimizer whose step is announced.
        went_backward: Whether this batch has given a loss.

    Returns:
        False if gradients overflowed or the training step gave no loss, so that the step will be left out.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if not isinstance(scaler, torch.amp.GradScaler) or not scaler.is_enabled():
        return True
    if _automatic(trainer) and not went_backward:
        return False
    if getattr(optimizer, "_step_supports_amp_scaling", False) and not scaler._found_inf_per_device(optimizer):
        scaler.unscale_(optimizer)
    overflows = scaler._found_inf_per_device(optimizer).values()
    return bool(overflows) and not any(bool(overflow) for overflow in overflows)


def shadows(pl_module: LightningModule) -> list[LightningModule]:
    """Averages of the module's weights that other callbacks hold, and that must keep its shape.

    Other copies, such as the teacher of a distillation, are not touched.
    """
    trainer = pl_module._trainer
    averages: list[nn.Module] = []
    for callback in trainer.callbacks if trainer is not None else ():  # type: ignore[attr-defined]
        # The one that holds its average as a plain copy; all others wrap it as torch does.
        kind = nn.Module if isinstance(callback, StochasticWeightAveraging) else AveragedModel
        averages += [value for value in vars(callback).values() if isinstance(value, kind)]
    inside = (module for average in averages for module in average.modules())
    return [module for module in inside if module is not pl_module and type(module) is type(pl_module)]

"""What the callbacks ask of a Trainer: how far it is, whether it can carry us, and a line on the screen."""

from __future__ import annotations

import math

from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.nn.parallel import DistributedDataParallel

from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import Position


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
            "this strategy trains in processes of its own and afterwards loads their weights into the full-width "
            "network of the main process, which cannot hold them. Use strategy='ddp' in a script, one device, or "
            "shrink='never'."
        )


def length_of(trainer: Trainer) -> Position:
    """Length of the whole fit; ``inf`` where no end is set. Only known once training has started."""
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    steps = float(trainer.estimated_stepping_batches)
    batches = trainer.num_training_batches
    per_epoch = batches / trainer.accumulate_grad_batches
    if math.isinf(epochs) and math.isfinite(steps) and math.isfinite(per_epoch) and per_epoch > 0:
        epochs = steps / math.ceil(per_epoch)
    return Position(epochs, steps, 1.0)


def position_of(trainer: Trainer, batch_idx: int = 0) -> Position:
    """How far the fit has come."""
    batches = trainer.num_training_batches
    inside = batch_idx / batches if math.isfinite(batches) and batches else 0.0
    epoch, step, length = trainer.current_epoch + inside, trainer.global_step, length_of(trainer)
    shares = [done / whole for done, whole in ((epoch, length.epoch), (step, length.step)) if 0 < whole < math.inf]
    return Position(epoch, step, min(max(shares, default=0.0), 1.0))


def say(trainer: Trainer, message: str) -> None:
    """Print a message without tearing the progress bar."""
    if not trainer.is_global_zero:
        return
    bar = trainer.progress_bar_callback
    if bar is not None and not bar.is_disabled:
        bar.print(message)
    else:
        rank_zero_info(message)


def rewrap(trainer: Trainer) -> None:
    """Give a network that changed its shape a new DDP wrapper; the old reducer remembers the old sizes."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        module = strategy.lightning_module
        strategy.model = None
        strategy.model = strategy._setup_model(module)  # type: ignore[arg-type]
        strategy._register_ddp_hooks()
        strategy._pl_static_graph_delay_done = False


def shadows(trainer: Trainer, pl_module: LightningModule) -> list[LightningModule]:
    """Copies of the module that other callbacks hold (averages of weights, say) and that must keep its shape."""
    from torch.nn import Module

    held = [value for callback in trainer.callbacks for value in vars(callback).values() if isinstance(value, Module)]  # type: ignore[attr-defined]
    inside = (module for value in held for module in value.modules())
    return [module for module in inside if module is not pl_module and type(module) is type(pl_module)]

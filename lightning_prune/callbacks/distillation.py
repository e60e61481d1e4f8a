"""Distillation: a network that learns from others, beside whatever else happens in the fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Union

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from typing_extensions import override

from lightning_prune.callbacks.teachers import Teaching, load_teacher, rebuilt
from lightning_prune.callbacks.watching import check_watchable, extend_step, restore_step
from lightning_prune.choices import unknown_name
from lightning_prune.distillation import Comparison
from lightning_prune.errors import ConfigurationError

Teacher = Union[str, nn.Module]  # noqa: UP007 - jsonargparse reads it
_OWN = ("start", "ema")


class Distillation(Callback):
    """Lets the network learn from teachers too, without a change to the module; works beside any other callback.

    In each training step the teachers see what the network saw, in evaluation mode and without gradients, and the loss
    becomes ``(1 - weight) * loss + weight * distillation``. That of classes is their divergence at a temperature
    (Hinton et al., 2015); of several teachers those count more for a sample that err less on it. That of values is
    their mean squared error. Pruning criteria that look at gradients see those of the module's own loss.

    Args:
        teachers: One or several of: ``"start"``, the network as it is at the start of the fit (it keeps its widths when
            channels are removed); ``"ema"``, the moving average of the network's weights; the path of a checkpoint of
            the same class, pruned or not; or any module that can be called like the network (moved to its device and
            put into evaluation mode).
        weight: Share of the distillation in the loss, in [0, 1].
        temperature: What class scores are divided by.
        task: What the outputs are: class scores (``"classification"``), or any values (``"regression"``).
        dim: Dimension along which the classes lie; default: 1, or, of outputs of three dimensions, what the shape of
            whole numbers in the batch says (the last one in language models).
        output_of: Name of the submodule whose output is compared, and on whose inputs teachers run; default: the module
            itself, called as ``self(...)`` in ``training_step``. Teachers of another class are called themselves.
        labels: Key or position in the batch of the true classes, which several teachers are weighed by; default: the
            only whole numbers in it that have the shape for it.
        teacher_temperature: The higher, the more equally several teachers count; None for equally.
        features: Names of modules that the network and all teachers have, whose features are compared too, by the
            similarities of the samples of a batch (Tung & Mori, 2019), so that widths may differ.
        feature_weight: What that is multiplied with before it is added to the distillation.
        ema_decay: Share of the moving average that stays after each optimizer step.

    Raises:
        ConfigurationError: If an argument is wrong, training is compiled, sharded or optimized manually, or, at the
            first batch, if there is nothing to compare or outputs differ in shape.

    Example:
        >>> import lightning as L
        >>> from lightning_prune import ChannelPruning
        >>> trainer = L.Trainer(callbacks=[ChannelPruning(remove=0.5), Distillation("start")], logger=False)
    """

    def __init__(
        self,
        teachers: Union[Teacher, Sequence[Teacher]] = "start",  # noqa: UP007
        weight: float = 0.5,
        temperature: float = 4.0,
        task: Literal["classification", "regression"] = "classification",
        output_of: str | None = None,
        labels: Union[str, int, None] = None,  # noqa: UP007
        teacher_temperature: float | None = 1.0,
        features: Sequence[str] | None = None,
        feature_weight: float = 1.0,
        ema_decay: float = 0.999,
        dim: int | None = None,
    ) -> None:
        self._wanted: list[Teacher] = [teachers] if isinstance(teachers, (str, nn.Module)) else list(teachers)
        if task not in ("classification", "regression"):
            raise unknown_name("task", task, ["classification", "regression"])
        temperatures = (temperature, 1.0 if teacher_temperature is None else teacher_temperature)
        if not (0 <= weight <= 1 and 0 <= ema_decay < 1 and feature_weight >= 0 and min(temperatures) > 0):
            raise ConfigurationError(
                f"weight must lie in [0, 1], ema_decay in [0, 1), feature_weight be at least 0 and temperatures above "
                f"0, but they are {weight}, {ema_decay}, {feature_weight}, {temperature} and {teacher_temperature}."
            )
        if not self._wanted:
            raise ConfigurationError('there is no teacher: give one, such as "start".')
        self.teachers, self.weight, self.temperature, self.task = teachers, weight, temperature, task
        self.output_of, self.labels, self.teacher_temperature = output_of, labels, teacher_temperature
        self.features, self.feature_weight, self.ema_decay, self.dim = features, feature_weight, ema_decay, dim
        comparison = Comparison(task, temperature, teacher_temperature, labels, dim)
        self._teaching = Teaching(comparison, weight, output_of or "", list(features or ()), feature_weight)
        self._start: LightningModule | None = None
        self._average: AveragedModel | None = None  # an attribute of this class is resized along with the network
        self._others: dict[Teacher, nn.Module] = {}
        self._restored: dict[str, Any] = {}
        self._updated = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()
        check_watchable(trainer, pl_module, [self._teaching.path, *self._teaching.features])
        # A resumed fit may load a smaller network into the module, but the one of its start into this.
        self._start = copy.deepcopy(pl_module) if "start" in self._wanted else None
        self._average, self._restored, self._updated = None, {}, 0
        others = [teacher for teacher in self._wanted if teacher not in _OWN]
        self._others = {t: load_teacher(t, pl_module) if isinstance(t, str) else t for t in others}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._start is not None:
            self._start = rebuilt(self._start, self._restored.get("start")) or copy.deepcopy(pl_module)
        if "ema" in self._wanted:
            self._average = AveragedModel(pl_module, avg_fn=get_ema_avg_fn(self.ema_decay), use_buffers=True)
            self._average.load_state_dict(self._restored.get("ema", self._average.state_dict()))
            self._updated = self._restored.get("updated", 0)
        for name, teacher in self._present().items():
            teacher.to(pl_module.device).eval()
            if missing := set(self._teaching.features) - dict(teacher.named_modules()).keys():
                raise ConfigurationError(
                    f"the teacher {name} has no module {', '.join(sorted(missing))} to compare features of. Leave that "
                    f"out of features, or the teacher out of teachers."
                )
        extend_step(trainer, partial(self._step, trainer))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        restore_step(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        restore_step(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._average is not None and trainer.global_step > self._updated:
            self._average.update_parameters(pl_module)
            self._updated = trainer.global_step

    @override
    def state_dict(self) -> dict[str, Any]:
        held = {name: module for name, module in (("start", self._start), ("ema", self._average)) if module is not None}
        return {**{name: copy.deepcopy(module.state_dict()) for name, module in held.items()}, "updated": self._updated}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def _step(self, trainer: Trainer, step: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        return self._teaching.step(trainer, self._present(), step, args)

    def _present(self) -> dict[str, nn.Module]:
        """The teachers by what to call them."""
        own: dict[Teacher, Any] = {"start": self._start, "ema": getattr(self._average, "module", None)}
        known = {**own, **self._others}
        names = [teacher if isinstance(teacher, str) else type(teacher).__name__ for teacher in self._wanted]
        return {f"{names[i]} (number {i + 1})": known[teacher] for i, teacher in enumerate(self._wanted)}

"""Teachers, and what they add to the loss of training steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from lightning_prune.callbacks.watching import Call, Seen, one_tensor, outputs_of, watched
from lightning_prune.checkpoint import load_pruned, resize_to
from lightning_prune.distillation import Comparison, feature_loss
from lightning_prune.errors import ConfigurationError


def load_teacher(path: str, student: LightningModule) -> LightningModule:
    """The teacher in a checkpoint of the student's class.

    Args:
        path: The file, of a network that was pruned or not.
        student: The network that is to learn.

    Raises:
        ConfigurationError: If there is no such file, or it does not say how to make the teacher.
    """
    if not Path(path).is_file():
        raise ConfigurationError(f'there is no checkpoint {path!r} to load a teacher from, nor is it "start" or "ema".')
    kind = type(student)
    try:
        return load_pruned(path, kind)
    except TypeError as error:
        raise ConfigurationError(
            f"the teacher in {path!r} cannot be made anew, because its file lacks arguments of {kind.__name__} "
            f"({error}). Load it with load_pruned into an instance, and give that as the teacher."
        ) from error


def rebuilt(network: LightningModule, state: Mapping[str, Tensor] | None) -> LightningModule | None:
    """A network with a state that a checkpoint holds, whatever its widths; None without one.

    Args:
        network: A network of the same structure, which is changed.
        state: Its state dict.
    """
    if state is None:
        return None
    present = network.state_dict()
    if any(value.shape != present[name].shape for name, value in state.items()):
        resize_to(network, state, {})
    network.load_state_dict(state)
    return network


@dataclass(frozen=True)
class Teaching:
    """What teachers add to the loss of a training step.

    Args:
        comparison: How outputs are compared.
        weight: Share of the distillation in the loss.
        path: Name of the submodule whose output is compared; empty for the module itself.
        features: Names of modules whose features are compared too.
        feature_weight: What that is multiplied with.
    """

    comparison: Comparison
    weight: float
    path: str = ""
    features: Sequence[str] = ()
    feature_weight: float = 1.0

    def step(
        self,
        trainer: Trainer,
        teachers: Mapping[str, nn.Module],
        step: Callable[..., Any],
        args: tuple[Any, ...],
    ) -> Any:
        """The user's training step, with the distillation in its loss; without teachers just as it is.

        Args:
            trainer: The Trainer.
            teachers: The teachers, by what to call them.
            step: The step.
            args: Its arguments, of which the first is the batch.

        Raises:
            ConfigurationError: If there is nothing to compare, or outputs differ in shape.
        """
        student = trainer.lightning_module
        with watched(student, self.path, self.features) as seen:
            result = step(*args)
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if loss is None:
            return result
        calls = outputs_of(trainer, self.path, seen)
        if not teachers:
            for call in calls:  # said now rather than when there are several
                self.comparison.true_classes(one_tensor(call.output, self.path), args[0])
            return result
        with trainer.precision_plugin.train_step_context(), torch.no_grad():
            lessons = {name: self._lesson(teacher, student, calls) for name, teacher in teachers.items()}
        terms = []
        for number, call in enumerate(calls):
            outputs = {name: one_tensor(lesson.calls[number].output, name) for name, lesson in lessons.items()}
            terms.append(self.comparison.loss(one_tensor(call.output, self.path), outputs, args[0]))
        features = feature_loss(seen.features, [lesson.features for lesson in lessons.values()])
        distillation = torch.stack(terms).mean() + self.feature_weight * features.to(terms[0].device)
        student.log("distillation/loss", distillation.detach())
        loss = (1 - self.weight) * loss + self.weight * distillation
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _lesson(self, teacher: nn.Module, student: nn.Module, calls: Sequence[Call]) -> Seen:
        """What a teacher makes of the calls of the network."""
        path = self.path if type(teacher) is type(student) else ""
        with watched(teacher, path, self.features) as seen:
            for call in calls:
                call.again(teacher.get_submodule(path))
        return seen

"""Losses by which a network learns from others: of class scores, of values, and of features of any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.program import tensors_in


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """How far the classes of a student are from those of a teacher (Hinton et al., 2015).

    Args:
        student: Class scores of shape ``[N, classes, ...]``.
        teacher: Those of the teacher, of the same shape.
        temperature: What scores are divided by. The result is multiplied with its square, which keeps the gradients
            about as large at any temperature.

    Returns:
        The Kullback-Leibler divergence of the student from the teacher, of shape ``[N, ...]``.

    Example:
        >>> round(divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 0.0]]).log1p(), 1.0).item(), 4)
        0.1927
    """
    wanted = functional.log_softmax(teacher.float() / temperature, 1)
    found = functional.log_softmax(student.float() / temperature, 1)
    return temperature**2 * (wanted.exp() * (wanted - found)).sum(1)


def teacher_weights(teachers: Sequence[Tensor], labels: Tensor, temperature: float) -> Tensor:
    """How much each teacher counts for each sample: the more, the less it errs on it.

    Args:
        teachers: Class scores of each teacher, of shape ``[N, classes, ...]``.
        labels: The true classes, of shape ``[N, ...]``.
        temperature: The higher, the more equal are the weights.

    Returns:
        The softmax over the teachers of their negative cross-entropies, of shape ``[teachers, N, ...]``.

    Example:
        >>> right, wrong = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 3.0]]).log()
        >>> [round(weight, 4) for weight in teacher_weights([right, wrong], torch.tensor([0]), 1.0).flatten().tolist()]
        [0.75, 0.25]
    """
    errors = [functional.cross_entropy(scores.float(), labels, reduction="none") for scores in teachers]
    return torch.softmax(-torch.stack(errors) / temperature, 0)


def class_loss(student: Tensor, teachers: Sequence[Tensor], temperature: float, weights: Tensor | None) -> Tensor:
    """Mean over the samples of the divergences from all teachers, with the given or else equal weights.

    Args:
        student: Class scores of shape ``[N, classes, ...]``.
        teachers: Those of each teacher.
        temperature: As for :func:`divergence`.
        weights: As from :func:`teacher_weights`.
    """
    parts = torch.stack([divergence(student, scores, temperature) for scores in teachers])
    return (parts.mean(0) if weights is None else (weights * parts).sum(0)).mean()


def value_loss(student: Tensor, teachers: Sequence[Tensor]) -> Tensor:
    """Mean squared error, over all teachers.

    Args:
        student: Any values.
        teachers: Those of each teacher, of the same shape.
    """
    return torch.stack([functional.mse_loss(student.float(), values.float()) for values in teachers]).mean()


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """How differently two layers see which samples of a batch are alike (Tung & Mori, 2019).

    The layers may be of different widths: only products of samples with each other are compared.

    Args:
        student: Features of shape ``[N, ...]``.
        teacher: Features of the same ``N`` samples.

    Returns:
        Mean squared difference of the matrices of products, whose rows have the length 1.

    Example:
        >>> similarity_loss(torch.eye(2), 3 * torch.eye(2, 5)).item()
        0.0
    """
    return functional.mse_loss(_similarities(student), _similarities(teacher))


def _similarities(features: Tensor) -> Tensor:
    flat = features.float().flatten(1)
    return functional.normalize(flat @ flat.T, dim=1)


def feature_loss(student: Mapping[str, Sequence[Tensor]], teachers: Sequence[Mapping[str, Sequence[Tensor]]]) -> Tensor:
    """Sum over layers of the :func:`similarity_loss`, which is averaged over teachers and calls.

    Args:
        student: Features of each call of each layer, by name.
        teachers: Those of each teacher.
    """
    total = torch.zeros(())
    for name, found in student.items():
        pairs = [pair for features in teachers for pair in zip(found, features[name], strict=True)]
        total = total.to(found[0].device) + torch.stack([similarity_loss(*pair) for pair in pairs]).mean()
    return total


@dataclass(frozen=True)
class Comparison:
    """How outputs are compared.

    Args:
        task: ``"classification"`` or ``"regression"``.
        temperature: As for :func:`divergence`.
        teacher_temperature: As for :func:`teacher_weights`; None for equal weights.
        labels: Key or position of the true classes in a batch; default: see :func:`labels_in`.
        dim: Dimension of class scores along which the classes lie; default: see :func:`class_dimension`.
    """

    task: str
    temperature: float
    teacher_temperature: float | None
    labels: str | int | None
    dim: int | None = None

    def loss(self, student: Tensor, teachers: Mapping[str, Tensor], batch: Any) -> Tensor:
        """The loss of an output of the network against those of its teachers, which are given by name.

        Raises:
            ConfigurationError: If shapes differ, the dimension of the classes cannot be told, or the true classes are
                needed and not found.
        """
        check_shapes(student, teachers)
        outputs = list(teachers.values())
        if self.task == "regression":
            return value_loss(student, outputs)
        dim = class_dimension(student, batch) if self.dim is None else self.dim
        if not -student.dim() <= dim < student.dim():
            raise ConfigurationError(f"dim is {dim}, but the output of the network has shape {list(student.shape)}.")
        student, outputs = student.movedim(dim, 1), [output.movedim(dim, 1) for output in outputs]
        if len(outputs) == 1 or self.teacher_temperature is None:
            return class_loss(student, outputs, self.temperature, None)
        weights = teacher_weights(outputs, self.true_classes(student, batch), self.teacher_temperature)
        return class_loss(student, outputs, self.temperature, weights)

    def true_classes(self, scores: Tensor, batch: Any) -> Tensor:
        """What several teachers are weighed by; see :func:`labels_in`."""
        found: Tensor = labels_in(batch, scores) if self.labels is None else batch[self.labels]
        return found


def move_average(average: Mapping[str, Tensor], present: Mapping[str, Tensor], updates: int, decay: float) -> None:
    """Move an exponential average towards what is now, in place.

    So that it does not hold on to the first values, after ``n`` updates ``n / (n + 9)`` stays of it as long as that is
    less than the decay; nothing at the first.

    Args:
        average: The average, by name. What is no real number is copied.
        present: What is now; names that the average lacks do not count.
        updates: How often it was moved before.
        decay: Share of it that stays.

    Example:
        >>> average = {"weight": torch.tensor([1.0])}
        >>> move_average(average, {"weight": torch.tensor([11.0])}, updates=1, decay=0.999)
        >>> average["weight"].tolist()
        [10.0]
    """
    stays = min(decay, updates / (updates + 9))
    for name, value in average.items():
        if value.is_floating_point():
            value.lerp_(present[name].to(value), 1 - stays)
        else:
            value.copy_(present[name])


def check_shapes(student: Tensor, teachers: Mapping[str, Tensor]) -> None:
    """Refuse outputs that cannot be compared.

    Args:
        student: The output of the network.
        teachers: Those of the teachers, by what to call them.

    Raises:
        ConfigurationError: If the shape of one differs; says both.
    """
    for name, output in teachers.items():
        if output.shape != student.shape:
            raise ConfigurationError(
                f"the output of the network has shape {list(student.shape)}, but that of the teacher {name} has shape "
                f"{list(output.shape)}: they cannot be compared. Name a submodule of equal outputs in output_of, or "
                f"choose another teacher."
            )


def class_dimension(scores: Tensor, batch: Any) -> int:
    """Along which dimension of class scores the classes lie: 1, as for torch's cross-entropy.

    Of scores of three dimensions it may be the last one, as in language models. There it is the one without which they
    have the shape of whole numbers in the batch.

    Args:
        scores: Class scores.
        batch: Any nested containers of tensors.

    Raises:
        ConfigurationError: If that is so for none of the two, or for both.

    Example:
        >>> tokens = torch.zeros(2, 7, dtype=torch.long)
        >>> class_dimension(torch.zeros(2, 7, 50), {"input_ids": tokens})
        2
    """
    if scores.dim() != 3:
        return 1
    shapes = {tensor.shape for tensor in tensors_in(batch) if tensor.dtype == torch.long}
    fitting = [dim for dim in (1, 2) if scores.shape[:dim] + scores.shape[dim + 1 :] in shapes]
    if len(fitting) == 1:
        return fitting[0]
    raise ConfigurationError(
        f"the output of the network has shape {list(scores.shape)}, and no whole numbers in the batch tell whether its "
        f"classes lie along dimension 1 or along the last one, as in language models. Give Distillation the dim, or "
        f"name a submodule in output_of whose output tells."
    )


def labels_in(batch: Any, scores: Tensor) -> Tensor:
    """The true classes in a batch: the only whole numbers in it that have the shape of class scores without classes.

    Args:
        batch: Any nested containers of tensors.
        scores: Class scores of shape ``[N, classes, ...]``.

    Raises:
        ConfigurationError: If there are none, or several.

    Example:
        >>> labels_in({"x": torch.zeros(2, 5), "y": torch.tensor([3, 1])}, torch.zeros(2, 4)).tolist()
        [3, 1]
    """
    shape = scores.shape[:1] + scores.shape[2:]
    found = [tensor for tensor in tensors_in(batch) if tensor.dtype == torch.long and tensor.shape == shape]
    if len(found) == 1:
        return found[0]
    raise ConfigurationError(
        f"several teachers are weighed by how well they know the true classes, but {len(found)} tensors of the batch "
        f"can be those (whole numbers of shape {list(shape)}). Give their key or position as labels, or "
        f"Distillation teacher_temperature=None to have all teachers count equally."
    )

"""What every criterion of single weights has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lightning_prune.errors import ConfigurationError, PruneError
from lightning_prune.text import listed
from lightning_prune.weight_budget import Scope


class WeightSource:
    """Where criteria of single weights get gradients and input norms from; nothing is computed before it is asked for.

    All answers are dicts by full name with tensors of the weights' shapes, the same in all processes. This base has no
    network behind it and answers nothing; :class:`~lightning_prune.WeightPruning` hands out one that does.

    Attributes:
        watched: What :meth:`WatchingCriterion.watch` has put there so far.
    """

    watched: Mapping[str, Tensor] = {}

    def gradients(self, batches: int) -> dict[str, Tensor]:
        """Sum of the gradients of the losses of real batches, in train mode.

        Args:
            batches: How many; there may be fewer.

        Raises:
            PruneError: If the training step gives no loss.
        """
        raise NotImplementedError

    def hessian_vector(self, vectors: Mapping[str, Tensor], batches: int) -> dict[str, Tensor]:
        """Product of the second derivative of the same sum of losses with a vector.

        Args:
            vectors: The vector, by full name; what is not named counts as zero.
            batches: As for :meth:`gradients`.

        Raises:
            PruneError: If the training step gives no loss, or one that cannot be differentiated twice.
        """
        raise NotImplementedError

    def synaptic_flow(self) -> dict[str, Tensor]:
        """Derivatives of the summed outputs of the network made positive, with respect to its weights.

        All parameters and buffers count with their absolute values, all inputs that are not whole numbers as ones;
        evaluation mode; double precision where the network can do that.

        Raises:
            PruneError: If the network cannot be run like that, or some weights have no part in its outputs.
        """
        raise NotImplementedError

    def input_norms(self, batches: int) -> dict[str, Tensor]:
        """2-norm of all numbers with which each weight is multiplied in evaluation mode on real batches.

        Ones for all weights of a tensor that is never a factor of a matrix product or convolution, such as an
        embedding.

        Args:
            batches: How many; there may be fewer.
        """
        raise NotImplementedError


class WeightCriterion(ABC):
    """Gives every weight an importance score; higher means keep.

    Attributes:
        scope: Which weights compete where the user has not said it.
        rounds: Into how many steps, each removing the same share of what is left, a round is divided. Weights are
            scored again before each of them.
        regrow: Whether weights that are off are put to the choice again in each round; they come back as zeros.

    Example:
        >>> class LargeAndSteady(WeightCriterion):
        ...     def score(self, weights, source, generator):
        ...         gradients = source.gradients(batches=4)
        ...         return {name: weight.abs() - gradients[name].abs() for name, weight in weights.items()}
        >>> class Given(WeightSource):
        ...     def gradients(self, batches):
        ...         return {"fc.weight": torch.tensor([[0.5, -2.0]])}
        >>> LargeAndSteady().score({"fc.weight": torch.tensor([[2.0, -3.0]])}, Given(), torch.Generator())
        {'fc.weight': tensor([[1.5000, 1.0000]])}
    """

    scope: ClassVar[Scope] = "global"
    rounds: int = 1
    regrow: bool = False

    @abstractmethod
    def score(
        self, weights: Mapping[str, Tensor], source: WeightSource, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Score all weights that may go.

        Args:
            weights: Present value of each tensor, by full name; what is off is zero.
            source: Gradients and the like, for those who ask.
            generator: The only source of randomness a criterion may use, so that all processes agree.

        Returns:
            Scores by full name, each of its weight's shape; finite, higher = keep, comparable across tensors.
        """


class WatchingCriterion(WeightCriterion):
    """A criterion that looks on while the network trains."""

    @abstractmethod
    def watch(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], watched: dict[str, Tensor]) -> None:
        """Called before each optimizer step.

        Args:
            weights: The weights that this step is about to move, by full name; what is off is zero.
            gradients: Their gradients; zero where a weight is off.
            watched: Where to keep what is seen, a tensor of the weight's shape by its full name; saved in checkpoints,
                and handed to :meth:`score` by ``source.watched``.
        """


def checked_scores(
    criterion: WeightCriterion, weights: Mapping[str, Tensor], scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The scores that a criterion has given, for all weights and of their shapes.

    Raises:
        PruneError: If they are not.
    """
    name = type(criterion).__name__
    if missing := [weight for weight in weights if weight not in scores]:
        raise PruneError(
            f"{name} has given no scores of {listed(missing, 90)}. A criterion must score every weight that it is "
            f"asked about; exclude those that it cannot."
        )
    for weight, value in weights.items():
        score = scores[weight]
        if not isinstance(score, Tensor) or score.shape != value.shape:
            found = f"shape {list(score.shape)}" if isinstance(score, Tensor) else f"type {type(score).__name__}"
            raise PruneError(
                f"the scores of {weight!r} by {name} are of {found}. A criterion must return tensors of the weights' "
                f"shapes, here {list(value.shape)}."
            )
    return {weight: scores[weight] for weight in weights}


def precise(tensor: Tensor) -> Tensor:
    """Detached values in single precision or better."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def check_at_least_one(criterion: WeightCriterion, option: str) -> None:
    """Refuse to work without a batch, a round and so on.

    Raises:
        ConfigurationError: If the option is below 1.
    """
    if (value := getattr(criterion, option)) < 1:
        raise ConfigurationError(f"{type(criterion).__name__}: {option} must be at least 1, but is {value}.")

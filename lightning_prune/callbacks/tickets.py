"""Lottery tickets: prune, rewind, train again, all in one fit."""

from __future__ import annotations

from typing import Literal, Union

from typing_extensions import override

from lightning_prune.callbacks.monitors import Monitors
from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.rewinding import check_parts, equal_parts
from lightning_prune.callbacks.weights import WeightPruning
from lightning_prune.choices import check_at_least
from lightning_prune.criteria.weights import WeightCriterion, WeightCriterionName
from lightning_prune.reinit import Reinit, ReinitName
from lightning_prune.schedules import Position
from lightning_prune.weight_budget import Scope


class LotteryTicket(WeightPruning):
    """Finds a winning ticket by iterative magnitude pruning with rewinding (Frankle & Carbin, 2019, 2020).

    The fit is divided into ``rounds + 1`` equal parts. After each part but the last the same share of the weights that
    are left goes; the others, the optimizers and the learning rate schedules go back to where they were at step
    ``rewind_to``. Give the fit ``rounds + 1`` times the epochs of one training, and a schedule made for one of them.

    Args:
        remove: Fraction of the weights to switch off in all, in [0, 1).
        rounds: Number of rounds, at least 1.
        rewind_to: Optimizer step that is rewound to; 0 is the initialisation. Deep networks want a few hundred.
        criterion: As for :class:`~lightning_prune.WeightPruning`.
        scope: As for :class:`~lightning_prune.WeightPruning`.
        include: As for :class:`~lightning_prune.WeightPruning`.
        exclude: As for :class:`~lightning_prune.WeightPruning`.
        floor: As for :class:`~lightning_prune.WeightPruning`.
        reinit: What the surviving weights start from after each round: ``"rewind"``, or another reinitialisation of the
            ticket.
        shrink: As for :class:`~lightning_prune.WeightPruning`.
        verify: As for :class:`~lightning_prune.WeightPruning`.
        recalibrate: As for :class:`~lightning_prune.WeightPruning`.
        seed: As for :class:`~lightning_prune.WeightPruning`.
        directory: As for :class:`~lightning_prune.WeightPruning`.
        monitors: As for :class:`~lightning_prune.WeightPruning`.

    Raises:
        ConfigurationError: If an argument is wrong, or the first round comes before the step that is rewound to.
        BudgetError: If the budget is out of reach on this network.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=60, callbacks=[LotteryTicket(remove=0.9, rounds=5)], logger=False)
    """

    def __init__(
        self,
        remove: float = 0.9,
        rounds: int = 5,
        rewind_to: int = 0,
        criterion: Union[WeightCriterionName, WeightCriterion] = "magnitude",  # noqa: UP007
        scope: Scope = "global",
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        floor: Union[int, float] = 0.001,  # noqa: UP007
        reinit: Union[ReinitName, Reinit] = "rewind",  # noqa: UP007
        shrink: Literal["end", "never"] = "end",
        verify: bool = True,
        recalibrate: int = 0,
        seed: int = 0,
        directory: str | None = None,
        monitors: Monitors = "keep",
    ) -> None:
        check_at_least(0, whole=True, rewind_to=rewind_to)
        super().__init__(
            criterion, remove, equal_parts(rounds), scope, include, exclude, floor, None, reinit, shrink, verify,
            recalibrate, seed, directory, monitors,
        )  # fmt: skip
        self.rounds = rounds
        self.rewind_to = rewind_to

    @override
    def check_length(self, length: Position) -> None:
        check_parts(self.rounds, self.rewind_to or 0, "rewind" in self._record, length)

"""Lottery tickets of whole channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Union

from typing_extensions import override

from lightning_prune.budget import Scope as ChannelScope
from lightning_prune.callbacks.channels import ChannelPruning, Measure
from lightning_prune.callbacks.monitors import Monitors
from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.rewinding import check_parts, equal_parts
from lightning_prune.choices import check_at_least
from lightning_prune.criteria import Criterion, CriterionName
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.analysis import Norms
from lightning_prune.reinit import Reinit, ReinitName
from lightning_prune.schedules import Position


class ChannelLotteryTicket(ChannelPruning):
    """A lottery ticket of whole channels: as :class:`~lightning_prune.LotteryTicket`, with units of ``ChannelPruning``.

    Channels are masked until the fit ends, since what is rewound to has the full width, and removed then.

    Args:
        remove: Fraction to remove in all, in [0, 1).
        of: As for :class:`~lightning_prune.ChannelPruning`.
        rounds: As for :class:`~lightning_prune.LotteryTicket`.
        rewind_to: As for :class:`~lightning_prune.LotteryTicket`.
        reinit: As for :class:`~lightning_prune.LotteryTicket`.
        shrink: As for :class:`~lightning_prune.ChannelPruning`, but not at each round.
        criterion, scope, include, exclude, ratios, round_to, min_channels, norms, inner, verify, recalibrate, seed,
            directory, monitors: As for :class:`~lightning_prune.ChannelPruning`.

    Raises:
        ConfigurationError: If an argument is wrong, or the first round comes before the step that is rewound to.
        BudgetError: If the budget is out of reach on this network.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=40, callbacks=[ChannelLotteryTicket(remove=0.5, rounds=3)], logger=False)
    """

    def __init__(
        self,
        remove: float = 0.5,
        of: Measure = "macs",
        rounds: int = 3,
        rewind_to: int = 0,
        criterion: Union[CriterionName, Criterion] = "l2",  # noqa: UP007
        scope: ChannelScope = "global",
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        reinit: Union[ReinitName, Reinit] = "rewind",  # noqa: UP007
        shrink: Literal["end", "never"] = "end",
        verify: bool = True,
        recalibrate: int = 0,
        seed: int = 0,
        directory: str | None = None,
        monitors: Monitors = "keep",
        ratios: Mapping[str, float] | None = None,
        round_to: int = 1,
        min_channels: Union[int, float] = 1,  # noqa: UP007
        norms: Norms = "exact",
        inner: Patterns | None = None,
    ) -> None:
        check_at_least(0, whole=True, rewind_to=rewind_to)
        if shrink not in ("end", "never"):
            raise ConfigurationError(
                "channels of a lottery ticket cannot be removed at each round, since what is rewound to has the full "
                'width. Use shrink="end".'
            )
        super().__init__(
            criterion, remove, of, equal_parts(rounds), scope, include, exclude, ratios, round_to, min_channels, reinit,
            shrink, norms, inner, verify, recalibrate, seed, directory, monitors,
        )  # fmt: skip
        self.rounds = rounds
        self.rewind_to = rewind_to

    @override
    def check_length(self, length: Position) -> None:
        check_parts(self.rounds, self.rewind_to or 0, "rewind" in self._record, length)

"""Dense-sparse-dense training: a time of sparsity, for a better dense network."""

from __future__ import annotations

from typing_extensions import override

from lightning_prune.callbacks.monitors import Monitors
from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.weights import WeightPruning
from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import OneShot, Position


class DSD(WeightPruning):
    """Trains dense, then with the smallest weights off, then with all of them free again (Han et al., 2017).

    Weights come back at zero. This regularises and compresses nothing: the report says that 0 % was reached, unless the
    fit is stopped while it is sparse. The paper lowers the learning rate tenfold for the last phase; here the rate is
    what the schedule of the module makes it.

    Args:
        remove: Fraction of the weights of each tensor that is off in the sparse phase, in [0, 1).
        start: Share of the fit at which the sparse phase begins.
        end: Share of the fit at which it ends, below 1.
        include: As for :class:`~lightning_prune.WeightPruning`.
        exclude: As for :class:`~lightning_prune.WeightPruning`.
        directory: As for :class:`~lightning_prune.WeightPruning`.
        monitors: As for :class:`~lightning_prune.WeightPruning`.

    Raises:
        ConfigurationError: If an argument is wrong, or the fit has no end to take shares of.
        BudgetError: If a tensor is too small to lose that little.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[DSD(remove=0.3)], logger=False)
    """

    provenance = "published"

    def __init__(
        self,
        remove: float = 0.3,
        start: float = 1 / 3,
        end: float = 2 / 3,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        directory: str | None = None,
        monitors: Monitors = "keep",
    ) -> None:
        if not 0 <= start < end < 1:
            raise ConfigurationError(
                f"the sparse phase needs 0 <= start < end < 1, but start is {start} and end is {end}."
            )
        super().__init__(
            "magnitude", remove, OneShot(start), "layer", include, exclude, shrink="never", directory=directory,
            monitors=monitors,
        )  # fmt: skip
        self.start, self.end = start, end

    @property
    @override
    def goal(self) -> float:
        return 0.0

    @override
    def notes(self, network: Network) -> list[str]:
        return [f"{self.remove:.1%} of the weights were off for a time; dense-sparse-dense training compresses nothing"]

    @override
    def before_batch(self, network: Network, position: Position) -> None:
        if network.weights.keep and position.fraction >= self.end:
            network.weights.keep.clear()
            self._note(network)

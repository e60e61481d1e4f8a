"""Channel pruning by a small neural network that learns to be the criterion."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, Union

from torch import Tensor
from typing_extensions import override

from lightning_prune.budget import Scope
from lightning_prune.callbacks.base import Shrink
from lightning_prune.callbacks.monitors import Monitors
from lightning_prune.callbacks.naming import Patterns
from lightning_prune.callbacks.network import Network
from lightning_prune.callbacks.scored_network import schedule_of, scored_network
from lightning_prune.callbacks.scorer_files import ScorerPruning
from lightning_prune.choices import check_at_least
from lightning_prune.graph.analysis import Norms
from lightning_prune.schedules import Schedule, ScheduleName
from lightning_prune.scoring import Stage, stages_from


class ScoringNetPruning(ScorerPruning):
    """Removes the channels that a small neural network scores low, after ScoringNet (S. Wang, 2023).

    At its round the net is trained on batches of the training data, with all weights frozen, to gate channels so that
    the budget is met and the user's own loss is low; then it scores without noise. Before training the weights first
    learn on trial, and are put back after it. What the net sees of a channel depends on no shape, so a saved one also
    scores other networks and other data, at once or after a few more steps. Each step costs one of training: prefer
    ``"taylor"`` where that is too much.

    Only the abstract of "ScoringNet: A Neural Network Based Pruning Criteria for Structured Pruning" (Scientific
    Programming, 2023) could be read: a net scores each output channel, before training too, and gradients help. That
    stages have losses and optimizers of their own is after S. Wang (2024). The features, the net, the gates, the
    losses, the trial and the transfer are ours.

    Args:
        remove: Fraction to remove in all, in [0, 1).
        of: What it is a fraction of: ``"macs"``, ``"params"`` or ``"channels"``.
        mode: Prune before training (``"init"``), or after 0.3 of it (``"post"``).
        stages: What the net is trained through; default: a fifth of ``steps`` on the ranks that other criteria give,
            three fifths on the loss, a fifth to commit.
        steps: Steps of the default stages in all, at least 3.
        batches: Batches whose gradients are among the features; 0 for none.
        rehearse: With ``mode="init"``, steps of Adam by which the weights learn on trial; 0 for none.
        rescale: Whether open channels are scaled up under the gates, so that signals keep their size.
        scorer_path: File of a net to start from; the default is then one stage of ``adapt_steps`` to commit.
        freeze, adapt_steps: Score with that net as it is; see ``scorer_path``.
        save_scorer: File to save the net in; default: ``scorer.pt`` beside the final checkpoint, if there is one.
        schedule: When rounds are due, if not as ``mode`` says; the net learns on in each.
        scope: This and all others: as for :class:`~lightning_prune.ChannelPruning`. Gates compete globally.
        include, exclude, norms, inner: Channels that may go, those that stay, and what may go of transformers.
        round_to, min_channels: What widths become multiples of, and the fewest channels of a group.
        shrink, verify: When channels are removed physically, and whether each time is checked.
        seed: Seed of the net and of the noise.
        directory, monitors: As for :class:`~lightning_prune.ChannelPruning`; the net is written there too.

    Raises:
        ConfigurationError: If an argument is wrong, or the file holds no net for these features.
        BudgetError: If the budget is out of reach on this network.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_epochs=30, callbacks=[ScoringNetPruning(remove=0.5)], logger=False)
    """

    provenance = "reconstruction"

    def __init__(
        self,
        remove: float = 0.5,
        of: Literal["channels", "params", "macs"] = "macs",
        mode: Literal["init", "post"] = "init",
        stages: Sequence[Stage] | None = None,
        steps: int = 400,
        batches: int = 8,
        rehearse: int = 200,
        rescale: bool = True,
        scorer_path: str | None = None,
        freeze: bool = False,
        adapt_steps: int = 50,
        save_scorer: str | None = None,
        schedule: Union[ScheduleName, Schedule, None] = None,  # noqa: UP007
        scope: Scope = "global",
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        round_to: int = 1,
        min_channels: Union[int, float] = 1,  # noqa: UP007
        shrink: Shrink = "rounds",
        norms: Norms = "exact",
        inner: Patterns | None = None,
        verify: bool = True,
        seed: int = 0,
        directory: str | None = None,
        monitors: Monitors = "keep",
    ) -> None:
        super().__init__(
            "l2", remove, of, schedule_of(mode, of, schedule), scope, include, exclude, None, round_to, min_channels,
            shrink=shrink, norms=norms, inner=inner, verify=verify, seed=seed, directory=directory, monitors=monitors,
        )  # fmt: skip
        check_at_least(0, whole=True, batches=batches, rehearse=rehearse)
        self.mode, self.stages, self.steps, self.batches, self.rehearse = mode, stages, steps, batches, rehearse
        self.rescale, self.freeze, self.adapt_steps = rescale, freeze, adapt_steps
        self.scorer_path, self.save_scorer = scorer_path, save_scorer
        self.schedule = schedule  # type: ignore[assignment]
        self._stages = stages_from(stages, steps, scorer_path, freeze, adapt_steps)

    @override
    def select(self, network: Network, level: float) -> dict[str, Tensor]:
        scorer, rehearse = self.scorer, self.rehearse if self.mode == "init" else 0
        with scored_network(network, self._eligible(network), self.batches, rehearse) as seen:
            if self._stages and self.must_learn:
                choose = partial(self._selection, network, level=level)
                allowed = self._dense_cost() * (1 - self.remove * level)
                cost, draw = self._cost(network), self.generator("scorer")
                seen.train(scorer, self._stages, cost, allowed, self._limits, choose, self.rescale, draw)
                self.keep_scorer(scorer)
            return self._selection(network, seen.scores(scorer), level)

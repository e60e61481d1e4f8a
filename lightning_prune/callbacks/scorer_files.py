"""Where a scorer comes from before a fit, and where it goes after it."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer
from typing_extensions import override

from lightning_prune.callbacks.channels import ChannelPruning
from lightning_prune.callbacks.network import Network
from lightning_prune.scoring import Scorer


class ScorerPruning(ChannelPruning):
    """Channel pruning with a :class:`~lightning_prune.scoring.Scorer`: a new one or one from a file, saved in the end.

    A subclass trains it, if at all, between :attr:`scorer` and :meth:`keep_scorer`.
    """

    scorer_path: str | None = None
    save_scorer: str | None = None

    @property
    def scorer(self) -> Scorer:
        """A copy of the scorer as it is now."""
        return Scorer.of(self.learnt["scorer"])

    @property
    def must_learn(self) -> bool:
        """Whether the scorer was not trained in this round yet."""
        return bool(self.learnt.get("trained") != len(self._record["rounds"]))

    def keep_scorer(self, scorer: Scorer) -> None:
        """Take over a scorer that was trained in this round."""
        self.learnt.update(scorer=scorer.state(), trained=len(self._record["rounds"]))

    @override
    def prepare(self, network: Network) -> None:
        super().prepare(network)
        scorer = Scorer.load(self.scorer_path) if self.scorer_path else Scorer(seed=self.seed)
        self.learnt["scorer"] = scorer.state()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        folder = self.directory or getattr(trainer.checkpoint_callback, "dirpath", None)
        beside = None if folder is None or trainer.fast_dev_run else Path(folder) / "scorer.pt"  # type: ignore[attr-defined]
        path = self.save_scorer or beside
        if path and "trained" in self.learnt and trainer.is_global_zero:
            self.scorer.save(path)

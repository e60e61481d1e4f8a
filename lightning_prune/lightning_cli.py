"""A LightningCLI for any network, which helps with mistyped names."""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.support import shadows
from lightning_prune.checkpoint import unwrap_hooks, wrap_hooks
from lightning_prune.choices import nearest_names
from lightning_prune.criteria import Criterion, WeightCriterion
from lightning_prune.errors import PruneError
from lightning_prune.patterns import PatternMining
from lightning_prune.penalties import ChannelPenalty
from lightning_prune.reinit import Reinit
from lightning_prune.schedules import Schedule
from lightning_prune.scoring import Stage, StageLoss
from lightning_prune.search import Search

_OURS: tuple[type, ...] = (
    PruningCallback,
    Criterion,
    WeightCriterion,
    ChannelPenalty,
    PatternMining,
    Reinit,
    Schedule,
    Search,
    Stage,
    StageLoss,
)
"""What this package offers for configuration files, and all that is made from it."""


class _HelpfulParser(LightningArgumentParser):
    """Adds the nearest known name to errors about mistyped ones, and hands on what this package has to complain of."""

    def instantiate(
        self,
        namespace: Namespace,
        instantiate_groups: bool = True,
        *,
        instantiators: Sequence[tuple[Callable[..., Any], type, bool]] | None = None,
    ) -> Any:
        """Make everything that is configured.

        Raises:
            PruneError: If a class of this package refuses its arguments; jsonargparse would hide it in a list of all
                types that it has tried.
        """
        heard: list[PruneError] = []

        def listening(kind: type, *args: Any, **kwargs: Any) -> Any:
            try:
                return kind(*args, **kwargs)
            except PruneError as error:
                heard.append(error)
                raise

        ours = [(listening, kind, True) for kind in _OURS]
        try:
            return super().instantiate(namespace, instantiate_groups, instantiators=[*(instantiators or ()), *ours])
        except ValueError as error:
            for cause in (*heard, error.__cause__):
                if isinstance(cause, PruneError) and str(cause) in str(error):
                    raise cause from None
            raise

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        hints = [hint for word in _doubtful_words(message) if (hint := self._nearest(word, message))]
        super().error("\n".join([message, *dict.fromkeys(hints)]), ex)
        raise AssertionError  # the line above always leaves

    def _nearest(self, word: str, message: str) -> str | None:
        values = re.search(rf"Literal\[([^\]]*)\]\. Got value: {re.escape(word)}(?!\w)", message)
        near = nearest_names(word, re.findall(r"'([^']*)'", values[1])) if values else []
        if near:
            return f"'{word}' is not known here: did you mean '{near[0]}'?"
        if values and f"dot import path string: {word}" not in message:
            return None  # a class is no answer to what only a name can be
        known = {*_known_words(self), *re.findall(r"'([\w.]+)'", message.split("Expected", 1)[-1])} - {word}
        close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
        return f"'{word}' is not known here: did you mean '{close[0]}'?" if close else None


def _doubtful_words(message: str) -> list[str]:
    patterns = (
        r"[Oo]ption '([\w.]+)' is not accepted",
        r"[Uu]nrecognized arguments?: --([\w.]+)",
        r"Expected a dot import path string: ([\w.]+)",
        r"[Gg]iven value: ([\w.]+)",
        r"Got value: ([\w.]+)",
    )
    return [word for pattern in patterns for word in re.findall(pattern, message)]


def _known_words(parser: ArgumentParser) -> Iterator[str]:
    """Names of options at any depth, and of what this package offers for them."""
    for action in parser._actions:
        yield action.dest
        yield action.dest.rpartition(".")[2]
    pending = list(_OURS)
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        yield kind.__name__
        yield from inspect.signature(kind).parameters


class _TakesAnyWidth(Callback):
    """Lets a module load checkpoints that were pruned where no callback does that prunes, as in a test of one."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not any(isinstance(callback, PruningCallback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            wrap_hooks(pl_module, {}, shadows)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        unwrap_hooks(pl_module)


class PruneCLI(LightningCLI):
    """A LightningCLI for any model and any data module, given by their class paths."""

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [_TakesAnyWidth()]},
            args=list(args) if args is not None else None,
            run=run,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that helps with mistyped names."""
        parser = super().init_parser(**kwargs)
        parser.__class__ = _HelpfulParser  # LightningCLI has no other way in for a parser of one's own
        return parser

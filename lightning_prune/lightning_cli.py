"""A LightningCLI for any network, which helps with mistyped names."""

from __future__ import annotations

import difflib
import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.criteria import Criterion
from lightning_prune.reinit import Reinit
from lightning_prune.schedules import Schedule


class _HelpfulParser(LightningArgumentParser):
    """Adds the nearest known name to errors about mistyped ones."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        hints = [hint for word in _doubtful_words(message) if (hint := self._nearest(word, message))]
        super().error("\n".join([message, *dict.fromkeys(hints)]), ex)
        raise AssertionError  # the line above always leaves

    def _nearest(self, word: str, message: str) -> str | None:
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
    pending: list[type] = [PruningCallback, Criterion, Schedule, Reinit]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        yield kind.__name__
        yield from inspect.signature(kind).parameters


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
            args=list(args) if args is not None else None,
            run=run,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that helps with mistyped names."""
        parser = super().init_parser(**kwargs)
        parser.__class__ = _HelpfulParser  # LightningCLI has no other way in for a parser of one's own
        return parser

"""The scorer: a net of about twenty thousand weights that gives every channel of any network a score."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigurationError
from lightning_prune.scoring.features import FEATURE_COUNT, FEATURE_VERSION

_SPREAD = 2.0
_LEANING = 1.0
_KIND = "lightning_prune.scorer"


class Scorer(nn.Module):
    """Scores the units of a group by their features and by what these are on the whole; higher = keep.

    Permuting the units of a group permutes their scores. The same weights serve all groups.

    Args:
        hidden: Width of the hidden layers.
        seed: Seed of the initial weights; the random state outside is left alone.

    Example:
        >>> scorer = Scorer(hidden=8)
        >>> scorer({"conv": torch.zeros(3, FEATURE_COUNT)})["conv"].shape
        torch.Size([3])
    """

    def __init__(self, hidden: int = 64, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # and not those of other devices, which nothing puts back
            self.unit = nn.Sequential(
                nn.Linear(FEATURE_COUNT, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.LayerNorm(hidden)
            )
            self.score = nn.Sequential(nn.Linear(3 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1, bias=False))

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores of shape ``[units]`` by group name, of features of shape ``[units, FEATURE_COUNT]``.

        The root mean square of their differences from the means of their groups is fixed: else a gate that was shut
        early would be shut so firmly that no gradient could open it again. The means themselves lie within bounds, so
        that no group loses all of its units at once.
        """
        sizes = [len(rows) for rows in features.values()]
        units = self.unit(torch.cat(list(features.values()))).split(sizes)
        groups = [torch.cat([part.mean(0), part.amax(0)]).expand(len(part), -1) for part in units]
        raw = self.score(torch.cat([torch.cat(units), torch.cat(groups)], 1)).squeeze(1).split(sizes)
        means = torch.stack([part.mean() for part in raw])
        leanings = _LEANING * torch.tanh(means - means.mean())
        apart = torch.cat([part - mean for part, mean in zip(raw, means, strict=True)])
        spread = _SPREAD * apart * (apart.square().mean() + 1e-5).rsqrt()
        return {name: s + o for name, s, o in zip(features, spread.split(sizes), leanings, strict=True)}

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Scorer:
        """The scorer with that :meth:`state`, of whatever width it is."""
        scorer = cls(len(state["unit.0.bias"]))
        scorer.load_state_dict(state)
        return scorer

    def state(self) -> dict[str, Tensor]:
        """A copy of the weights by name."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}

    def save(self, path: str | Path) -> None:
        """Write the scorer to a file; its folder is made if need be."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"kind": _KIND, "feature_version": FEATURE_VERSION, "state": self.state()}, path)

    @classmethod
    def load(cls, path: str | Path) -> Scorer:
        """Read a scorer that :meth:`save` wrote.

        Raises:
            ConfigurationError: If there is no such file, it is none of a scorer, or one for other features.
        """
        content = _content(Path(path))
        if content.get("feature_version") != FEATURE_VERSION:
            raise ConfigurationError(
                f"the scorer in {path} was trained on features of version {content.get('feature_version')!r}, but this "
                f"version of lightning-prune has {FEATURE_VERSION!r}. Train a new one, by leaving out scorer_path."
            )
        try:
            return cls.of(content["state"])
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise ConfigurationError(f"the scorer in {path} is damaged: {error}. Train a new one.") from error


def _content(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConfigurationError(f"there is no scorer at {path}. Give scorer_path the file that save_scorer wrote.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError):
        content = None
    if not isinstance(content, Mapping) or content.get("kind") != _KIND:
        raise ConfigurationError(
            f"{path} is no file of a scorer (a checkpoint, perhaps?). Give scorer_path the file that save_scorer wrote."
        )
    return content

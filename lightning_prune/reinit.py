"""What the surviving weights start from after a round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_prune.choices import unknown_name
from lightning_prune.errors import PruneError

ReinitName = Literal["keep", "random"]


class Reinit(ABC):
    """Gives tensors of a network the values from which training goes on after a round.

    Example:
        >>> class Zero(Reinit):
        ...     def __call__(self, model, tensors, generator):
        ...         with torch.no_grad():
        ...             for name in tensors:
        ...                 model.get_parameter(name).zero_()
        ...         return []
        >>> layer = nn.Linear(2, 1)
        >>> Zero()(layer, ["weight"], torch.Generator())
        []
        >>> layer.weight.tolist()
        [[0.0, 0.0]]
    """

    @abstractmethod
    def __call__(self, model: nn.Module, tensors: Collection[str], generator: torch.Generator) -> list[str]:
        """Change the named tensors in place.

        Args:
            model: The network.
            tensors: Full names of the parameters and buffers to reinitialise; all others must stay as they are.
            generator: The only source of randomness, so that all processes agree.

        Returns:
            Names of the tensors for which no new value was known, and which were kept.
        """


@dataclass(frozen=True)
class Keep(Reinit):
    """Training goes on from the values at hand.

    Example:
        >>> Keep()(nn.Linear(2, 1), ["weight"], torch.Generator())
        []
    """

    def __call__(self, model: nn.Module, tensors: Collection[str], generator: torch.Generator) -> list[str]:
        """Change nothing."""
        return []


@dataclass(frozen=True)
class Random(Reinit):
    """A fresh draw, as each module's own ``reset_parameters`` makes it, at the present sizes.

    The control experiment of Frankle & Carbin (2019) and Liu et al. (2019). Parameters keep their identity and the
    global random state is left alone.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> before = layer.weight.clone()
        >>> Random()(layer, ["weight"], torch.Generator().manual_seed(1))
        []
        >>> bool((layer.weight != before).all())
        True
    """

    def __call__(self, model: nn.Module, tensors: Collection[str], generator: torch.Generator) -> list[str]:
        """Redraw the named tensors; returns those whose module has no ``reset_parameters``.

        Raises:
            PruneError: If the network has no tensor of one of the names.
        """
        wanted = set(tensors)
        kept: list[str] = []
        if unknown := sorted(wanted - set(_tensor_names(model))):
            raise PruneError(f"cannot reinitialise {', '.join(unknown)}: the network has no tensor of that name.")
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        with _seeded(model, seed), torch.no_grad():
            for prefix, module in model.named_modules():
                own = wanted & {f"{prefix}.{name}".removeprefix(".") for name in _own_tensors(module)}
                if not own:
                    continue
                if callable(reset := getattr(module, "reset_parameters", None)):
                    _redraw(module, reset, {name.removeprefix(f"{prefix}.") for name in own})
                else:
                    kept += sorted(own)
        return kept


def _tensor_names(model: nn.Module) -> list[str]:
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return [*dict(parameters), *dict(buffers)]


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _redraw(module: nn.Module, reset: Callable[[], object], names: set[str]) -> None:
    """Call ``reset`` and keep its effect on the named tensors of ``module`` only."""
    before = {name: (tensor, tensor.clone()) for name, tensor in _own_tensors(module).items()}
    others = [
        (tensor, tensor.clone())
        for child in module.modules()
        if child is not module
        for tensor in _own_tensors(child).values()
    ]
    reset()
    after = _own_tensors(module)
    for name, (tensor, value) in before.items():
        tensor.copy_(after[name] if name in names else value)
        if after[name] is not tensor:
            setattr(module, name, tensor)
    for tensor, value in others:
        tensor.copy_(value)


@contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Draw from a fixed seed on every device of the model, and put the random states back afterwards."""
    devices = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


_BY_NAME: dict[str, Callable[[], Reinit]] = {"keep": Keep, "random": Random}


def reinit_from(reinit: ReinitName | Reinit) -> Reinit:
    """The reinitialisation of that name, or the given one itself.

    Raises:
        ConfigurationError: If no reinitialisation has that name.

    Example:
        >>> reinit_from("keep")
        Keep()
    """
    if isinstance(reinit, Reinit):
        return reinit
    if reinit not in _BY_NAME:
        raise unknown_name("reinit", reinit, _BY_NAME)
    return _BY_NAME[reinit]()

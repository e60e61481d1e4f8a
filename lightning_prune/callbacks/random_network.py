"""What all methods do that look for a subnetwork of a random network and never train a weight."""

from __future__ import annotations

import math
import zlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer
from typing_extensions import override

from lightning_prune.callbacks.base import PruningCallback
from lightning_prune.callbacks.naming import Patterns, as_patterns, check_names, chosen_names, maskable_names
from lightning_prune.callbacks.network import Network
from lightning_prune.choices import check_at_least, is_number, is_pair, unknown_name
from lightning_prune.effective import EffectiveWeights
from lightning_prune.errors import ConfigurationError
from lightning_prune.lion import Lion
from lightning_prune.normalised_sgd import NormalisedSGD
from lightning_prune.schedules import OneShot, Position
from lightning_prune.weight_budget import Scope, select_weights

Init = Literal["kaiming_normal", "kaiming_uniform", "signed_constant", "keep"]
Step = Literal["sgd", "normalised_sgd", "adam", "lion"]
_AT_THE_END = OneShot(at=1 - 1e-6)


class RandomNetwork(PruningCallback):
    """Base of the methods that choose, by learnt scores, which weights of a random network stay.

    All weights are frozen at their initial values and one score a weight is learnt instead, by an optimizer of the
    callback's own whose learning rate falls to zero along half a cosine; the user's optimizer moves nothing. While a
    batch is trained on, the module holds what :meth:`factors` makes of the weights; for validation, and in checkpoints
    made after it or at the end of an epoch, it holds the sparse network that the scores say.

    Attributes:
        share: Share of the fit that is done, 0 to 1.

    A subclass gives :meth:`first_scores`, :meth:`factors` and, where they are not plain, :meth:`ranking`,
    :meth:`score_gradients` and :meth:`settle`. See :class:`~lightning_prune.EdgePopup` for the arguments.
    """

    always_finishes = True

    def __init__(
        self,
        remove: float,
        scope: Scope,
        init: Init,
        optimizer: Step,
        lr: float,
        momentum: float,
        weight_decay: float,
        include: Patterns | None,
        exclude: Patterns | None,
        floor: float,
        shrink: Literal["end", "never"],
        verify: bool,
        recalibrate: int,
        seed: int,
        directory: str | None,
    ) -> None:
        """Check what can be checked without a network."""
        for kind, name, known in (
            ("scope", scope, ["global", "layer", "erk"]),
            ("init", init, list(_INITS)),
            ("optimizer of the scores", optimizer, ["sgd", "normalised_sgd", "adam", "lion"]),
            ("shrink", shrink, ["end", "never"]),
        ):
            if name not in known:
                raise unknown_name(kind, name, known)
        if not (is_number(lr) and 0 < lr < math.inf):
            raise ConfigurationError(f"lr must be a finite number above 0, but is {lr!r}.")
        check_at_least(0, momentum=momentum, weight_decay=weight_decay, floor=floor)
        super().__init__(remove, "weights", _AT_THE_END, "keep", shrink, "exact", verify, recalibrate, seed, directory)
        self.scope: Scope = scope
        self.init = init
        self.optimizer = optimizer
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.include = as_patterns("include", include)
        self.exclude = as_patterns("exclude", exclude)
        self.floor = floor
        self._effective: EffectiveWeights | None = None
        self._optimizer: Optimizer | None = None
        self._factors: dict[str, Tensor] = {}
        self._step = -1.0
        self._family = ""
        self.share = 0.0

    # What a method decides -------------------------------------------------------------------------------------------

    @abstractmethod
    def first_scores(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """Scores to begin with, of the shape of a weight, on the CPU."""

    @abstractmethod
    def factors(self, scores: Tensor, count: int, share: float) -> Tensor:
        """What the weights are multiplied with while a batch is trained on.

        Args:
            scores: Flat scores of the weights that share a budget.
            count: Number of them that may stay.
            share: Share of the fit that is done, 0 to 1.
        """

    def ranking(self, scores: Tensor) -> Tensor:
        """What decides who stays in the end; higher stays."""
        return scores

    def score_gradients(self, slopes: Tensor, scores: Tensor, factors: Tensor) -> Tensor:
        """Gradient of the scores of one tensor.

        Args:
            slopes: Derivatives of the loss with respect to the factors.
            scores: The scores.
            factors: The factors in use.
        """
        return slopes

    def scale(self, factors: Tensor) -> Tensor:
        """A number that the factors of one tensor are multiplied with in addition, as if it were a constant."""
        return factors.new_ones(())

    def settle(self, scores: Tensor, count: int, share: float) -> Tensor:
        """Scores after a step, as :meth:`factors` takes them."""
        return scores

    # How it is done --------------------------------------------------------------------------------------------------

    @override
    def can_prune(self, network: Network) -> bool:
        return bool(maskable_names(network.module))

    @override
    def prepare(self, network: Network) -> None:
        check_names(maskable_names(network.module), self.include, self.exclude)
        names = self._names(network)
        draw = self.generator("initialisation")
        dense = {name: _INITS[self.init](network.tensors[name].detach(), draw) for name in names}
        probing = {name: torch.rand(weight.shape, generator=draw) for name, weight in dense.items()}
        chosen = select_weights(probing, {}, self.remove, self.scope, self.floor or 1)
        self._record["eligible"] = {name: weight.numel() for name, weight in dense.items()}
        self.learnt["counts"] = {name: int(mask.sum()) for name, mask in chosen.items()}
        self.learnt["scores"] = {name: self.first_scores(weight, draw).float() for name, weight in dense.items()}
        self.learnt["dense"] = dense
        for name in _beside(network.module, names):
            network.tensors[name].detach().zero_()

    @override
    def resume(self, network: Network) -> None:
        if any(isinstance(optimizer, LBFGS) for optimizer in network.optimizers):
            raise ConfigurationError(
                f"{type(self).__name__} freezes all weights, and LBFGS cannot step without a gradient. Give the module "
                f"any other optimizer; it will move nothing."
            )
        self._step = -1.0
        if network.weights.keep:
            return
        learnt = self.learnt
        self._effective = EffectiveWeights({name: network.tensors[name] for name in learnt["dense"]}, learnt["dense"])
        learnt["dense"] = self._effective.dense
        learnt["scores"] = {name: s.to(network.tensors[name].device) for name, s in learnt["scores"].items()}
        self._optimizer = self._new_optimizer(learnt["scores"].values())
        if "optimizer" in learnt:
            self._optimizer.load_state_dict(learnt["optimizer"])

    @override
    def before_batch(self, network: Network, position: Position) -> None:
        if self._effective is None:
            return
        if position.step != self._step:  # else gradients of this step are accumulating
            self._step, self.share = position.step, position.fraction
            self._factors = self._in_families(self.factors)
        self._effective.place({name: factor * self.scale(factor) for name, factor in self._factors.items()})

    @override
    def before_step(self, network: Network, optimizer: Optimizer) -> None:
        if self._effective is None:
            return
        assert self._optimizer is not None
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        scores: dict[str, Tensor] = self.learnt["scores"]
        for name, slopes in self._effective.slopes().items():
            if id(network.tensors[name]) in held:
                factors = self._factors[name]
                scores[name].grad = self.score_gradients(slopes.float() * self.scale(factors), scores[name], factors)
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr * (1 + math.cos(math.pi * self.share)) / 2
        self._optimizer.step()
        self._optimizer.zero_grad()
        for name, settled in self._in_families(self.settle).items():
            scores[name].copy_(settled)
        self.learnt["optimizer"] = self._optimizer.state_dict()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._show()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show()

    @override
    def carry_out(self, network: Network, level: float) -> None:
        assert self._effective is not None
        network.weights.set(network.broadcast(self._chosen()), network.tensors)
        self._effective.place_dense()
        self._effective = self._optimizer = None
        network.hold_masks()
        for key in ("dense", "scores", "optimizer"):
            self.learnt.pop(key, None)

    @override
    def removed(self, network: Network) -> float:
        kept = network.weights.kept
        return 1 - sum(kept.values()) / sum(self._record["eligible"].values()) if kept else 0.0

    @override
    def before_the_end(self, network: Network) -> None:
        network.masks.set(network.living_units())

    def _show(self) -> None:
        """Have the module hold the sparse network that the scores say."""
        if self._effective is not None:
            self._effective.place({name: mask.to(self._effective.dense[name]) for name, mask in self._chosen().items()})

    def _chosen(self) -> dict[str, Tensor]:
        ranking = {name: self.ranking(scores) for name, scores in self.learnt["scores"].items()}
        return select_weights(ranking, {}, self.remove, self.scope, self.floor)

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers drawn anew for each batch and tensor; the same in all processes and in a resumed run."""
        draw = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {self._step} {self._family}".encode()))
        return torch.rand(like.shape, generator=draw).to(like.device)

    def _in_families(self, compute: Callable[[Tensor, int, float], Tensor]) -> dict[str, Tensor]:
        """Something computed of the scores, all at once for tensors that share a budget."""
        scores: Mapping[str, Tensor] = self.learnt["scores"]
        counts: Mapping[str, int] = self.learnt["counts"]
        if self.scope != "global":
            found = {}
            for name, s in scores.items():
                self._family = name
                found[name] = compute(s.flatten(), counts[name], self.share).view_as(s)
            return found
        joined = torch.cat([s.flatten() for s in scores.values()])
        parts = compute(joined, sum(counts.values()), self.share).split([s.numel() for s in scores.values()])
        return {name: part.view_as(s) for (name, s), part in zip(scores.items(), parts, strict=True)}

    def _new_optimizer(self, scores: Sequence[Tensor]) -> Optimizer:
        scores = list(scores)
        if self.optimizer in ("sgd", "normalised_sgd"):
            plain = SGD if self.optimizer == "sgd" else NormalisedSGD
            return plain(scores, self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        kind = Adam if self.optimizer == "adam" else Lion
        return kind(scores, self.lr, weight_decay=self.weight_decay)

    def _names(self, network: Network) -> list[str]:
        trainable = {name for name, parameter in network.module.named_parameters() if parameter.requires_grad}
        names = [name for name in maskable_names(network.module) if name in trainable]
        return chosen_names(names, self.include, self.exclude)


def check_temperatures(temperatures: tuple[float, float]) -> None:
    """Refuse what is no pair of temperatures, or one that does not fall, or not to one above 0.

    Raises:
        ConfigurationError: If they do not.
    """
    if not (is_pair(temperatures) and math.inf > temperatures[0] >= temperatures[1] > 0):
        raise ConfigurationError(
            f"temperature must fall to a number above 0, as in (1.0, 0.03), but is {temperatures!r}."
        )


def _beside(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Vectors that lie in the same module as one of the named weights, as its bias does."""
    paths = {name.rpartition(".")[0] for name in names}
    return [n for n, p in module.named_parameters() if p.dim() < 2 and n.rpartition(".")[0] in paths]


def _signed_constant(weight: Tensor, generator: torch.Generator) -> Tensor:
    drawn = nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
    return drawn.sign() * math.sqrt(2 / weight[0].numel())


_INITS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "kaiming_normal": lambda w, g: nn.init.kaiming_normal_(_empty(w), nonlinearity="relu", generator=g),
    "kaiming_uniform": lambda w, g: nn.init.kaiming_uniform_(_empty(w), nonlinearity="relu", generator=g),
    "signed_constant": lambda w, g: _signed_constant(_empty(w), g),
    "keep": lambda w, g: w.cpu().clone(),
}


def _empty(weight: Tensor) -> Tensor:
    return torch.empty(weight.shape)  # drawn on the CPU, so that the draw is the same everywhere

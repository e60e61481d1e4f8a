"""Measuring how much each channel group matters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_prune.budget import check_fraction, select
from lightning_prune.choices import unknown_name
from lightning_prune.criteria import Criterion, CriterionName, criterion_from
from lightning_prune.criteria.base import mean_scores
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.channels import ChannelGraph
from lightning_prune.graph.program import copied, seed_everywhere
from lightning_prune.graph.tracer import named_leaves
from lightning_prune.masks import Masks
from lightning_prune.probe import Probe
from lightning_prune.probe.backward import NoBackward
from lightning_prune.probe.runs import SEED
from lightning_prune.sensitivity.record import Curve, Sensitivity

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
LossFunction = Callable[[nn.Module, Any], Tensor]
"""Gives the loss of a module on a batch."""

_REMEDY = (
    "The traceback above shows the line. It runs on single validation batches and without a fit: where that cannot "
    "work, give the name of a loss that validation_step logs as monitor, or a loss function of your own."
)


def measure_sensitivity(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Iterable[Any],
    loss: LossFunction | None = None,
    criterion: CriterionName | Criterion = "l2",
    shares: Sequence[float] = SHARES,
    patterns: Sequence[str] | str | None = None,
    monitor: str | None = None,
    seed: int = 0,
) -> Sensitivity:
    """Measure the loss of a network with some units of one group off, for every group; the network stays as it is.

    Units are switched off by masks, which does exactly what removing them would do. Everything runs in evaluation mode
    and with the same random numbers each time; weights, buffers and all else are put back to the last bit, also after
    an error. It takes a forward of every batch for each group and share.

    Args:
        model: The network, trained: what an untrained one can do without says little.
        graph: Its channel graph, from :func:`~lightning_prune.trace`.
        batches: Validation batches, on the device of the network. Not test data, if ratios are to be chosen by them.
        loss: Gives the loss of the network on a batch; default: what ``training_step`` of a LightningModule returns.
        criterion: Which units of a group go first; one that looks at weights, or at gradients of the loss.
        shares: Shares to remove, in (0, 1).
        patterns: Patterns (as in ``fnmatch``) of names of groups, or a single one. The groups that match one are cut
            together, and the others are not cut; default: every group alone.
        monitor: Instead of ``loss``, name of a tensor that ``validation_step`` logs; less of it is better.
        seed: Seed of random criteria.

    Raises:
        ConfigurationError: If an argument is wrong.
        PruneError: If there is no loss, or the criterion cannot score.
        TraceError: If the user's code fails.

    Example:
        >>> from lightning_prune import trace
        >>> net, inputs = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), torch.randn(16, 4)
        >>> square = lambda model, batch: model(batch).square().mean()
        >>> found = measure_sensitivity(net, trace(net, inputs), [inputs], square, shares=[0.25, 0.5])
        >>> found.curves[0].name, found.curves[0].kept
        ('0', (6, 4))
    """
    rising = tuple(sorted({check_fraction(share, "a share") for share in shares} - {0.0}))
    if not rising:
        raise ConfigurationError("there is no share to remove. Give some in (0, 1), such as 0.25 and 0.5.")
    together = _together(graph, [patterns] if isinstance(patterns, str) else patterns)
    tensors, original = named_leaves(model), graph.widths
    if strangers := [s.tensor for group in graph.groups.values() for s in group.slots if s.tensor not in tensors]:
        raise ConfigurationError(f"the graph knows {strangers[0]!r}, which the model does not have. Trace this model.")
    if loss is not None and monitor is not None:
        raise ConfigurationError("loss and monitor both say what to measure. Give one of them.")
    validation = _Validation(model, list(batches), loss, monitor)
    wanted = dict.fromkeys(name for names in together.values() for name in names)
    scores = validation.scores(criterion_from(criterion), graph, tensors, list(wanted), seed)

    def point(names: Sequence[str], share: float) -> tuple[int, float]:
        """Number of units that are kept, and the loss with the others off."""
        alone = {name: scores[name] for name in names}
        fixed = dict.fromkeys(names, share)
        keep = select(alone, widths=original, original=original, cost=lambda _: 0.0, allowed=0.0, ratios=fixed)
        with switched_off(graph, tensors, keep):
            return sum(int(mask.sum()) for mask in keep.values()), validation.mean()

    curves = []
    for title, names in together.items():
        kept, losses = zip(*(point(names, share) for share in rising), strict=True)
        curves.append(Curve(title, sum(original[name] for name in names), kept, losses))
    return Sensitivity(validation.mean(), rising, tuple(curves))


@contextmanager
def switched_off(graph: ChannelGraph, tensors: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> Iterator[None]:
    """Switch units off for a while; afterwards the tensors hold what they held before, to the last bit.

    Args:
        graph: The channel graph.
        tensors: Parameters and buffers of the network by full name.
        keep: Bool masks of shape ``[units]`` by group name, True = kept; all units of other groups are.
    """
    masks = Masks(graph)
    masks.set(keep)
    before = {name: tensors[name].detach().clone() for name in {entry.tensor for entry in masks.off_entries()}}
    try:
        masks.apply(tensors)
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                tensors[name].copy_(value)


def _together(graph: ChannelGraph, patterns: Sequence[str] | None) -> dict[str, list[str]]:
    """Names of the groups that are cut together, by what to call them."""
    if not graph.groups:
        raise ConfigurationError("this network has no channel group, so there is nothing to be sensitive to.")
    if patterns is None:
        return {name: [name] for name in graph.groups}
    found = {pattern: [name for name in graph.groups if fnmatchcase(name, pattern)] for pattern in patterns}
    for pattern, names in found.items():
        if not names:
            raise unknown_name("channel group in patterns", pattern, graph.groups)
    return found


class _Plain(LightningModule):
    """A module with a loss function."""

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def training_step(self, batch: Any) -> Tensor:
        """The loss of a batch."""
        return self.loss(self.model, batch)


class _Validation(Probe):
    """Runs a network on fixed batches; the arguments are those of :func:`measure_sensitivity`."""

    def __init__(self, model: nn.Module, batches: list[Any], loss: LossFunction | None, monitor: str | None) -> None:
        if not batches:
            raise ConfigurationError("there is no batch to measure a loss on. Give at least one.")
        module = model if loss is None else _Plain(model, loss)
        if not isinstance(module, LightningModule):
            raise ConfigurationError(
                f"{type(model).__name__} is no LightningModule, which would know its loss. Give a loss function."
            )
        super().__init__(None, module, cache=len(batches))
        self._prefix = "" if loss is None else "model."
        self._monitor = monitor
        for batch in batches:
            self.observe(batch)

    def mean(self) -> float:
        """Mean loss of the batches, in evaluation mode."""
        step = "training_step" if self._monitor is None else "validation_step"
        values = []
        with self._sandbox(f"{step} (sensitivity)", False, _REMEDY) as record:
            for number, batch in enumerate(self._observed):
                seed_everywhere(SEED + number)
                with torch.no_grad(), NoBackward(record.losses):
                    if self._monitor is None:
                        values.append(self._value_of_loss(self._training_step(copied(batch)), record.losses))
                    else:
                        values.append(self._logged(copied(batch), self._monitor, record.logged))
                for kept in (record.outputs, record.logged, record.losses):
                    kept.clear()
        return float(torch.stack(values).mean())

    def _logged(self, batch: Any, monitor: str, logged: Mapping[str, Tensor]) -> Tensor:
        step = self._module.validation_step
        indices = [0] * is_param_in_hook_signature(step, "batch_idx", min_args=2)
        indices += [0] * is_param_in_hook_signature(step, "dataloader_idx", explicit=True)
        step(batch, *indices)
        if monitor not in logged:
            raise unknown_name("tensor that validation_step logs", monitor, logged)
        return logged[monitor].detach().float().mean()

    def scores(
        self, criterion: Criterion, graph: ChannelGraph, tensors: Mapping[str, Tensor], wanted: Sequence[str], seed: int
    ) -> dict[str, Tensor]:
        """Scores of the wanted groups."""
        prefixed = self.gradients(criterion.batches)
        gradients = ({name.removeprefix(self._prefix): value for name, value in found.items()} for found in prefixed)
        groups = {name: graph.groups[name] for name in wanted}
        return mean_scores(criterion, groups, tensors, gradients, torch.Generator().manual_seed(seed))

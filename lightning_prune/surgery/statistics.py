"""The masked network whose norms see the kept channels only: what an approximate cut is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.errors import ShrinkError
from lightning_prune.graph.analysis import Analysis, Run
from lightning_prune.graph.calls import SAME_AS_VIEW, hands_on, operator_name, tensors_among
from lightning_prune.graph.labels import Witness, compact, varying
from lightning_prune.graph.observation import is_observed
from lightning_prune.graph.one_way import decomposed
from lightning_prune.graph.program import map_nested
from lightning_prune.graph.selections import Selections, is_selection

_TAKES_STATISTICS = frozenset({
    "native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit", "mean", "var", "std",
    "var_mean", "std_mean", "_fused_rms_norm",
})  # fmt: skip


class KeptStatistics(TorchDispatchMode):
    """Runs a recorded program of the full network; statistics are taken over the kept channels only.

    Args:
        analysis: What is known of the network.
        run: The recorded program.
        kept: For each label whether it stays.
        scales: Numbers that follow the kept width, by position in the program.
        selections: Records what is selected.
    """

    def __init__(
        self, analysis: Analysis, run: Run, kept: Tensor, scales: Mapping[int, float], selections: Selections
    ) -> None:
        """See the class."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._analysis, self._run, self._kept, self._scales = analysis, run, kept, scales
        self._selections = selections
        self._position = 0

    def is_made_up(self, tensor: Tensor) -> bool:
        """Nothing is: here the numbers count."""
        return False

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute the operator, on a part of its inputs if it takes statistics over what is partly removed."""
        kwargs = kwargs or {}
        name = operator_name(func)
        if not is_observed() or hands_on(name, args):
            return func(*args, **kwargs)
        position, self._position = self._position, self._position + 1
        event = self._run.events[position] if position < len(self._run.events) else None
        if event is None or event.name != ("view" if name in SAME_AS_VIEW else name):
            raise ShrinkError(f"the masked network does not do what it did when it was traced, from {name} on")
        if position in self._scales:
            args = (args[0], self._scales[position], *args[2:])
        if name in _TAKES_STATISTICS:
            return self._on_kept(func, args, kwargs, event.inputs, event.witnesses)
        return self._selections.run(func, args, kwargs) if is_selection(func, args) else func(*args, **kwargs)

    def _on_kept(
        self, func: OpOverload, args: Any, kwargs: Any, inputs: Sequence[Witness], witnesses: Sequence[Witness]
    ) -> Any:
        places = [self._places(witness) for witness in inputs]
        if not any(places):
            return func(*args, **kwargs)
        left = iter(places)

        def select(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            for dim, positions in next(left).items():
                value = value.index_select(dim, positions.to(value.device))
            return value

        given = map_nested(select, tuple(args)), map_nested(select, dict(kwargs))
        parts = func(*_resized_numbers(func, args[0], given[0], places[0].get(1)), **given[1])
        outputs = iter(witnesses[-len(tensors_among((parts,))) :])

        def spread(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            witness = next(outputs)
            for dim, positions in self._places(witness).items() if value.numel() else ():  # as of a batch-norm at rest
                shape = [witness.shape[d] if d == dim else n for d, n in enumerate(value.shape)]
                value = value.new_zeros(shape).index_copy(dim, positions.to(value.device), value)
            return value

        return map_nested(spread, parts)

    def _places(self, witness: Witness) -> dict[int, Tensor]:
        """Kept positions along each dimension of a tensor that loses some."""
        places = {}
        for plane in witness.planes:
            roots = compact(self._analysis.root(plane.ids))
            stays = self._kept[roots]
            for dim in varying(roots):
                along = stays[tuple(slice(None) if d == dim else 0 for d in range(stays.dim()))]
                if not bool(along.all()) and len(along) == witness.shape[dim]:
                    places[dim] = along.nonzero().flatten()
        return places


def _resized_numbers(func: OpOverload, full: Tensor, args: Sequence[Any], kept: Tensor | None) -> tuple[Any, ...]:
    """Arguments that repeat the sizes of the first one, brought up to date.

    Args:
        func: The operator.
        full: Its first argument before channels were left out.
        args: Its arguments without them.
        kept: The channels that are left, if not all are.
    """
    part, rest = args[0], list(args)
    for number, argument in enumerate(func._schema.arguments[: len(rest)]):
        if argument.name == "normalized_shape":
            rest[number] = list(part.shape[-len(rest[number]) :])
        elif argument.name == "C" and rest[number] == full.shape[1]:
            rest[number] = part.shape[1]
        elif argument.name == "group" and kept is not None:
            rest[number] = len(torch.unique(kept // (full.shape[1] // rest[number])))
    return tuple(rest)


@contextmanager
def kept_statistics(
    analysis: Analysis, run: Run, kept: Tensor, scales: Mapping[int, float], selections: Selections
) -> Iterator[None]:
    """Inside, the program of the full network takes its statistics over the kept channels only."""
    mode = KeptStatistics(analysis, run, kept, scales, selections)
    with decomposed(mode), mode:
        yield

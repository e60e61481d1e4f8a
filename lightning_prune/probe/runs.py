"""Runs of the user's own training step on real batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_prune.errors import PruneError, TraceError
from lightning_prune.graph.observation import is_exact, unobserved
from lightning_prune.graph.program import Program, copied, count_samples
from lightning_prune.probe.backward import NoBackward
from lightning_prune.probe.counting import OperatorCount, TooManyOperatorsError
from lightning_prune.probe.data import NoBatchError, fresh_batches, validation_batch
from lightning_prune.probe.sandbox import Record, sandbox

SEED = 20
"""Seed inside every sandbox: runs of one program see the same random numbers, and so does a resumed fit."""

_PRECISION = {
    "forward": "forward_context",
    "validation_step": "val_step_context",
    "predict_step": "predict_step_context",
}
_NONE_WORKS = -1
_MOST_TIMES = 20
"""How many times as long as the training step something else may take and still be looked at, in operators."""
_STEP_REMEDY = (
    "The traceback above shows the line. While pruning, this runs on single batches at any point of the fit; it has to "
    "work on every training batch and may not count on what was run before. If channels have gone since, it may use "
    "what no run had used until then: exclude what feeds that."
)
_EXAMPLE_REMEDY = (
    "It was called with `example_input_array`: make that fit `forward` (a tensor, a tuple of arguments or a dict of "
    "keyword arguments), or set it to None."
)


class Runs:
    """Runs a LightningModule on real batches without leaving a trace; see :class:`~lightning_prune.probe.probe.Probe`.

    Args:
        trainer: The Trainer in use, or None.
        pl_module: The user's module.
        cache: How many of the last observed batches to hold on to, by reference.
    """

    def __init__(self, trainer: Trainer | None, pl_module: LightningModule, cache: int = 8) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._observed: deque[Any] = deque(maxlen=cache)
        self._fixed: list[Any] = []
        self._others: dict[str, tuple[int, Any]] | None = None

    def observe(self, batch: Any) -> None:
        """Remember a batch of the running training, as ``on_train_batch_start`` gets it."""
        self._observed.append(batch)

    def refresh(self) -> None:
        """Drop the batch that programs run on; the next call of :meth:`programs` takes a newer one."""
        self._fixed.clear()

    def ready(self) -> bool:
        """Whether there is a real batch for :meth:`programs` already; fetches it if so.

        Raises:
            TraceError: If reading the data failed.
        """
        try:
            self._fixed_batch()
        except NoBatchError:
            return False
        return True

    def batches(self, count: int) -> list[Any]:
        """Real training batches on the right device.

        Args:
            count: How many are wanted, at least 1.

        Returns:
            The last observed batches and, where these are too few, shuffled ones of a new loader over the same data. At
            least one; fewer than ``count`` if there are no more.

        Raises:
            TraceError: If there is none, or reading the data failed.
        """
        recent = list(self._observed)[-count:]
        try:
            return recent + self._fresh(count - len(recent))
        except NoBatchError as error:
            if recent:
                return recent
            raise NoBatchError(
                f"There is no real batch to run {type(self._module).__name__} on: {error}. Start pruning after the "
                "first batch of training, or set `example_input_array` on the module."
            ) from error

    def programs(self) -> list[Program]:
        """Ways of running the network, all on one batch that is fetched once (see :meth:`refresh`).

        ``training_step`` in evaluation and in train mode, and ``forward`` on ``example_input_array`` in evaluation mode
        where that is set; ``forward`` in both modes where there is no batch to be had. Then what else hands something
        out, on the batch of training as far as that will do: ``validation_step``, ``predict_step``, and ``forward``
        where the training step does not call it in evaluation mode.

        Returns:
            Programs whose ``run()`` returns a dict: ``"return"`` is what the step or ``forward`` returned, ``"log"``
            the logged tensors by name, ``"backward"`` the tensors given to a backward pass, ``"outputs"`` the output of
            ``forward`` and of every called child of the module by name. What is logged or called again under the same
            name is ``name#2``. ``run()`` raises TraceError if the user's code fails.

        Raises:
            TraceError: If there is neither a batch nor an ``example_input_array``.
        """
        has_example = self._module.example_input_array is not None
        try:
            batch = self._fixed_batch()
        except NoBatchError:
            if not has_example:
                raise
            return [self._forward_program(training) for training in (False, True)]
        programs = [self._step_program(batch, training) for training in (False, True)]
        return programs + ([self._forward_program(False)] if has_example else []) + self._other_programs(batch)

    def example(self) -> Program:
        """``forward`` on ``example_input_array`` in evaluation mode."""
        return self._forward_program(False)

    def evaluations(self, count: int) -> list[Program]:
        """The first of :meth:`programs` on several batches: the training step in evaluation mode, without gradients.

        Args:
            count: Number of batches; see :meth:`batches`.

        Returns:
            A program for each batch; one on ``example_input_array`` where there is no batch to be had.

        Raises:
            TraceError: If there is neither.
        """
        if not self.ready():
            return self.programs()[:1]
        return [self._step_program(batch, False) for batch in self.batches(count)]

    def _fresh(self, count: int) -> list[Any]:
        if count <= 0:
            return []
        if self._trainer is None:
            raise NoBatchError("it is not attached to a Trainer")
        if is_param_in_hook_signature(self._module.training_step, "dataloader_iter", explicit=True):
            raise NoBatchError("its training_step takes the iterator `dataloader_iter` instead of a batch")
        seed = SEED + self._trainer.global_rank
        with self._sandbox("reading the training data", True), torch.no_grad():
            batches = list(fresh_batches(self._trainer, self._module, count, seed))
        if not batches:
            raise NoBatchError("the training loader is empty")
        return batches

    def _fixed_batch(self) -> Any:
        if not is_overridden("training_step", self._module):
            raise NoBatchError(f"{type(self._module).__name__} has no training_step and no example_input_array")
        if not self._fixed:
            self._fixed.append(copied(self.batches(1)[0]))
        return self._fixed[0]

    def _step_program(self, batch: Any, training: bool) -> Program:
        return self._program("training_step", training, lambda: self._training_step(copied(batch)), batch, _STEP_REMEDY)

    def _forward_program(self, training: bool) -> Program:
        example = self._module.example_input_array
        deployed = example is not None and not training
        return self._program("forward", training, self._forward, example, _EXAMPLE_REMEDY, deployed=deployed)

    def _other_programs(self, batch: Any) -> list[Program]:
        if self._others is None:
            try:
                self._others = self._find_others(batch)
            except PruneError:  # the training step itself fails, which is for those to say who run it
                self._others = {}
        return [
            self._program(name, False, partial(self._call, name, place, data), data, _STEP_REMEDY, restricts=True)
            for name, (place, own) in self._others.items()
            for data in [batch if own is None else own]
        ]

    def _find_others(self, batch: Any) -> dict[str, tuple[int, Any]]:
        """What else hands something out, with the number of the way to call it, and data if it needs its own."""
        wanted = [name for name in _PRECISION if is_overridden(name, self._module)]
        if not wanted:
            return {}
        operators = self._operators_of_training(batch)
        if "forward" in wanted and (self._module.example_input_array is not None or self._step_shows_forward(batch)):
            wanted.remove("forward")
        found: dict[str, tuple[int, Any]] = {}
        for name in wanted:
            place, own = self._way_to_call(name, batch, _MOST_TIMES * operators), None
            if place == _NONE_WORKS and name == "validation_step":
                own = self._validation_batch()
                place = place if own is None else self._way_to_call(name, own, _MOST_TIMES * operators)
            if place is not None:
                found[name] = max(place, 0), own
        return found

    def _validation_batch(self) -> Any:
        """A real batch of validation; None if there is none to be had without moving a loader."""
        if self._trainer is None or not self._trainer.limit_val_batches:
            return None
        try:
            with self._sandbox("reading the validation data", False), torch.no_grad():
                return validation_batch(self._trainer, self._module, SEED + self._trainer.global_rank)
        except PruneError:
            return None

    def _operators_of_training(self, batch: Any) -> int:
        """How many operators the training step executes."""
        count = OperatorCount()
        with self._sandbox("training_step", True) as record, torch.no_grad(), self._no_backward(record), count:
            self._training_step(copied(batch))
        return count.total

    def _step_shows_forward(self, batch: Any) -> bool:
        """Whether the training step calls ``forward`` in evaluation mode too, in which it may return something else."""
        try:
            with self._sandbox("training_step", False) as record, torch.no_grad(), self._no_backward(record):
                self._training_step(copied(batch))
        except PruneError:
            return False
        return "forward" in record.outputs

    def _way_to_call(self, name: str, batch: Any, most: int) -> int | None:
        """Number of the first way that works of calling something with a batch; None for what takes too long."""
        for place in range(len(_arguments(name, batch))):
            try:
                count = OperatorCount(most)
                with self._sandbox(name, False) as record, torch.no_grad(), self._no_backward(record), count:
                    self._call(name, place, batch)
            except TooManyOperatorsError:
                rank_zero_warn(
                    f"{name} of {type(self._module).__name__} executes more than {_MOST_TIMES} times as many operators "
                    f"as its training step, so it is not looked at: what only it hands out may be cut. Exclude that."
                )
                return None
            except PruneError:
                continue
            return place
        return _NONE_WORKS

    def _call(self, name: str, place: int, batch: Any) -> Any:
        called = self._module if name == "forward" else getattr(self._module, name)
        args, kwargs = _arguments(name, copied(batch))[place]
        if name != "forward":
            indices = (("batch_idx", 2), ("dataloader_idx", 3))
            args += tuple(0 for index, number in indices if is_param_in_hook_signature(called, index, min_args=number))
        with self._precision(_PRECISION[name]):
            return called(*args, **kwargs)

    def _program(
        self,
        what: str,
        training: bool,
        call: Callable[[], Any],
        data: Any,
        remedy: str,
        restricts: bool = False,
        deployed: bool = False,
    ) -> Program:
        name = f"{what} ({'train' if training else 'evaluation'} mode)"

        def run() -> dict[str, Any]:
            with self._sandbox(name, training, remedy) as record, torch.no_grad(), self._no_backward(record):
                returned = call()
            handed_out = {"return": returned, "log": record.logged, "backward": record.losses}
            return {**handed_out, "outputs": record.outputs}

        return Program(name, run, training, count_samples(data), _handed_out, restricts, deployed)

    def _training_step(self, batch: Any) -> Any:
        takes_index = is_param_in_hook_signature(self._module.training_step, "batch_idx", min_args=2)
        with self._precision("train_step_context"):
            return self._module.training_step(batch, 0) if takes_index else self._module.training_step(batch)

    def _forward(self) -> Any:
        example: Any = self._module.example_input_array
        with unobserved():
            example = copied(move_data_to_device(example, self._module.device))
            if self._trainer is not None:
                example = self._trainer.precision_plugin.convert_input(example)
        with self._precision("forward_context"):
            if isinstance(example, Mapping):
                return self._module(**example)
            return self._module(*(example if isinstance(example, (tuple, list)) else (example,)))

    def _precision(self, context: str) -> AbstractContextManager[Any]:
        if self._trainer is None or (is_exact() and isinstance(self._trainer.precision_plugin, MixedPrecision)):
            return nullcontext()
        entered: AbstractContextManager[Any] = getattr(self._trainer.precision_plugin, context)()
        return entered

    def _gradients_of(self, batch: Any, seed: int, backward: AbstractContextManager[Any]) -> dict[str, Tensor]:
        wanted = {name: p for name, p in self._module.named_parameters() if p.is_floating_point() or p.is_complex()}
        with self._sandbox("training_step (gradients)", True, seed=seed) as record, torch.enable_grad(), backward:
            for parameter in wanted.values():  # also of parts that are frozen now, which can be pruned all the same
                parameter.requires_grad_(True)
            returned = self._training_step(copied(batch))
            if self._module.automatic_optimization:
                self._loss_of(returned).backward()
            found = {name: record.stepped.get(p, p.grad) for name, p in wanted.items()}
            if all(gradient is None for gradient in found.values()):
                raise PruneError(
                    f"training_step of {type(self._module).__name__} ran no backward pass, so there is no gradient to "
                    "score by. Call `self.manual_backward(loss)` in it, or choose a criterion that needs no gradients."
                )
            return {name: _dense(wanted[name], gradient) for name, gradient in found.items()}

    def _no_backward(self, record: Record) -> NoBackward:
        return NoBackward(record.losses, self._module.parameters())

    def _is_distributed(self) -> bool:
        return self._trainer is not None and isinstance(self._trainer.strategy.model, DistributedDataParallel)

    def _loss_of(self, returned: Any) -> Tensor:
        loss = returned.get("loss") if isinstance(returned, Mapping) else returned
        if isinstance(loss, Tensor) and loss.requires_grad:
            return loss
        raise PruneError(
            f"training_step of {type(self._module).__name__} returned no loss that depends on the network (it returned "
            f"{type(returned).__name__}), so there is no gradient to score by. Return the loss, or a dict with the key "
            '"loss", or choose a criterion that needs no gradients.'
        )

    def _value_of_loss(self, returned: Any, handed_to_backward: Sequence[Tensor]) -> Tensor:
        loss = returned.get("loss") if isinstance(returned, Mapping) else returned
        losses = [loss] if self._module.automatic_optimization else handed_to_backward
        found = [part.detach().float().sum() for part in losses if isinstance(part, Tensor)]
        if found:
            return torch.stack(found).sum()
        raise PruneError(
            f"training_step of {type(self._module).__name__} gave no loss (it returned {type(returned).__name__}). "
            'Return the loss, or a dict with the key "loss", or with manual optimization call '
            "`self.manual_backward(loss)`."
        )

    @contextmanager
    def _sandbox(self, name: str, training: bool, remedy: str = _STEP_REMEDY, seed: int = SEED) -> Iterator[Record]:
        """A sandbox in which an error of the user's code says what was being run."""
        try:
            with sandbox(self._trainer, self._module, training, seed) as record:
                yield record
        except PruneError:
            raise
        except Exception as error:
            raise TraceError(
                f"{name} of {type(self._module).__name__} failed with {type(error).__name__}: {error}. {remedy}"
            ) from error


def _arguments(name: str, batch: Any) -> list[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """Arguments that something of a module may take, the likeliest first, when training gets such a batch."""
    whole: tuple[tuple[Any, ...], Mapping[str, Any]] = ((batch,), {})
    if name == "validation_step":
        return [whole]
    if isinstance(batch, Mapping):
        return [whole] if name == "predict_step" else [((), batch), whole]
    if isinstance(batch, (tuple, list)) and batch:
        inputs: tuple[tuple[Any, ...], Mapping[str, Any]] = ((batch[0],), {})
        return [whole, inputs] if name == "predict_step" else [inputs, (tuple(batch), {}), whole]
    return [whole]


def _dense(parameter: nn.Parameter, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return torch.zeros_like(parameter.detach())
    return (gradient.to_dense() if gradient.layout is not torch.strided else gradient).detach().clone()


def _handed_out(result: dict[str, Any]) -> Any:
    """What leaves the module; the outputs of its children stay inside."""
    outputs = {name: value for name, value in result["outputs"].items() if name.partition("#")[0] == "forward"}
    return {**result, "outputs": outputs}

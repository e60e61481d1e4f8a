"""The probe: runs the user's own training step on real batches for tracing, verification and scoring."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.cost import measure_latency
from lightning_prune.errors import PruneError, TraceError
from lightning_prune.graph.one_way import decomposed
from lightning_prune.graph.program import Program, copied, seed_everywhere
from lightning_prune.probe.backward import HessianBackward, LocalBackward, NoBackward
from lightning_prune.probe.flow import synaptic_flow
from lightning_prune.probe.inputs import InputSquares
from lightning_prune.probe.runs import SEED, Runs
from lightning_prune.probe.sandbox import called_children


class Probe(Runs):
    """Runs a LightningModule on real batches, in any hook of a fit, without leaving a trace.

    Batches come from the last ones that training saw, else from a new loader over the same data; the loader in use is
    never read. ``training_step`` is then called more often than training alone would, with ``batch_idx`` 0, and so are
    ``validation_step``, ``predict_step`` and ``forward``. Only what they do outside the module and the Trainer (files,
    objects of the user's own classes) lasts; see :func:`~lightning_prune.probe.sandbox.sandbox`.

    Args:
        trainer: The Trainer in use, or None for a module that is not attached to one; then ``example_input_array`` is
            all there is to run it on.
        pl_module: The user's module, not wrapped in anything.
        cache: How many of the last observed batches to hold on to, by reference.

    Example:
        >>> from lightning import LightningModule
        >>> from torch import nn
        >>> class Net(LightningModule):
        ...     example_input_array = torch.ones(2, 3)
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(3, 4)
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> evaluation, train = Probe(None, Net()).programs()
        >>> evaluation.name, train.name
        ('forward (evaluation mode)', 'forward (train mode)')
        >>> evaluation.run()["outputs"]["layer"].shape
        torch.Size([2, 4])
    """

    def gradients(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Gradients of the loss of real batches, in train mode.

        With manual optimization a parameter's gradient is the one that its optimizer steps with (summed where it steps
        several times), or what is left at the end of the step where it does not step.

        Args:
            count: Number of batches; see :meth:`batches`.

        Yields:
            For each batch the gradient of every parameter that requires one, by full name and of the parameter's shape;
            zeros where the loss does not depend on it. Not scaled, clipped or averaged over processes.

        Raises:
            PruneError: If the training step gives no loss.
            TraceError: If there is no batch or the user's code fails.
        """
        backward = LocalBackward(self._module.parameters()) if self._is_distributed() else nullcontext()
        for number, batch in enumerate(self.batches(count)):
            yield self._gradients_of(batch, SEED + number, backward)

    def hessian_vector(self, count: int, vectors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Products of a vector with the second derivatives of the losses whose gradients :meth:`gradients` gives.

        Args:
            count: Number of batches; see :meth:`batches`.
            vectors: The vector, by full name of the parameters; what is not named counts as zero.

        Yields:
            For each batch the product, by full name and of the parameter's shape; zeros for what ``vectors`` leaves
            out.

        Raises:
            PruneError: If the training step gives no loss, or one that cannot be differentiated twice.
            TraceError: If there is no batch or the user's code fails.
        """
        named = dict(self._module.named_parameters())
        backward = HessianBackward({named[name]: vector for name, vector in vectors.items()})
        for number, batch in enumerate(self.batches(count)):
            # Fused attention and the recurrent layers of cuDNN have no second derivative.
            with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
                products = self._gradients_of(batch, SEED + number, backward)
            yield products

    def input_squares(self, count: int, names: Collection[str]) -> dict[str, Tensor]:
        """Sum of the squares of all numbers that each weight is multiplied with on real batches.

        In evaluation mode, or where the training step fails in that (as those of detectors do), in train mode.

        Args:
            count: Number of batches; see :meth:`batches`.
            names: Full names of the parameters.

        Returns:
            Tensors of the parameters' shapes by full name; nothing for those that are no factor of a matrix product or
            convolution.

        Raises:
            TraceError: If there is no batch or the user's code fails.
        """
        try:
            return self._input_squares(self.evaluations(count), names)
        except TraceError:
            return self._input_squares([self._step_program(batch, True) for batch in self.batches(count)], names)

    def _input_squares(self, programs: list[Program], names: Collection[str]) -> dict[str, Tensor]:
        named = dict(self._module.named_parameters())
        seen = InputSquares({name: named[name] for name in names})
        with decomposed(seen), seen:
            for program in programs:
                program.run()
        return seen.squares()

    def synaptic_flow(self, names: Collection[str]) -> dict[str, Tensor]:
        """Derivatives of the summed outputs of the network made positive, with respect to its parameters.

        Parameters and buffers count with their absolute values, in double precision if the network can be run in that;
        evaluation mode; inputs are ones, but for whole numbers. Outputs are those of ``forward`` on
        ``example_input_array`` or of the first call in ``training_step``. Where ``forward`` is not called, or leaves
        some of the parameters out, they are those of the children that the step calls.

        Args:
            names: Full names of the parameters.

        Raises:
            PruneError: If some of them have no part in the outputs.
            TraceError: If the user's code fails on that.
        """
        try:
            return self._synaptic_flow(names, torch.float64)
        except TraceError:
            return self._synaptic_flow(names, None)

    def _synaptic_flow(self, names: Collection[str], dtype: torch.dtype | None) -> dict[str, Tensor]:
        parts = [child for _, child in called_children(self._module)]
        found: dict[str, Tensor] = {}
        for whole in (True, False):
            run = self._forward if whole and self._module.example_input_array is not None else self._step_without_loss
            with self._sandbox("the network on an input of ones", False):
                found = synaptic_flow(self._module, run, parts, whole, dtype)
            if all(name in found for name in names):
                return {name: found[name] for name in names}
        unreached = ", ".join(name for name in names if name not in found)
        raise PruneError(
            f"no output of {type(self._module).__name__} depends on {unreached}, so nothing flows through it. Exclude "
            "it, set `example_input_array` on the module, or choose a criterion that looks at weights only, such as "
            '"lamp".'
        )

    def _step_without_loss(self) -> None:
        with NoBackward([], self._module.parameters()):
            self._training_step(copied(self._fixed_batch()))

    def loss(self, batches: Sequence[Any]) -> float:
        """Mean loss of the given batches, in train mode and with the same random numbers at every call.

        With manual optimization the loss of a batch is the sum of all that a backward pass starts from. All processes
        of a distributed run must call this together; they get the same mean.

        Args:
            batches: Real batches, as from :meth:`batches`.

        Raises:
            PruneError: If the training step gives no loss.
            TraceError: If the user's code fails.
        """
        found = []
        with self._sandbox("training_step (loss)", True) as record:
            for number, batch in enumerate(batches):
                seed_everywhere(SEED + number)
                with torch.no_grad(), self._no_backward(record):
                    returned = self._training_step(copied(batch))
                found.append(self._value_of_loss(returned, record.losses))
                for kept in (record.outputs, record.logged, record.losses):
                    kept.clear()  # else all outputs of all batches would pile up
        return float(self._mean_over_processes(torch.stack(found).mean()))

    def latency(self, repeats: int = 30) -> float:
        """Measured time in seconds of one run in evaluation mode, on the batch of :meth:`programs`; a median.

        Args:
            repeats: Number of timed runs.

        Raises:
            TraceError: If the user's code fails.
        """
        has_example = self._module.example_input_array is not None
        batch = None if has_example else copied(self._fixed_batch())
        with self._sandbox("latency", False) as record, torch.no_grad(), self._no_backward(record):
            return measure_latency(lambda: self._forward() if has_example else self._training_step(batch), repeats)

    def reestimate_batch_norm(self, count: int) -> None:
        """Replace the running statistics of batch-norms by the plain average over real batches.

        Batch-norms that stay in evaluation mode during training, or that no batch reaches, are left alone. Everything
        else is as before afterwards. All processes of a distributed run must call this together.

        Args:
            count: Number of batches; see :meth:`batches`.

        Raises:
            TraceError: If there is no batch or the user's code fails.
        """
        norms = [m for m in self._module.modules() if isinstance(m, _BatchNorm) and self._follows_data(m)]
        if not norms:
            return
        batches = self.batches(count)
        with self._sandbox("training_step (batch-norm statistics)", True) as record:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
            for number, batch in enumerate(batches):
                seed_everywhere(SEED + number)
                with torch.no_grad(), self._no_backward(record):
                    self._training_step(copied(batch))
            estimates = [(statistic, statistic.clone()) for norm in norms for statistic in _estimated(norm)]
        with torch.no_grad():
            for statistic, estimate in estimates:
                statistic.copy_(self._mean_over_processes(estimate))

    def _follows_data(self, norm: _BatchNorm) -> bool:
        return norm.track_running_stats and (norm.training or not self._module.training)

    def _mean_over_processes(self, value: Tensor) -> Tensor:
        if self._trainer is None:
            return value
        mean: Tensor = self._trainer.strategy.reduce(value, reduce_op="mean")
        return mean


def _estimated(norm: _BatchNorm) -> tuple[Tensor, ...]:
    """The running statistics of a batch-norm, if any batch reached it since they were reset."""
    if norm.num_batches_tracked is None or norm.running_mean is None or norm.running_var is None:
        return ()
    return (norm.running_mean, norm.running_var) if norm.num_batches_tracked > 0 else ()

"""Training steps that are watched and added to, without a trace on the user's module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from lightning_prune.choices import unknown_name
from lightning_prune.errors import ConfigurationError
from lightning_prune.graph.program import tensors_in
from lightning_prune.probe.sandbox import called_children


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Args:
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: What it returned.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    def again(self, module: nn.Module) -> Any:
        """Call another module with the same arguments."""
        return module(*self.args, **self.kwargs)


@dataclass
class Seen:
    """What was seen while a module ran.

    Attributes:
        calls: Calls of the watched part, in order.
        features: Outputs of other parts by name.
    """

    calls: list[Call] = field(default_factory=list)
    features: dict[str, list[Any]] = field(default_factory=dict)


@contextmanager
def watched(module: nn.Module, path: str, features: Collection[str]) -> Iterator[Seen]:
    """See the calls of a part of a module, and what other parts return.

    Args:
        module: The module.
        path: Name of the part; empty for the module itself.
        features: Names of the other parts.
    """
    seen = Seen(features={name: [] for name in features})
    part = module.get_submodule(path)

    def note(_part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.calls.append(Call(args, kwargs, output))

    handles = [part.register_forward_hook(note, with_kwargs=True)]
    for name, found in seen.features.items():
        append = found.append
        handles.append(module.get_submodule(name).register_forward_hook(lambda _m, _i, out, append=append: append(out)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def extend_step(trainer: Trainer, extended: Callable[[Callable[..., Any], tuple[Any, ...]], Any]) -> None:
    """Have something else done for each training step until :func:`restore_step`.

    It hangs on the strategy, through which only the training loop comes by: probes of the training step see that alone.

    Args:
        trainer: The Trainer.
        extended: Gets the step and its arguments, and returns what the step is to return.
    """
    step = trainer.strategy.training_step
    trainer.strategy.training_step = partial(_run, extended, step)  # type: ignore[method-assign]


def _run(extended: Callable[..., Any], step: Callable[..., Any], *args: Any) -> Any:
    return extended(step, args)


def restore_step(trainer: Trainer) -> None:
    """Undo :func:`extend_step`."""
    vars(trainer.strategy).pop("training_step", None)


def outputs_of(trainer: Trainer, path: str, seen: Seen) -> list[Call]:
    """The calls that a loss may have been computed from.

    Raises:
        ConfigurationError: If there are none.
    """
    module = trainer.lightning_module
    calls = seen.calls
    if not path and trainer.strategy.model is not module:
        calls = calls[:-1]  # the last is that of the training step itself, through the wrapper of DDP
    calls = [call for call in calls if one_tensor(call.output, path).requires_grad]
    if calls:
        return calls
    called = f"its {path!r}" if path else "its forward, as `self(...)`,"
    parts = ", ".join(name for name, _ in called_children(module))
    raise ConfigurationError(
        f"training_step of {type(module).__name__} did not call {called} with gradients, so there is no output to "
        f"compare with that of a teacher. Name the submodule that makes the output in output_of; there are: {parts}."
    )


def one_tensor(output: Any, path: str) -> Tensor:
    """The only tensor of real numbers in what a part of a network returned.

    Raises:
        ConfigurationError: If there is none, or there are several.
    """
    found = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    if len(found) != 1:
        raise ConfigurationError(
            f"{path or 'forward'} returned {len(found)} tensors of real numbers, and just one can be compared with "
            f"that of a teacher. Name a submodule that returns one in output_of."
        )
    return found[0]


def check_watchable(trainer: Trainer, module: LightningModule, paths: Sequence[str]) -> None:
    """See whether the training steps of a fit can be watched and added to.

    Args:
        trainer: The Trainer.
        module: The user's module.
        paths: Names of its parts that are to be watched.

    Raises:
        ConfigurationError: If not.
    """
    strategy, name = trainer.strategy, type(module).__name__
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise ConfigurationError(
            f"{type(strategy).__name__} shards the parameters, so a teacher cannot be copied from the network. Distil "
            f"with strategy='ddp' or on one device."
        )
    if not module.automatic_optimization:
        raise ConfigurationError(
            f"{name} optimizes manually, so its loss cannot be added to from outside. Use automatic optimization, or "
            f"call the losses in lightning_prune.distillation in training_step."
        )
    parts = dict(module.named_modules())
    for path in paths:
        if path not in parts:
            raise unknown_name(f"module of {name}", path, parts)
        above = [parts[".".join(path.split(".")[:n])] for n in range(1, len(path.split(".")) + 1)] if path else []
        compiled = [p for p in above if isinstance(p, OptimizedModule) or p._compiled_call_impl is not None]
        if compiled or module._compiler_ctx is not None:
            raise ConfigurationError(
                f"{path or name} is compiled, and compiled code does not show what a part of it returns. Compile "
                f"submodules of what is compared with the teacher, or nothing."
            )

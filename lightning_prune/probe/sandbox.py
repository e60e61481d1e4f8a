"""A place to run the user's own training step where nothing it does lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import isfunction
from itertools import count
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from lightning_prune.errors import TraceError
from lightning_prune.graph.observation import unobserved
from lightning_prune.graph.program import preserved, seed_everywhere
from lightning_prune.probe.optimizers import optimizers_of
from lightning_prune.probe.snapshot import Snapshot


@dataclass
class Record:
    """What a run handed to the outside.

    Attributes:
        outputs: Output of ``forward`` and of each child that was called, by name; the second call is ``name#2``.
        logged: Tensors given to ``log`` and ``log_dict``, by name.
        losses: Tensors whose ``backward`` was called and left out (filled by whoever leaves it out).
        stepped: Gradient with which each parameter would have been stepped, summed over the steps of its optimizer.
    """

    outputs: dict[str, Any] = field(default_factory=dict)
    logged: dict[str, Tensor] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    stepped: dict[nn.Parameter, Tensor] = field(default_factory=dict)


class SilentLogger(DummyLogger):
    """Stands in for a logger: tells where that one writes, and writes nothing.

    Args:
        original: The logger to stand in for.
    """

    def __init__(self, original: Logger) -> None:
        super().__init__()
        self._original = original

    @property
    def name(self) -> Any:
        """Name of the original."""
        return self._original.name

    @property
    def version(self) -> Any:
        """Version of the original."""
        return self._original.version

    @property
    def save_dir(self) -> str | None:
        """Directory of the original."""
        return self._original.save_dir

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._original, name)
        return _do_nothing if callable(value) else value


@contextmanager
def sandbox(trainer: Trainer | None, pl_module: LightningModule, training: bool, seed: int) -> Iterator[Record]:
    """Run anything of ``pl_module`` without a lasting effect.

    Nothing reaches a log, metric, optimizer (of whose class no method but torch's is run), scheduler or logger.
    Parameters, buffers, gradients, modes, metric states and other attributes of the module and the random state are
    put back afterwards (see :class:`Snapshot` for what is not). Compiled modules run uncompiled, because they would
    ignore hooks that were added late.

    Args:
        trainer: The Trainer that ``pl_module`` is attached to, if any.
        pl_module: The user's module, not wrapped in anything.
        training: Train mode, with modules left in evaluation mode if they are so during training; or evaluation mode.
        seed: Seed of the random state inside.

    Yields:
        What was logged, returned and so on so far.

    Raises:
        TraceError: If a lazy parameter or buffer has no shape yet.
    """
    _refuse_lazy(pl_module)
    record = Record()
    stack = ExitStack()
    try:
        with unobserved():
            stack.callback(Snapshot(pl_module).restore)
            stack.enter_context(isolate_rng())
            stack.enter_context(preserved(pl_module, None if training and pl_module.training else training))
            stack.callback(_restorer_of_requires_grad(pl_module))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            _silence_module(pl_module, record)
            _watch_outputs(stack, pl_module, record)
            for optimizer in optimizers_of(trainer, pl_module):
                _silence_optimizer(stack, optimizer, _stepping_methods(optimizer), record)
            if trainer is not None:
                _silence_trainer(stack, trainer, pl_module, record)
            seed_everywhere(seed)
        yield record
    finally:
        with unobserved():
            stack.close()


def _refuse_lazy(pl_module: LightningModule) -> None:
    for name, tensor in [*pl_module.named_parameters(), *pl_module.named_buffers()]:
        if is_lazy(tensor):
            raise TraceError(
                f"{name!r} of {type(pl_module).__name__} is lazy and has no shape yet. Run one batch through the "
                "network before the Trainer gets it, so that every lazy module knows its size."
            )


def _silence_module(pl_module: LightningModule, record: Record) -> None:
    """Replace what reaches out of the module; these attributes go when the snapshot is restored."""

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(value, Tensor):
            record.logged[_unused(name, record.logged)] = value

    def log_dict(dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        if isinstance(dictionary, Mapping):
            for name, value in dictionary.items():
                log(name, value)

    def manual_backward(loss: Any, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)

    vars(pl_module).update(
        log=log,
        log_dict=log_dict,
        manual_backward=manual_backward,
        clip_gradients=_do_nothing,
        print=_do_nothing,
        _current_fx_name="training_step",
    )


def _watch_outputs(stack: ExitStack, pl_module: LightningModule, record: Record) -> None:
    def watcher(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def watch(_module: nn.Module, _inputs: Any, output: Any) -> None:
            record.outputs[_unused(name, record.outputs)] = output

        return watch

    for name, module in [("forward", pl_module), *called_children(pl_module)]:
        if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
            continue
        stack.callback(module.register_forward_hook(watcher(name)).remove)


def called_children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The direct children but metrics; of a mere container, which is never called itself, its children."""
    for name, child in module.named_children():
        if isinstance(child, (Metric, MetricCollection)):
            continue
        if getattr(child.forward, "__func__", None) is nn.Module.forward:
            yield from called_children(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _silence_trainer(stack: ExitStack, trainer: Trainer, pl_module: LightningModule, record: Record) -> None:
    loggers = trainer.loggers
    stack.callback(lambda: setattr(trainer, "loggers", loggers))
    trainer.loggers = [SilentLogger(logger) for logger in loggers]

    wrapped = pl_module.optimizers()
    for wrapper in wrapped if isinstance(wrapped, list) else [wrapped]:
        _silence_optimizer(stack, wrapper, _stepping_methods(getattr(wrapper, "optimizer", wrapper)), record)
    for config in trainer.lr_scheduler_configs:
        stack.enter_context(_replaced(config.scheduler, "step", _do_nothing))


def _silence_optimizer(stack: ExitStack, optimizer: Any, methods: Iterable[str], record: Record) -> None:
    for name in methods:
        stack.enter_context(_replaced(optimizer, name, _recorder_of_steps(optimizer, record)))


def _stepping_methods(optimizer: Any) -> set[str]:
    """``step``, and what else the class of an optimizer does that torch's do not: a step in several parts, say."""
    kinds = [kind for kind in type(optimizer).__mro__ if issubclass(kind, Optimizer)]
    own = [kind for kind in kinds if not kind.__module__.startswith("torch.optim")]
    found = {name for kind in own for name, value in vars(kind).items() if isfunction(value)}
    return {"step"} | {name for name in found - vars(Optimizer).keys() if not name.startswith("__")}


def _recorder_of_steps(optimizer: Any, record: Record) -> Callable[..., Any]:
    def step(closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = closure() if callable(closure) else None
        with unobserved():
            for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
                if parameter.grad is not None:
                    earlier = record.stepped.get(parameter)
                    gradient = parameter.grad.detach()
                    record.stepped[parameter] = gradient.clone() if earlier is None else earlier + gradient
        return result

    return step


@contextmanager
def _replaced(target: object, name: str, value: object) -> Iterator[None]:
    """Set an instance attribute and restore what the instance had, be it nothing."""
    attributes = vars(target)
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = value
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(before)


def _restorer_of_requires_grad(module: nn.Module) -> Callable[[], None]:
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]

    def restore() -> None:
        for parameter, flag in flags:
            parameter.requires_grad = flag

    return restore


def _unused(name: str, taken: Mapping[str, object]) -> str:
    return name if name not in taken else next(n for n in (f"{name}#{i}" for i in count(2)) if n not in taken)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None

"""The command line: ``lightning-prune demo | fit | validate | test | predict | inspect | report | export``."""

from __future__ import annotations

import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any, TypeVar, Union

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning import LightningDataModule, LightningModule
from torch import nn

from lightning_prune.__about__ import __version__
from lightning_prune.budget import Limits, reachable
from lightning_prune.callbacks.channels import ChannelPruning
from lightning_prune.choices import unknown_name
from lightning_prune.cost import CostModel
from lightning_prune.criteria import CriterionName
from lightning_prune.demo import run_demo
from lightning_prune.errors import ConfigurationError, PruneError
from lightning_prune.export import FORMATS, export, target_of
from lightning_prune.graph.analysis import Norms
from lightning_prune.graph.channels import ChannelGraph
from lightning_prune.lightning_cli import PruneCLI
from lightning_prune.probe import Probe
from lightning_prune.report import PruneReport
from lightning_prune.sensitivity import SHARES, measure_sensitivity, validation_batches
from lightning_prune.surgery import trace, trace_programs
from lightning_prune.text import format_count

_LIGHTNING = ("fit", "validate", "test", "predict")
_OF_SENSITIVITY = ("data", "data_init", "batches", "criterion", "shares", "patterns", "monitor", "tolerate", "save")
_Patterns = Union[list[str], str]  # noqa: UP007 - jsonargparse takes what is no list as one pattern
Made = TypeVar("Made")


def _parser(command: str, description: str | None, example: str) -> ArgumentParser:
    prog = f"lightning-prune {command}"
    return ArgumentParser(prog=prog, description=description, epilog=f"example: {prog} {example}")


def _model_parser(command: str, description: str | None, example: str) -> ArgumentParser:
    parser = _parser(command, description, example)
    parser.add_argument("model", type=str, help="import path of a module class, or of a function that makes a module")
    parser.add_argument(
        "--init",
        type=dict[str, Any],
        default={},
        help="arguments to make it with, as JSON or YAML; objects by class_path and init_args",
    )
    parser.add_argument(
        "--shape",
        type=list[int],
        default=None,
        help="shape of an input with its batch dimension, such as [2,3,224,224]; not needed with example_input_array",
    )
    return parser


def _make_model(path: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Make the module that an import path names.

    Raises:
        ConfigurationError: If there is no such thing, or it makes no module.
    """
    return _make(path, arguments, nn.Module, "torch module", "--init")


def _make(path: str, arguments: Mapping[str, Any], kind: type[Made], what: str, option: str) -> Made:
    """Make what an import path names, which must be of some kind, with the arguments that an option gives."""
    sys.path.insert(0, str(Path.cwd()))
    module_path, _, name = path.rpartition(".")
    if not module_path:
        raise ConfigurationError(f"'{path}' is no import path: give all of it, such as my_package.{path}")
    try:
        module = __import__(module_path, fromlist=[name])
    except (ImportError, ValueError) as error:
        raise ConfigurationError(f"cannot import '{module_path}' of '{path}': {error}") from error
    if not hasattr(module, name):
        raise unknown_name(f"name in {module_path}", name, [n for n in dir(module) if not n.startswith("_")])
    made = _called(path, getattr(module, name), _with_objects(arguments, option), option)
    if not isinstance(made, kind):
        raise ConfigurationError(f"'{path}' makes a {type(made).__name__}, not a {what}")
    return made


def _with_objects(arguments: Mapping[str, Any], option: str) -> dict[str, Any]:
    """Arguments with what they name by ``class_path`` and ``init_args``, as in a config, in place of these.

    The parser itself leaves those that it cannot make as they are, without a word of what is wrong with them.
    """
    return {key: _made(value, option) for key, value in arguments.items()}


def _made(value: Any, option: str) -> Any:
    if isinstance(value, Namespace):  # what the parser takes for an object
        value = value.as_dict()
    if isinstance(value, list):
        return [_made(item, option) for item in value]
    if not isinstance(value, dict):
        return value
    if "class_path" in value and value.keys() <= {"class_path", "init_args"}:
        return _make(value["class_path"], value.get("init_args") or {}, object, "object", option)
    return _with_objects(value, option)


def _called(path: str, maker: Any, arguments: Mapping[str, Any], option: str) -> Any:
    """What a class or function makes of the arguments."""
    if not callable(maker):
        raise ConfigurationError(f"'{path}' is a {type(maker).__name__}: name a class, or a function that makes one")
    try:
        return maker(**arguments)
    except PruneError:
        raise
    except Exception as error:
        for name in arguments:
            if isinstance(error, TypeError) and (known := _parameters(maker)) and name not in known:
                raise unknown_name(f"{option} argument", name, known) from error
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigurationError(
            f"'{path}' could not be made: {type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})."
            f" Its arguments are given with {option}, such as {option} '{{\"width\": 8}}'."
        ) from error


def _parameters(maker: Callable[..., Any]) -> list[str]:
    """Names of all arguments; none where any name will do, or where they are not known."""
    try:
        parameters = inspect.signature(maker).parameters
    except ValueError:
        return []
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return [] if takes_any else list(parameters)


def _example_input(model: nn.Module, shape: Sequence[int] | None) -> Any:
    if shape is not None:
        return torch.randn(*shape)
    example = getattr(model, "example_input_array", None)
    if example is None:
        raise ConfigurationError("give the shape of an input with --shape, such as --shape [2,3,224,224]")
    return example


def inspect_command(args: Sequence[str]) -> None:
    """Print groups, refusals and costs of a network, and on request how sensitive it is, without training it."""
    parser = _model_parser("inspect", inspect_command.__doc__, "my_package.MyNetwork --shape '[2,3,224,224]'")
    parser.add_argument(
        "--norms",
        type=Norms,
        default="exact",
        help="what layer, group and RMS norms take their statistics over stays whole (exact) or may go (approximate)",
    )
    parser.add_argument(
        "--inner",
        type=_Patterns,
        default=[],
        help="patterns of modules that make queries, keys or values: equal positions of all heads go, not whole heads",
    )
    parser.add_argument("--checkpoint", type=str, default=None, help="a checkpoint file of that module, to load first")
    parser.add_argument(
        "--sensitivity", action="store_true", help="measure the loss with ever fewer units of each group"
    )
    parser.add_argument("--data", type=str, default=None, help="import path of a data module to validate on")
    parser.add_argument("--data_init", type=dict[str, Any], default={}, help="arguments to make it with")
    parser.add_argument("--batches", type=int, default=4, help="number of validation batches")
    parser.add_argument("--criterion", type=CriterionName, default="l2", help="which units of a group go first")
    parser.add_argument("--shares", type=list[float], default=list(SHARES), help="shares of a group to take away")
    parser.add_argument("--patterns", type=_Patterns, default=None, help="groups to cut together; default: each alone")
    parser.add_argument("--monitor", type=str, default=None, help="what validation_step logs, instead of the loss")
    parser.add_argument("--tolerate", type=str, default=None, help="rise of the loss, such as 0.05 or 5%, for ratios")
    parser.add_argument("--save", type=str, default=None, help="folder to write table, CSV and figure to")
    options = parser.parse_args(list(args))
    for name in ("inner", "patterns"):
        if isinstance(options[name], str):
            options[name] = [options[name]]
    if not options.sensitivity:
        for name in _OF_SENSITIVITY:
            if options[name] != parser.get_default(name):
                raise ConfigurationError(f"--{name} says how to measure the sensitivity: add --sensitivity to do that")
    model = _make_model(options.model, options.init)
    if options.checkpoint is not None:
        model = _loaded(options.model, options.init, Path(options.checkpoint))
    elif options.sensitivity:
        print(
            f"lightning-prune: without --checkpoint, '{options.model}' is measured with the weights that it is made "
            f"with; if these are random, the sensitivity says nothing of the network once it is trained",
            file=sys.stderr,
        )
    batches = _validation_batches(model, options) if options.sensitivity else []
    graph = _graph(model, options, batches)
    _print_graph(model, graph)
    if options.sensitivity:
        _print_sensitivity(model, graph, batches, options)


def _validation_batches(model: nn.Module, options: Namespace) -> list[Any]:
    if not isinstance(model, LightningModule):
        raise ConfigurationError(
            f"'{options.model}' is no LightningModule, which would know its loss; in Python, measure_sensitivity takes "
            "a loss function"
        )
    data = None
    if options.data is not None:
        data = _make(options.data, options.data_init, LightningDataModule, "LightningDataModule", "--data_init")
    return validation_batches(model, data, options.batches)


def _graph(model: nn.Module, options: Namespace, batches: Sequence[Any]) -> ChannelGraph:
    if isinstance(model, LightningModule) and options.shape is None:
        probe = Probe(None, model)
        for batch in batches:
            probe.observe(batch)
        if batches or model.example_input_array is not None:
            return trace_programs(model, probe.programs(), options.norms, options.inner)
    return trace(model, _example_input(model, options.shape), norms=options.norms, inner=options.inner)


def _print_graph(model: nn.Module, graph: ChannelGraph) -> None:
    cost = CostModel(graph, [name for name, _ in model.named_parameters()])
    print(f"{graph}\n")
    for measure, what in ((cost.parameters, "parameters"), (cost.macs, "MACs for one sample")):
        whole = measure(graph.widths)
        least = reachable(graph.groups, widths=graph.widths, original=graph.widths, cost=measure, limits=Limits())
        share = math.floor(1000 * (1 - least / max(whole, 1)) + 1e-6) / 10  # rounded down: so much can be asked for
        print(f"{format_count(whole)} {what}, of which at most {share}% can go")


def _print_sensitivity(model: nn.Module, graph: ChannelGraph, batches: Sequence[Any], options: Namespace) -> None:
    tolerated = None if options.tolerate is None else _tolerated(options.tolerate)
    found = measure_sensitivity(
        model, graph, batches, None, options.criterion, options.shares, options.patterns, options.monitor
    )
    print(f"\n{found.table()}")
    if tolerated is not None:
        ratios = found.ratios(*tolerated)
        arguments = {"criterion": options.criterion, "norms": options.norms, "inner": options.inner}
        arguments |= {"include": None if options.patterns is None else [*ratios], "ratios": ratios}
        defaults = inspect.signature(ChannelPruning).parameters
        line = ", ".join(f"{name}={v!r}" for name, v in arguments.items() if (v or None) != defaults[name].default)
        print(f"\nfor a rise of {options.tolerate} where one of these is cut alone\nChannelPruning({line})")
    if options.save is not None:
        for note in found.save(options.save):
            print(note)


def _tolerated(rise: str) -> tuple[float, bool]:
    """A rise such as ``0.05`` or ``5%``, and whether it is relative."""
    relative = rise.endswith("%")
    try:
        return float(rise.removesuffix("%")) / (100 if relative else 1), relative
    except ValueError as error:
        raise ConfigurationError(f"--tolerate is a rise of the loss such as 0.05 or 5%, but is '{rise}'") from error


def report_command(args: Sequence[str]) -> None:
    """Print the report of a fit, or write it in other forms."""
    parser = _parser("report", report_command.__doc__, "checkpoints/ --save figures/")
    parser.add_argument("path", type=str, help="a report.json, or the folder it lies in")
    parser.add_argument("--save", type=str, default=None, help="folder to write table, CSV and figure to")
    options = parser.parse_args(list(args))
    path = Path(options.path)
    report = PruneReport.from_json(path / "report.json" if path.is_dir() else path)
    print(report.table())
    if options.save is not None:
        for note in report.save(options.save):
            print(note)


def export_command(args: Sequence[str]) -> None:
    """Write the network of a pruned checkpoint in a form that needs no library to load."""
    parser = _model_parser(
        "export", export_command.__doc__, "my_package.MyNetwork pruned.ckpt --format onnx --shape '[1,3,224,224]'"
    )
    parser.add_argument("checkpoint", type=str, help="a checkpoint file of that module")
    parser.add_argument("--format", type=str, default="pt2", help=f"one of {', '.join(FORMATS)}")
    parser.add_argument("--out", type=str, default=None, help="file to write; default: beside the checkpoint")
    parser.add_argument(
        "--dtype", type=str, default=None, help="type of an input with --shape, such as int64 of tokens"
    )
    parser.add_argument(
        "--dynamic_batch", type=bool, default=True, help="leave the batch size open; else it is that of --shape"
    )
    options = parser.parse_args(list(args))
    checkpoint, target = Path(options.checkpoint), target_of(options.out or options.checkpoint, options.format)
    if not checkpoint.is_file():
        what = "is a folder, not a checkpoint file" if checkpoint.is_dir() else "does not exist"
        raise ConfigurationError(f"the checkpoint {checkpoint} {what}")
    if target.resolve() == checkpoint.resolve():
        raise ConfigurationError(
            f"the export would overwrite the checkpoint {checkpoint}; name another file with --out"
        )
    model = _loaded(options.model, options.init, checkpoint)
    example = None if options.format == "state_dict" else _example_input(model, options.shape)
    if example is not None and options.shape is not None and options.dtype is not None:
        example = torch.zeros(options.shape, dtype=_dtype(options.dtype))
    print(export(model, options.format, example, target, dynamic_batch=options.dynamic_batch))


def _loaded(path: str, arguments: Mapping[str, Any], checkpoint: Path) -> LightningModule:
    """A checkpoint in its class, made with the saved hyperparameters, or in what a function makes."""
    from lightning_prune.checkpoint import load_pruned

    sys.path.insert(0, str(Path.cwd()))
    try:
        kind = locate(path)
    except ErrorDuringImport as error:
        raise ConfigurationError(f"cannot import '{path}': {error}") from error
    if isinstance(kind, type) and issubclass(kind, LightningModule):
        load = partial(load_pruned, checkpoint, kind, map_location="cpu", **_with_objects(arguments, "--init"))
    else:
        made = _make_model(path, arguments)
        if not isinstance(made, LightningModule):
            raise ConfigurationError(f"'{path}' is no LightningModule")
        load = partial(load_pruned, checkpoint, made)
    try:
        return load()
    except PruneError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"cannot load {checkpoint} into '{path}' ({type(error).__name__}: {error}). It must be a checkpoint of "
            f"that class; arguments that it does not hold are given with --init, such as --init '{{\"width\": 8}}'."
        ) from error


def _dtype(name: str) -> torch.dtype:
    known = {n: value for n, value in vars(torch).items() if isinstance(value, torch.dtype)}
    if name not in known:
        raise unknown_name("dtype", name, known)
    return known[name]


def demo_command(args: Sequence[str]) -> None:
    """Prune a small network on scikit-learn's digits inside one fit, and show what came of it."""
    parser = _parser("demo", demo_command.__doc__, "--epochs 20 --out prune-demo")
    parser.add_function_arguments(run_demo, as_group=False)
    run_demo(**parser.parse_args(list(args)).as_dict())


_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": demo_command,
    "inspect": inspect_command,
    "report": report_command,
    "export": export_command,
}


def _usage() -> str:
    lines = [f"lightning-prune {__version__}", "", "usage: lightning-prune COMMAND [options]"]
    lines += ["       COMMAND --help tells more", ""]
    lines += [f"  {name:<10} {command.__doc__}" for name, command in _COMMANDS.items()]
    lightning = "As in LightningCLI: --config FILE, --model CLASS, --data CLASS, ..."
    lines += [f"  {name:<10} {lightning}" for name in _LIGHTNING]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: Words after the program's name; default: those of the process.

    Returns:
        Exit status: 0, or 2 after an error of the user's.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    try:
        if words[0] in _LIGHTNING:
            PruneCLI(words)
        elif words[0] in _COMMANDS:
            _COMMANDS[words[0]](words[1:])
        else:
            raise unknown_name("command", words[0], [*_COMMANDS, *_LIGHTNING])
    except PruneError as error:
        print(f"lightning-prune: {error}", file=sys.stderr)
        return 2
    return 0

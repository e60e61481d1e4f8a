"""Imports go one way, and only the last floor of the house knows Lightning."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torchvision

import lightning_prune

ROOT = Path(lightning_prune.__file__).parent
FLOORS = [
    {"errors", "__about__", "text", "choices", "compiled", "figures"},
    {"graph"},
    {"surgery"},
    {"masks", "weight_masks", "criteria", "budget", "weight_budget", "schedules", "reinit", "cost", "report"}
    | {
        "annealing",
        "bayes",
        "branches",
        "buckets",
        "distillation",
        "effective",
        "gated_training",
        "growth",
        "lion",
        "normalised_sgd",
        "patterns",
        "penalties",
    }
    | {"penalties", "projection", "reparameterise", "rewiring", "scoring", "search", "subnet_search", "threshold_net"},
    {"probe", "sensitivity", "checkpoint", "callbacks", "datamodules", "export", "recipes"},
    {"lightning_cli", "demo", "cli", "__init__", "__main__"},
]
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
KNOWS_LIGHTNING = (FLOORS[-2] | FLOORS[-1]) - {"export"}
FAMILIES = re.compile(
    r"resnet|resnext|res2net|vgg|mobilenet|mnasnet|densenet|alexnet|googlenet|inception|squeezenet|shufflenet|ghostnet"
    r"|efficientnet|convnext|convmixer|regnet|nfnet|\bxception|maxvit|swin|vision_?transformer|deit|\bvit\b|\bvit_"
    r"|\btimm\b|torchvision\.models",
    re.IGNORECASE,
)
FILES = {path.relative_to(ROOT).with_suffix("").parts: path for path in sorted(ROOT.rglob("*.py"))}


def floor(part):
    return next(number for number, parts in enumerate(FLOORS) if part in parts)


def imported(path):
    """Names of the modules that a file really imports (not those that only type checkers see)."""
    found = []
    pending = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            whole = node.module == "lightning_prune"
            found += [f"{node.module}.{alias.name}" for alias in node.names] if whole else [node.module]
        pending.extend(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("parts", FILES, ids=".".join)
def test_imports_go_one_way(parts) -> None:
    for name in imported(FILES[parts]):
        package, _, rest = name.partition(".")
        if package == "lightning_prune" and rest:
            assert floor(rest.split(".")[0]) <= floor(parts[0]), f"{'.'.join(parts)} imports {name}"
        if package in LIGHTNING:
            assert parts[0] in KNOWS_LIGHTNING, f"{'.'.join(parts)} imports {name}"


def test_every_part_of_the_package_has_its_floor() -> None:
    assert {parts[0] for parts in FILES} <= set().union(*FLOORS)


def test_the_walk_sees_imports(tmp_path) -> None:
    source = "if TYPE_CHECKING:\n    import unseen\nimport a.b\ndef f():\n    from c.d import e\n"
    source += "from lightning_prune import masks\n"
    path = tmp_path / "example.py"
    path.write_text(source)
    assert sorted(imported(path)) == ["a.b", "c.d", "lightning_prune.masks"]


def lines_naming(pattern, text):
    return [f"line {n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if pattern.search(line)]


@pytest.mark.parametrize("parts", [parts for parts in FILES if parts[0] != "recipes"], ids=".".join)
def test_no_file_names_a_model_of_others(parts) -> None:
    """Nothing may depend on which network it is; only the recipes name networks, of their own."""
    assert lines_naming(FAMILIES, FILES[parts].read_text()) == []


def test_the_names_looked_for_are_those_of_real_models() -> None:
    builders = torchvision.models.list_models(module=torchvision.models)
    assert [name for name in builders if not FAMILIES.search(name)] == []
    source = "import timm\nexcept Exception:\nif kind == 'ResNet':"
    assert lines_naming(FAMILIES, source) == ["line 1: import timm", "line 3: if kind == 'ResNet':"]

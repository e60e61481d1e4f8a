"""The house keeps its floors apart: what may import what, and what the library must not know by name."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torchvision

import lightning_prune

PACKAGE = Path(lightning_prune.__file__).parent
FLOORS = (
    ("graph",),
    ("surgery",),
    ("masks", "criteria", "budget", "schedules", "reinit", "cost", "report"),
    ("probe",),
    ("checkpoint",),
    ("callbacks",),
    ("recipes", "datamodules"),
    ("export",),
    ("cli",),
)
"""From the ground up; whoever is on a floor may import from its own and from those below."""
LEAVES = {"errors", "choices", "text", "__about__"}
ENTRANCES = {"__init__", "__main__"}
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")
KNOWS_LIGHTNING = {"probe", "checkpoint", "callbacks", "cli", "datamodules", "recipes"}
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}


def part_of(path):
    """The part of the library that a file belongs to: a folder or a module at the top."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules_named(tree, package):
    """Full names of every module that a syntax tree imports, unless only for type checking, with the line."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(base, package) if node.level else base
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
        else:
            yield from modules_named(node, package)


def package_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).parent.parts)


def imports(path):
    return list(modules_named(ast.parse(path.read_text()), package_of(path)))


def forbidden(part, module):
    """Why a part of the library may not import a module; None if it may."""
    top, *rest = module.split(".")
    if top in LIGHTNING and part not in KNOWS_LIGHTNING | ENTRANCES:
        return "does not know Lightning"
    if top != "lightning_prune" or part in ENTRANCES:
        return None
    other = rest[0] if rest else "__init__"
    if other in LEAVES:
        return None
    if part in LEAVES:
        return "is a leaf that everything imports"
    if other not in FLOOR:
        return "must not import the entrance of the package"
    return None if FLOOR[other] <= FLOOR[part] else f"lies below {other}"


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_part_has_its_place():
    assert {part_of(path) for path in FILES} - LEAVES - ENTRANCES == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = part_of(path)
    found = [(line, module, forbidden(part, module)) for module, line in imports(path)]
    assert [f"line {line}: {part} {why}: {module}" for line, module, why in found if why is not None] == []


@pytest.mark.parametrize(
    ("part", "source", "allowed"),
    [
        ("graph", "from lightning_prune.surgery import shrink", False),
        ("graph", "import lightning_prune.masks", False),
        ("graph", "from lightning_prune import surgery", False),
        ("graph", "from lightning_prune import trace", False),
        ("graph", "from ..surgery.shrink import trace", False),
        ("graph", "def late():\n    from lightning_prune.surgery import trace", False),
        ("graph", "import lightning.pytorch as pl", False),
        ("graph", "if TYPE_CHECKING:\n    from lightning import Trainer", True),
        ("graph", "from lightning_prune.errors import TraceError", True),
        ("surgery", "from lightning_prune.graph.labels import SOLID", True),
        ("surgery", "from .check import Checker", True),
        ("criteria", "from lightning_prune.masks import Masks", True),
        ("export", "import lightning", False),
        ("errors", "from lightning_prune.graph import labels", False),
        ("callbacks", "import lightning.pytorch", True),
        ("callbacks", "from lightning_prune import cli", False),
        ("__init__", "from lightning_prune.callbacks.base import PruningCallback", True),
    ],
)
def test_the_rule_itself(part, source, allowed):
    found = [forbidden(part, module) for module, _ in modules_named(ast.parse(source), f"lightning_prune.{part}")]
    assert len(found) == (0 if "TYPE_CHECKING" in source else 1)
    assert all(why is None for why in found) == allowed


FAMILIES = re.compile(
    r"resnet|resnext|res2net|vgg|mobilenet|mnasnet|densenet|alexnet|googlenet|inception|squeezenet|shufflenet|ghostnet"
    r"|efficientnet|convnext|convmixer|regnet|repvgg|nfnet|\bxception|maxvit|swin|vision_?transformer|deit|\bvit\b|\bbeit\b"
    r"|\btimm\b|torchvision\.models",
    re.IGNORECASE,
)
OWN_NETWORKS = "recipes"


def lines_that_match(pattern, text):
    return [f"line {n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if pattern.search(line)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_names_a_model_of_others(path):
    """Any network must be prunable, so nothing may depend on which one it is (recipes name networks of their own)."""
    if part_of(path) != OWN_NETWORKS:
        assert lines_that_match(FAMILIES, path.read_text()) == []
    builders = re.compile(rf"\b({'|'.join(map(re.escape, torchvision.models.list_models()))})\b")
    assert lines_that_match(builders, path.read_text()) == []


def test_the_model_names_are_those_in_use():
    unknown = [name for name in torchvision.models.list_models(module=torchvision.models) if not FAMILIES.search(name)]
    assert [name for name in unknown if not name.startswith("vit_")] == []
    assert lines_that_match(FAMILIES, "import timm\nx = 1\nif name == 'ResNet':") == [
        "line 1: import timm",
        "line 3: if name == 'ResNet':",
    ]

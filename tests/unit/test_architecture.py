"""Imports go one way, and only the last floor of the house knows Lightning."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lightning_prune

ROOT = Path(lightning_prune.__file__).parent
FLOORS = [
    {"errors", "__about__", "text", "choices"},
    {"graph"},
    {"surgery"},
    {"masks", "criteria", "budget", "schedules", "reinit", "cost", "report"},
    {"probe", "checkpoint", "callbacks", "datamodules", "export", "recipes"},
    {"lightning_cli", "demo", "cli", "__init__", "__main__"},
]
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
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
            found.append(node.module)
        pending.extend(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("parts", FILES, ids=".".join)
def test_imports_go_one_way(parts) -> None:
    for name in imported(FILES[parts]):
        package, _, rest = name.partition(".")
        if package == "lightning_prune" and rest:
            assert floor(rest.split(".")[0]) <= floor(parts[0]), f"{'.'.join(parts)} imports {name}"
        if package in LIGHTNING:
            assert parts[0] in FLOORS[-2] | FLOORS[-1], f"{'.'.join(parts)} imports {name}"


def test_every_part_of_the_package_has_its_floor() -> None:
    assert {parts[0] for parts in FILES} <= set().union(*FLOORS)


def test_the_walk_sees_imports(tmp_path) -> None:
    source = "if TYPE_CHECKING:\n    import unseen\nimport a.b\ndef f():\n    from c.d import e\n"
    path = tmp_path / "example.py"
    path.write_text(source)
    assert sorted(imported(path)) == ["a.b", "c.d"]

"""The shape of the code: imports point down, lightning is known in one place only."""

from __future__ import annotations

import ast
from pathlib import Path

import lightning_flatness

PACKAGE = Path(lightning_flatness.__file__).parent
ORDER = [
    "__main__",
    "compare",
    "callbacks",
    "surface",
    "metrics",
    "estimators",
    "probe",
    "sam",
    "stability",
    "landscape",
    "engines",
    "ranks",
    "gauss_newton",
    "per_sample",
    "second_derivatives",
    "loss",
    "cost",
    "geometry",
    "isolation",
    "sharding",
    "batches",
]
"""From top to bottom: each may import what stands below it."""


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_point_down():
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "__init__.py":
            continue
        for name in imports(path):
            if name.startswith("lightning_flatness."):
                target = name.split(".")[1]
                assert ORDER.index(layer(path)) <= ORDER.index(target), f"{path.name} imports {name}"


def test_only_callbacks_import_lightning():
    for path in PACKAGE.rglob("*.py"):
        if layer(path) != "callbacks":
            assert not any(n == "lightning" or n.startswith("lightning.") for n in imports(path)), path


def test_no_utils():
    assert not list(PACKAGE.rglob("utils.py"))

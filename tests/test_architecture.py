"""The shape of the code: imports point down, lightning is known in one place only."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lightning_flatness

PACKAGE = Path(lightning_flatness.__file__).parent
TESTS = Path(__file__).parent
ORDER = [
    "__main__",
    "compare",
    "measuring",
    "callbacks",
    "metrics",
    "surface",
    "estimators",
    "sam",
    "landscape",
    "geometry",
    "module",
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


def test_only_callbacks_and_measuring_import_lightning():
    for path in PACKAGE.rglob("*.py"):
        if layer(path) not in ("callbacks", "measuring"):
            assert not any(n == "lightning" or n.startswith("lightning.") for n in imports(path)), path


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported_first(path: Path, modules: set[str]) -> set[str]:
    """Modules of the package that a module needs while it is imported: not those in functions or for types only."""
    found: set[str] = set()
    pending: list[ast.AST] = [*ast.parse(path.read_text()).body]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
            found.add(node.module or "")
        else:
            pending += ast.iter_child_nodes(node)
    return found & modules


def test_no_import_cycle():
    paths = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    needs = {name: imported_first(path, set(paths)) - {name} for name, path in paths.items()}
    assert sum(map(len, needs.values())) > len(paths)
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' > '.join(error.args[1])}")


def test_no_file_over_300_lines():
    too_long = {path.name: n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 300}
    assert not too_long


def test_no_utils():
    assert not list(PACKAGE.rglob("utils.py"))


def test_no_test_module_imports_another():
    for path in TESTS.rglob("*.py"):
        shared = {name for name in imports(path) if name.split(".")[-1].startswith("test_") or name == "conftest"}
        assert not shared, f"{path.name} imports {shared}: move what is shared to tests/helpers"


def test_every_room_has_tests_of_its_name():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    folders = {path.name for path in TESTS.iterdir() if any(path.glob("test_*.py"))}
    assert rooms <= folders
    assert folders - rooms <= {"examples", "fuzz"}


def test_importing_the_package_does_not_import_torch():
    code = "import sys, lightning_flatness; print({'torch', 'lightning', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

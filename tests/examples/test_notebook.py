"""The notebook runs from top to bottom, and shows what it says."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from lightning_flatness import Comparison, FlatnessReport, MeasuredCheckpoints

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebooks" / "flatness.ipynb"


def cells() -> list[str]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code)  # kept small
    return ["".join(cell["source"]) for cell in code]


def shown(source: str, names: dict[str, Any]) -> Any:
    """Run a cell, and return what its last line is, as a notebook does."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    found = [shown(source, names) for source in cells()]
    kinds = [type(value) for value in found if value is not None]
    assert kinds == [Comparison, Figure, Figure, FlatnessReport, Figure, MeasuredCheckpoints]
    assert all(hasattr(kind, "_repr_html_") or kind is Figure for kind in kinds)
    assert "of the trained weights" in capsys.readouterr().out
    comparison, measured = found[2], found[-1]
    assert measured.problems == ()
    for name, checkpoint in zip(("sam", "sgd"), measured, strict=True):
        (setting,) = (s for s in comparison.settings if s.name.startswith(name))
        curve = setting.runs[0].curves["flatness/lambda_max"]
        assert checkpoint.step == curve.steps[-1]
        assert checkpoint.report.values["lambda_max"] == pytest.approx(curve.values[-1], rel=0.05)

"""Write a comparison as a text table, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

from lightning_flatness.compare.comparison import Cell, Comparison
from lightning_flatness.compare.reading import Run
from lightning_flatness.compare.tags import FLATNESS_PREFIX

_MISSING = "–"
_COLUMNS = (
    *("setting", "at", "metric", "mean", "standard_deviation"),
    *("min", "max", "num_values", "num_runs", "converged"),
)


def table(comparison: Comparison) -> str:
    """Return a comparison as text: a row per setting and moment, a column per curve, mean ± standard deviation.

    ``*`` marks a mean over a value that has not converged, ``(2)`` one over fewer runs than the setting has.
    """
    rows = [["setting", "runs", "at", *(tag.removeprefix(FLATNESS_PREFIX) for tag in comparison.metrics)]]
    for setting in comparison.settings:
        for i, moment in enumerate(comparison.moments):
            cells = [cell_text(setting.cells[moment, tag]) for tag in comparison.metrics]
            head = [setting.name, str(len(setting.runs))] if i == 0 else ["", ""]
            rows.append([*head, moment, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(_aligned(row, widths)).rstrip() for row in rows)


def _aligned(row: list[str], widths: list[int]) -> list[str]:
    left = {0, 2}
    return [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]


def cell_text(cell: Cell) -> str:
    """Return mean ± standard deviation with four digits; see :func:`table` for the marks."""
    if cell.mean is None:
        return _MISSING
    decimals = 3 - math.floor(math.log10(abs(cell.mean))) if cell.mean else 3
    form = f".{max(decimals, 0)}f" if -3 <= decimals <= 8 else ".3e"
    deviation = cell.standard_deviation
    text = f"{cell.mean:{form}}" + ("" if deviation is None else f" ± {deviation:{form}}")
    text += "*" if cell.converged is False else ""
    return text if len(cell.values) == len(cell.readings) else f"{text} ({len(cell.values)})"


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row per setting, moment and curve, with the numbers of :func:`to_csv`."""
    return [
        {"setting": setting.name, "at": moment, "metric": tag, **_summary(setting.cells[moment, tag]),
         "num_runs": len(setting.runs)}
        for setting in comparison.settings
        for moment in comparison.moments
        for tag in comparison.metrics
    ]  # fmt: skip


def to_csv(comparison: Comparison) -> str:
    """Return a comparison as CSV, a line per setting, moment and curve; numbers in full, empty if there is no value."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for setting in comparison.settings:
        for moment in comparison.moments:
            for tag in comparison.metrics:
                summary = {"setting": setting.name, "at": moment, "metric": tag, "num_runs": len(setting.runs)}
                writer.writerow(summary | _summary(setting.cells[moment, tag]))
    return stream.getvalue()


def to_json(comparison: Comparison) -> str:
    """Return a comparison as JSON, with every run's value, step and residual; null if there is no value."""
    document = {
        "metrics": comparison.metrics,
        "at": comparison.moments,
        "loss_tag": comparison.loss_tag,
        "settings": [
            {
                "name": setting.name,
                "runs": [_run(run) for run in setting.runs],
                "values": {
                    moment: {tag: _details(setting.cells[moment, tag]) for tag in comparison.metrics}
                    for moment in comparison.moments
                },
            }
            for setting in comparison.settings
        ],
        "problems": comparison.problems,
        "notes": comparison.notes,
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _run(run: Run) -> dict[str, Any]:
    # JSON knows no infinity; a hyperparameter may be one.
    hyperparameters = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in run.hyperparameters.items()
    }
    return {"name": run.name, "path": str(run.path), "hyperparameters": hyperparameters}


def _summary(cell: Cell) -> dict[str, Any]:
    values = cell.values
    return {
        "mean": cell.mean,
        "standard_deviation": cell.standard_deviation,
        "min": min(values, default=None),
        "max": max(values, default=None),
        "num_values": len(values),
        "converged": cell.converged,
    }


def _details(cell: Cell) -> dict[str, Any]:
    readings = [{"value": r.value, "step": r.step, "residual": r.residual} for r in cell.readings]
    return _summary(cell) | {"runs": readings}

"""A comparison as one HTML file without network: curves to hover over, settings to switch off, a table to sort."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_hex

from lightning_flatness.compare.axis import is_monotone, mean_and_band, points
from lightning_flatness.compare.comparison import Comparison, Setting
from lightning_flatness.compare.picture import colors, needs_log_scale
from lightning_flatness.compare.report import cell_text
from lightning_flatness.compare.tags import FLATNESS_PREFIX

_COLUMNS = 2
_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Flatness of runs</title><style>
body { font-family: sans-serif; margin: 1.5em } table { border-collapse: collapse }
td, th { padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: right } th { cursor: pointer }
td:first-child, th:first-child { text-align: left }
</style></head><body><h1>Flatness of runs</h1>
<p>Hover over a curve for its values; click a setting to switch it off; click a title of the table to sort.</p>
"""
_SORT = """<script>
document.querySelectorAll("th").forEach((th, column) => th.addEventListener("click", () => {
  const body = document.querySelector("tbody"), down = th.dataset.down === "1";
  th.dataset.down = down ? "0" : "1";
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const number = text => text === "" ? Infinity : Number(text);
  const order = (a, b) => isNaN(number(key(a))) ? key(a).localeCompare(key(b)) : number(key(a)) - number(key(b));
  [...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)).forEach(row => body.append(row));
}));
</script></body></html>
"""


def write_page(comparison: Comparison, path: Path, x: str = "step") -> None:
    """Write the page.

    Args:
        comparison: What to show.
        path: The file; its folder is made if need be.
        x: Against what to draw the curves; see :func:`lightning_flatness.compare.axis.check_axis`.

    Raises:
        ModuleNotFoundError: If plotly is not installed.
    """
    try:
        import plotly.io
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("`--html` needs plotly: pip install lightning-flatness[html]") from error
    figure = _figure(comparison, x)
    curves = plotly.io.to_html(figure, include_plotlyjs=True, full_html=False, div_id="curves")
    notes = "".join(f"<p>{escape(text)}</p>" for text in (*comparison.notes, *comparison.problems))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_HEAD + html_table(comparison) + notes + curves + _SORT, encoding="utf-8")


def html_table(comparison: Comparison) -> str:
    """Return the table of a comparison in HTML, a row per setting and moment."""
    titles = ["setting", "runs", "at", *(tag.removeprefix(FLATNESS_PREFIX) for tag in comparison.metrics)]
    rows = []
    for setting in comparison.settings:
        for moment in comparison.moments:
            cells = [setting.cells[moment, tag] for tag in comparison.metrics]
            numbers = "".join(
                f'<td data-value="{"" if cell.mean is None else cell.mean}">{escape(cell_text(cell))}</td>'
                for cell in cells
            )
            head = f"<td>{escape(setting.name)}</td><td>{len(setting.runs)}</td><td>{escape(moment)}</td>"
            rows.append(f"<tr>{head}{numbers}</tr>")
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _figure(comparison: Comparison, x: str) -> Any:
    from plotly.subplots import make_subplots

    metrics = comparison.metrics
    rows = -(-len(metrics) // _COLUMNS)
    titles = [tag.removeprefix(FLATNESS_PREFIX) for tag in metrics]
    figure = make_subplots(rows, min(_COLUMNS, len(metrics)), subplot_titles=titles)
    seen: set[str] = set()
    for index, tag in enumerate(metrics):
        place = {"row": index // _COLUMNS + 1, "col": index % _COLUMNS + 1}
        for setting, color in zip(comparison.settings, colors(len(comparison.settings)), strict=True):
            for trace in _traces(comparison, setting, tag, x, to_hex(color)):
                trace["showlegend"] = setting.name not in seen
                seen.add(setting.name)
                figure.add_scatter(**trace, **place)
        figure.update_xaxes(title_text=x, **place)
        if x == "train_loss":
            figure.update_xaxes(type="log", autorange="reversed", **place)
        if needs_log_scale(comparison, tag):
            figure.update_yaxes(type="log", **place)
    figure.update_layout(height=120 + 330 * rows, hovermode="closest", template="plotly_white")
    return figure


def _traces(comparison: Comparison, setting: Setting, tag: str, x: str, color: str) -> list[dict[str, Any]]:
    found = [(run, curve) for run in setting.runs if (curve := points(comparison, run, tag, x)) is not None]
    common = {"name": setting.name, "legendgroup": setting.name, "mode": "lines+markers", "line": {"color": color}}
    if len(found) > 1 and is_monotone(x):
        places, mean, low, high = mean_and_band([curve for _, curve in found])
        band = {"type": "data", "symmetric": False, "array": high - mean, "arrayminus": mean - low, "thickness": 1}
        return [{**common, "x": places, "y": mean, "error_y": band}]
    traces = []
    for run, (across, values, error) in found:
        bars = {"type": "data", "array": error, "thickness": 1} if np.isfinite(error).any() else None
        traces.append({**common, "x": across, "y": values, "text": run.name, "error_y": bars})
    return traces

"""The curves of settings side by side, each with a band over its seeds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_flatness.compare.axis import is_monotone, mean_and_band, points
from lightning_flatness.compare.comparison import Comparison, Setting
from lightning_flatness.compare.tags import FLATNESS_PREFIX

_RANGE_FOR_LOG_SCALE = 10.0


def draw(comparison: Comparison, x: str = "step") -> Figure:
    """Return a figure of every compared curve over the steps: per setting the mean in a band of the range.

    One standard error to either side of each run is in the band. With ``x="train_loss"``, or another curve, each run is
    a line of its own with error bars. A panel per curve, with a logarithmic scale where values differ by more than
    ten times. Nothing goes through pyplot.
    """
    metrics = comparison.metrics
    columns = 2 if len(metrics) == 4 else min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(1.2 + 4 * columns, 0.8 + 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    panels = grid.flatten()
    lines: dict[str, Any] = {}
    for ax, tag in zip(panels, metrics, strict=False):
        for setting, color in zip(comparison.settings, colors(len(comparison.settings)), strict=True):
            if line := _draw_setting(ax, comparison, setting, tag, x, color):
                lines.setdefault(setting.name, line)
        ax.set(title=tag.removeprefix(FLATNESS_PREFIX), xlabel=x)
        ax.grid(alpha=0.3)
        if x == "train_loss":
            ax.set_xscale("log")
            ax.invert_xaxis()
        if needs_log_scale(comparison, tag):
            ax.set_yscale("log")
    for ax in panels[len(metrics) :]:
        ax.set_visible(False)
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=max(1, min(4, len(lines))))
    if is_monotone(x) and any(len(setting.runs) > 1 for setting in comparison.settings):
        figure.suptitle("mean and range over runs, standard errors included", fontsize=10)
    return figure


def colors(number: int) -> list[Any]:
    """Return a colour for each setting."""
    if number <= 10:
        return [f"C{i}" for i in range(number)]
    return list(colormaps["viridis"](np.linspace(0, 0.95, number)))


def _draw_setting(ax: Any, comparison: Comparison, setting: Setting, tag: str, x: str, color: Any) -> Any:
    found = [curve for run in setting.runs if (curve := points(comparison, run, tag, x)) is not None]
    if not found:
        return None
    style = {"color": color, "lw": 1.6, "ms": 3}
    if not is_monotone(x):
        for across, values, error in found:
            line, *_ = ax.errorbar(across, values, error, marker="o", elinewidth=0.8, **style)
        return line
    places, mean, low, high = mean_and_band(found)
    (line,) = ax.plot(places, mean, marker="o" if len(places) <= 50 else None, **style)
    if (high > low).any():
        ax.fill_between(places, low, high, color=color, alpha=0.18, lw=0)
    return line


def needs_log_scale(comparison: Comparison, tag: str) -> bool:
    """Return whether all values of a curve are positive and differ by more than ten times."""
    curves = [run.curves[tag] for setting in comparison.settings for run in setting.runs if tag in run.curves]
    values = np.concatenate([curve.values[np.isfinite(curve.values)] for curve in curves])
    if not len(values):
        return False
    return bool(values.min() > 0 and values.max() > _RANGE_FOR_LOG_SCALE * values.min())

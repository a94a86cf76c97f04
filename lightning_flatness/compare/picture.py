"""The curves of settings side by side, each with a band over its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_flatness.compare.comparison import Comparison, Setting
from lightning_flatness.compare.reading import Curve
from lightning_flatness.compare.tags import FLATNESS_PREFIX

_RANGE_FOR_LOG_SCALE = 10.0


def draw(comparison: Comparison) -> Figure:
    """Draw every curve that is compared over the steps: per setting the mean over its runs, in a band of their range.

    Args:
        comparison: What to draw.

    Returns:
        A figure without pyplot; a panel per curve, with a logarithmic scale where values differ by more than ten times.
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
        for setting, color in zip(comparison.settings, _colors(len(comparison.settings)), strict=True):
            if line := _draw_setting(ax, setting, tag, color):
                lines.setdefault(setting.name, line)
        ax.set(title=tag.removeprefix(FLATNESS_PREFIX), xlabel="step")
        ax.grid(alpha=0.3)
        if _needs_log_scale(comparison, tag):
            ax.set_yscale("log")
    for ax in panels[len(metrics) :]:
        ax.set_visible(False)
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=max(1, min(4, len(lines))))
    if any(len(setting.runs) > 1 for setting in comparison.settings):
        figure.suptitle("mean and range over runs", fontsize=10)
    return figure


def _colors(number: int) -> list[Any]:
    if number <= 10:
        return [f"C{i}" for i in range(number)]
    return list(colormaps["viridis"](np.linspace(0, 0.95, number)))


def _draw_setting(ax: Any, setting: Setting, tag: str, color: Any) -> Any:
    curves = [curve for run in setting.runs if (curve := _finite(run.curves.get(tag))) is not None]
    if not curves:
        return None
    steps, values = _on_common_steps(curves)
    marker = "o" if len(steps) <= 50 else None
    (line,) = ax.plot(steps, np.nanmean(values, axis=0), color=color, lw=1.6, marker=marker, ms=3)
    if len(curves) > 1:
        ax.fill_between(steps, np.nanmin(values, axis=0), np.nanmax(values, axis=0), color=color, alpha=0.18, lw=0)
    return line


def _finite(curve: Curve | None) -> Curve | None:
    if curve is None:
        return None
    keep = np.isfinite(curve.values)
    return Curve(curve.steps[keep], curve.values[keep]) if keep.any() else None


def _on_common_steps(curves: Sequence[Curve]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Interpolate curves at all steps of any of them; NaN before the first and behind the last point of each."""
    steps = np.unique(np.concatenate([curve.steps for curve in curves]))
    values = [np.interp(steps, c.steps, c.values, left=np.nan, right=np.nan) for c in curves]
    covered = np.isfinite(values).any(axis=0)
    return steps[covered], np.stack(values)[:, covered]


def _needs_log_scale(comparison: Comparison, tag: str) -> bool:
    curves = [_finite(run.curves.get(tag)) for setting in comparison.settings for run in setting.runs]
    values = np.concatenate([curve.values for curve in curves if curve is not None])
    return bool(values.min() > 0 and values.max() > _RANGE_FOR_LOG_SCALE * values.min())

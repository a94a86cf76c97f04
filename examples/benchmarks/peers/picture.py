"""The picture: true error over seconds, a panel for each network, a colour for each tool."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from peers.report import OURS, PEERS, TARGET_ERROR, Row

sys.path.append(str(Path(__file__).resolve().parents[2]))  # shared helpers
from style import COLOURS, new_figure, save, tidy

MARKERS = {"default": "o", "converged": "s", "cheapest": "v"}
MEANINGS = {
    "default": "default",
    "converged": "until it says converged",
    "cheapest": "tuned to 1e-2, knowing the truth",
}
SMALLEST = 1e-7
"""Errors below are drawn here: the eigenvalues are float32's."""
LARGEST = 3.0


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw cold starts on one batch, most eigenvalues, of trained networks; the table has everything else."""
    k = max(row.k for row in rows)
    rows = [row for row in rows if (row.k, row.num_batches, row.start) == (k, 1, "cold") and row.seconds]
    workloads = [name for name in dict.fromkeys(row.workload for row in rows) if "a step from its start" not in name]
    figure = new_figure(9.5, 7.5)
    axes = figure.subplots(2, 2, sharey=True).flatten()
    for ax, workload in zip(axes, workloads, strict=False):
        _panel(ax, [row for row in rows if row.workload == workload])
        ax.set(title=workload, xlabel="seconds", ylabel="worst relative error")
    for ax in axes[len(workloads) :]:
        ax.set_visible(False)
    figure.suptitle(f"The {k} largest eigenvalues: true error over time (shaded: accurate to 1e-2)", fontsize=11)
    figure.legend(handles=_legend(rows), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, path)


def _panel(ax: Any, rows: Sequence[Row]) -> None:
    ax.axhspan(SMALLEST / 2, TARGET_ERROR, color="0.5", alpha=0.08, lw=0)
    for row in rows:
        ax.plot(
            row.time, min(max(*row.errors, SMALLEST), LARGEST / 1.5), MARKERS[row.kind], color=COLOURS[row.tool],
            markersize=10 if row.tool == OURS else 7, alpha=0.85, zorder=3 + (row.tool == OURS),
        )  # fmt: skip
    ax.set(xscale="log", yscale="log", ylim=(SMALLEST / 2, LARGEST))
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    tidy(ax)


def _legend(rows: Sequence[Row]) -> list[Line2D]:
    tools = [tool for tool in (OURS, *PEERS) if any(row.tool == tool for row in rows)]
    handles = [Line2D([], [], marker="o", ls="", color=COLOURS[tool], label=tool) for tool in tools]
    return handles + [
        Line2D([], [], marker=marker, ls="", color="0.3", label=MEANINGS[kind]) for kind, marker in MARKERS.items()
    ]

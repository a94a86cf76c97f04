"""The picture: true error over seconds, a panel for each Hessian, a colour for each tool."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from peers.report import OURS, PEERS, TARGET_ERROR, Row

COLOURS = dict(zip((OURS, *PEERS), ("tab:red", "tab:purple", "tab:blue", "tab:green", "0.45"), strict=True))
MARKERS = {"default": "o", "converged": "s", "cheapest": "v"}
MEANINGS = {
    "default": "default",
    "converged": "until it says converged",
    "cheapest": "tuned to 1e-2, knowing the truth",
}
SMALLEST = 1e-7
"""Errors below are drawn here: the eigenvalues are float32's."""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw a column for each network and a row for each number of eigenvalues and of batches."""
    workloads = list(dict.fromkeys(row.workload for row in rows))
    kinds = sorted({(row.k, row.num_batches) for row in rows}, key=lambda kind: (-kind[0], kind[1]))
    size = (max(9.5, 3.1 * len(workloads) + 0.6), 2.6 * len(kinds) + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(kinds), len(workloads), squeeze=False, sharey=True)
    for line, (k, num_batches) in zip(axes, kinds, strict=True):
        for ax, workload in zip(line, workloads, strict=True):
            here = [row for row in rows if row.cell == (workload, k, num_batches)]
            _panel(ax, here)
            batches = "one batch" if num_batches == 1 else f"{num_batches} microbatches"
            ax.set_title(f"{workload}\nk = {k}, {batches}", fontsize=9)
        line[0].set_ylabel("worst relative error")
    for ax in axes[-1]:
        ax.set_xlabel("seconds")
    figure.legend(handles=_legend(rows), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _panel(ax: Any, rows: Sequence[Row]) -> None:
    ax.axhspan(SMALLEST / 2, TARGET_ERROR, color="tab:green", alpha=0.06, lw=0)
    for row in rows:
        if row.seconds:
            face = COLOURS[row.tool] if row.start == "cold" else "white"
            ax.plot(
                row.time, max(*row.errors, SMALLEST), MARKERS[row.kind], color=COLOURS[row.tool],
                markerfacecolor=face, markersize=9 if row.tool == OURS else 7, alpha=0.9, zorder=3 + (row.tool == OURS),
            )  # fmt: skip
    missing = dict.fromkeys(row.tool for row in rows if not row.seconds and row.note.startswith("fails"))
    if missing:
        text = "\n".join(["as they come, these fail:", *missing])
        ax.text(0.97, 0.96, text, transform=ax.transAxes, fontsize=7, color="0.3", ha="right", va="top")
    ax.set(xscale="log", yscale="log", ylim=(SMALLEST / 2, 1))
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _legend(rows: Sequence[Row]) -> list[Line2D]:
    tools = [tool for tool in COLOURS if any(row.tool == tool for row in rows)]
    handles = [Line2D([], [], marker="o", ls="", color=COLOURS[tool], label=tool) for tool in tools]
    handles += [
        Line2D([], [], marker=marker, ls="", color="0.3", label=MEANINGS[kind]) for kind, marker in MARKERS.items()
    ]
    return [*handles, Line2D([], [], marker="o", ls="", color="0.3", markerfacecolor="white", label="warm start")]

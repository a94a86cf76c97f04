"""Checkpoints side by side: a table, a figure, rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_flatness.measuring.loading import Weights
from lightning_flatness.measuring.records import run_folder
from lightning_flatness.measuring.report import FlatnessReport, aligned, data_frame, html_table


@dataclass(frozen=True)
class MeasuredCheckpoint:
    """A checkpoint and what was found.

    Args:
        path: The file.
        step: Its ``global_step``; None if it does not say.
        epoch: Its epoch.
        weights: Which of its weights.
        report: The results.
    """

    path: Path
    step: int | None
    epoch: int | None
    weights: Weights
    report: FlatnessReport

    def row(self) -> dict[str, Any]:
        """Return its numbers by name: ``lambda_max``, ``lambda_max_residual`` and so on."""
        head = {"checkpoint": self.path.name, "step": self.step, "epoch": self.epoch, "weights": self.weights}
        return head | self.report.flat()


@dataclass(frozen=True)
class MeasuredCheckpoints(Sequence[MeasuredCheckpoint]):
    """Checkpoints side by side, by run and step.

    Printed, it is an aligned table; in a notebook, one in HTML.

    Args:
        checkpoints: Those that could be measured.
        problems: One sentence for each that could not.
        notes: Remarks: points that were there already, folders that cannot be written to.
    """

    checkpoints: tuple[MeasuredCheckpoint, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __getitem__(self, index: Any) -> Any:
        return self.checkpoints[index]

    def __len__(self) -> int:
        return len(self.checkpoints)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per checkpoint, with all numbers."""
        return [checkpoint.row() for checkpoint in self.checkpoints]

    def to_pandas(self) -> Any:
        """Return a DataFrame with a row per checkpoint and a column per number. Needs pandas."""
        return data_frame(self.rows())

    def figure(self) -> Figure:
        """Draw every value over the steps, with its error.

        Returns:
            A figure without pyplot, a panel per value.
        """
        names = list(dict.fromkeys(name for c in self.checkpoints for name in c.report.values))
        figure = Figure(figsize=(1 + 3.2 * max(1, len(names)), 3), layout="constrained")
        FigureCanvasAgg(figure)
        panels: Any = figure.subplots(1, max(1, len(names)), squeeze=False)
        curves = dict.fromkeys((run_folder(c.path), c.weights) for c in self.checkpoints)
        for ax, name in zip(panels[0], names, strict=False):
            for folder, weights in curves:
                points = [
                    (c.step, c.report.values[name], max(c.report.errors.get(name, {}).values(), default=0.0))
                    for c in self.checkpoints
                    if (run_folder(c.path), c.weights) == (folder, weights)
                    and c.step is not None
                    and name in c.report.values
                ]
                if points:
                    steps, values, errors = zip(*points, strict=True)
                    ax.errorbar(steps, values, errors, marker="o", ms=3, capsize=2, label=f"{folder.name} {weights}")
            ax.set(title=name, xlabel="step")
            ax.grid(alpha=0.3)
        if len(curves) > 1:
            panels[0][0].legend(fontsize=7)
        return figure

    def _table_rows(self) -> list[dict[str, Any]]:
        rows = []
        for checkpoint in self.checkpoints:
            report = checkpoint.report
            several = len({c.weights for c in self.checkpoints}) > 1
            row = {"checkpoint": checkpoint.path.name, "step": checkpoint.step, "epoch": checkpoint.epoch}
            row |= {"weights": checkpoint.weights} if several else {}
            for name, value in report.values.items():
                error = max(report.errors.get(name, {}).values(), default=None)
                row[name] = f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
            rows.append(row)
        return rows

    def __str__(self) -> str:
        return aligned(self._table_rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self._table_rows()) + "".join(f"<br>{escape(problem)}" for problem in self.problems)

"""The results of one measurement, to print, to show in a notebook and to put into a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_flatness.metrics.measurement import Measurement, logged_names

Row = Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class FlatnessReport:
    """The values, errors and cost of one measurement.

    Printed, it is an aligned table; in a notebook, a small one in HTML.

    Args:
        measurement: The results of the metrics.
        num_samples: Samples that were measured on.
        mode: The mode of the module; see :class:`LossLandscape`.
        step: Optimizer steps behind the weights; None if that is not known.
        about: Further entries of the last line, by name.

    Example:
        >>> from lightning_flatness.metrics.measurement import Measurement
        >>> found = Measurement({"lambda_max": 9.0}, {"lambda_max": {"residual": 0.1}}, {"seconds": 2.0})
        >>> report = FlatnessReport(found, num_samples=512, mode="batch_statistics")
        >>> print(report)
        name        value  residual
        lambda_max  9      0.1
        512 samples, mode 'batch_statistics', seconds 2
        >>> report.values["lambda_max"], report.errors["lambda_max"]
        (9.0, {'residual': 0.1})
    """

    measurement: Measurement
    num_samples: int
    mode: str
    step: int | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        """The values by name, as ``FlatnessMonitor`` logs them."""
        return self.measurement.values

    @property
    def errors(self) -> dict[str, dict[str, float]]:
        """The errors of the values, by name and kind, in the units of the value."""
        return self.measurement.errors

    @property
    def cost(self) -> dict[str, float]:
        """``seconds``, and ``gradient_evaluations``: gradients of the loss on all samples."""
        return self.measurement.costs

    @property
    def remarks(self) -> dict[str, str]:
        """Remarks on the numbers, by the name of the metric: that it has not converged."""
        return self.measurement.remarks

    def logged(self, prefix: str = "flatness/") -> dict[str, float]:
        """Return all numbers under the names that :class:`FlatnessMonitor` logs.

        Args:
            prefix: Put before every name.
        """
        return logged_names(self.measurement, prefix)

    def flat(self) -> dict[str, float]:
        """Return all numbers by plain names: ``lambda_max``, ``lambda_max_residual``, ``seconds``."""
        errors = ((name, kind, error) for name, kinds in self.errors.items() for kind, error in kinds.items())
        return {**self.values, **{f"{name}_{kind}": error for name, kind, error in errors}, **self.cost}

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per value: its name, the value and its errors."""
        return [{"name": name, "value": value, **self.errors.get(name, {})} for name, value in self.values.items()]

    def to_pandas(self) -> Any:
        """Return a DataFrame with a row per value and a column per kind of error. Needs pandas."""
        return data_frame(self.rows(), index="name")

    def figure(self) -> Figure:
        """Draw the values with their errors, on a logarithmic axis where all of them are positive.

        Returns:
            A figure without pyplot.
        """
        names = list(self.values)
        figure = Figure(figsize=(6, 0.9 + 0.35 * len(names)), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        errors = [max(self.errors.get(name, {}).values(), default=0.0) for name in names]
        ax.errorbar([self.values[name] for name in names], range(len(names)), xerr=errors, fmt="o", capsize=3)
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        if all(value > 0 for value in self.values.values()):
            ax.set_xscale("log")
        ax.grid(alpha=0.3)
        ax.set_title(self._last_line(), fontsize=9)
        return figure

    def _last_line(self) -> str:
        step = [] if self.step is None else [f"step {self.step}"]
        known = {**self.cost, **self.about}
        more = [f"{name} {text(value)}" for name, value in known.items()]
        return ", ".join([*step, f"{self.num_samples} samples", f"mode {self.mode!r}", *more])

    def __str__(self) -> str:
        remarks = [f"{name} {remark}" for name, remark in self.remarks.items()]
        return "\n".join([aligned(self.rows()), self._last_line(), *remarks])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        remarks = "".join(f"<br>{escape(f'{name} {remark}')}" for name, remark in self.remarks.items())
        return f"{html_table(self.rows())}<small>{escape(self._last_line())}{remarks}</small>"


def text(value: Any) -> str:
    """Return a number with four digits, and ``–`` for what is missing."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def aligned(rows: Sequence[Row]) -> str:
    """Return rows (cells by the title of their column) as lines of equal columns."""
    columns = _columns(rows)
    cells = [[column.replace("_", " ") for column in columns], *([text(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def html_table(rows: Sequence[Row]) -> str:
    """Return rows (cells by the title of their column) as a table in HTML."""
    columns = _columns(rows)
    head = "".join(f"<th>{escape(column.replace('_', ' '))}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text(row.get(c)))}</td>' for c in columns)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def data_frame(rows: Sequence[Row], index: str | None = None) -> Any:
    """Return rows (cells by the name of their column) as a DataFrame, named by the column ``index``.

    Raises:
        ModuleNotFoundError: If pandas is not installed.
    """
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("`to_pandas` needs pandas: pip install pandas.") from error
    frame = pd.DataFrame(list(rows))
    return frame if index is None or not len(frame) else frame.set_index(index)

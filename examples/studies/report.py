"""Results of studies: a CSV of all runs, tables of verdicts in Markdown, and pictures with a dot per seed."""

from __future__ import annotations

import csv
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from study import Row
from verdicts import Claim, Effect, Judged, Verdict, judge, models_to_decide, seeds_to_decide

sys.path.append(str(Path(__file__).resolve().parents[1]))  # shared helpers
from style import draw_band, new_figure, set_fonts

set_fonts()

VERDICT_HEADER = ("claim", "where", "effect", "95 % interval", "pairs", "verdict")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write all rows; a column for everything that any row has, in the order of appearance; empty where missing.

    Floats have all their digits, so that the verdicts can be computed again from the file.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """Return the rows that :func:`write_csv` has written; None where there is nothing."""

    def value(text: str) -> Any:
        if text in ("True", "False", ""):
            return {"True": True, "False": False, "": None}[text]
        try:
            return int(text) if text.isdigit() else float(text)
        except ValueError:
            return text

    with path.open(newline="") as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table in markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def verdict_line(claim: Claim, where: str, effect: Effect) -> list[str]:
    """Return the line of a claim in the table of verdicts; the verdict is computed here and nowhere else."""
    text = claim.text if claim.direction != "within" else f"{claim.text} (within ±{claim.margin:g}{effect.unit})"
    verdict = judge(effect, claim.direction, claim.margin)
    return [text, where, number(effect.estimate, effect), interval(effect), str(effect.num), f"**{verdict}**"]


def outlook(claims: Iterable[Judged]) -> str:
    """Return a sentence on each claim that is undecided: how many more seeds would decide it."""
    sentences = []
    for claim, where, effect in claims:
        if judge(effect, claim.direction, claim.margin) != "undecided":
            continue
        num = seeds_to_decide(effect, claim.direction, claim.margin)
        if effect.num < 2:
            needed = "fewer than two pairs, so that this is not known"
        elif num is None:
            needed = "no number up to 1,000 seeds would decide"
        else:
            needed = f"{num - effect.num} more seed{'s' * (num - effect.num > 1)} would decide"
        sentences.append(f"- {claim.text}, {where}: {needed}.")
    if not sentences:
        return ""
    return "If mean and scatter over seeds stay as they are:\n\n" + "\n".join(sentences) + "\n"


def outlook_of_models(claims: Iterable[Judged]) -> str:
    """Return a sentence on each claim on a rank correlation that is undecided: how many more models would decide it."""
    sentences = []
    for claim, where, effect in claims:
        num = models_to_decide(effect, "above")
        if num is None:
            sentences.append(f"- {claim.text}, {where}: no number up to 1,000 models would decide.")
        elif num > effect.num:
            sentences.append(f"- {claim.text}, {where}: about {num - effect.num} more models would decide.")
    if not sentences:
        return ""
    return "If tau stays as it is and its interval shrinks with the root of the number of models:\n\n" + "\n".join(
        sentences
    )


def tally(lines: Iterable[Sequence[str]]) -> str:
    """Return a sentence: how many lines of a table have which verdict (in bold: others are only parts of one)."""
    counts = Counter(line[-1].strip("*") for line in lines if line[-1].startswith("**"))
    return "Verdicts: " + ", ".join(f"{counts[verdict]} x {verdict!r}" for verdict in get_args(Verdict)) + "."


def number(value: float, effect: Effect) -> str:
    """Return a value as it is printed in the unit of an effect."""
    if not math.isfinite(value):
        return "?"
    if effect.unit == "x":
        return f"x {value:.3g}"
    return f"{value:+.2f}{effect.unit}"


def interval(effect: Effect) -> str:
    """Return the interval of an effect as it is printed."""
    if not math.isfinite(effect.high - effect.low) or (effect.unit == "x" and effect.low == 0):
        return "none"
    return f"{number(effect.low, effect)} … {number(effect.high, effect)}"


def values(rows: Sequence[Row], setting: str, point: str, column: str) -> dict[int, float]:
    """Return a column by seed, of the runs of a setting that reached a point."""
    return {
        row["seed"]: row[column]
        for row in rows
        if row["setting"] == setting and row["point"] == point and row["reached"] and row.get(column) is not None
    }


def shortfalls(rows: Sequence[Row]) -> str:
    """Return a sentence: which points were not reached, and how many measurements did not converge."""
    missed: dict[str, int] = {}
    for row in rows:
        if not row["reached"]:
            key = f"{row['setting']} ({row['point']})"
            missed[key] = missed.get(key, 0) + 1
    flags = [value for row in rows for name, value in row.items() if name.endswith("_converged")]
    text = f"{flags.count(False)} of {len(flags)} measurements did not converge to their tolerance. "
    if not missed:
        return text + "Every run reached its points."
    listed = ", ".join(f"{key}: {count}" for key, count in missed.items())
    return text + f"Left out, since they did not reach their point: {listed}."


def figure(num_rows: int, num_columns: int, width: float = 3.6, height: float = 3.0) -> tuple[Figure, Any]:
    """Return a figure and its axes, an array of two dimensions."""
    made = new_figure(width * num_columns, height * num_rows)
    return made, made.subplots(num_rows, num_columns, squeeze=False)


def dots(
    ax: Axes,
    x: Sequence[float],
    groups: Sequence[Iterable[float]],
    *,
    color: str,
    label: str,
    line: str = "-",
    log: bool = False,
) -> None:
    """Draw a dot per seed and a line through the means: geometric ones where the axis is logarithmic."""
    means = []
    for position, group in zip(x, groups, strict=True):
        group = list(group)
        ax.plot([position] * len(group), group, "o", color=color, ms=4, alpha=0.45, mew=0)
        means.append(mean(group, log))
    ax.plot(x, means, ls=line, color=color, marker="_", ms=11, mew=2, lw=1.5, label=label)


def spread(
    ax: Axes,
    x: Sequence[float],
    groups: Sequence[Sequence[float]],
    errors: Sequence[float],
    *,
    color: str,
    label: str,
    line: str = "-",
    log: bool = False,
) -> None:
    """Draw a line through the means of seeds, a band of one standard deviation over seeds, and bars of the errors."""
    means = [mean(group, log) for group in groups]
    if log:
        widths = [math.exp(deviation([math.log(v) for v in group])) for group in groups]
        low, high = ([m * w**sign for m, w in zip(means, widths, strict=True)] for sign in (-1, 1))
    else:
        widths = [deviation(group) for group in groups]
        low, high = ([m + sign * w for m, w in zip(means, widths, strict=True)] for sign in (-1, 1))
    draw_band(ax, x, low, high, color)
    ax.errorbar(x, means, yerr=errors, color=color, ls=line, marker="o", ms=3.5, lw=1.5, capsize=2.5, label=label)


def deviation(group: Sequence[float]) -> float:
    """Return the standard deviation over seeds, 0 of fewer than two."""
    if len(group) < 2:
        return 0.0
    middle = math.fsum(group) / len(group)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in group) / (len(group) - 1))


def log_values(ax: Axes) -> None:
    """Make the vertical axis logarithmic, if there is anything to see on it."""
    if any(value > 0 for line in ax.lines for value in np.asarray(line.get_ydata(), dtype=float)):
        ax.set_yscale("log")
        log_axis(ax.yaxis)


def log_axis(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers, also where it spans less than a decade."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def mean(group: Sequence[float], log: bool) -> float:
    """Return the mean, nan of nothing."""
    if not group:
        return math.nan
    return math.exp(math.fsum(map(math.log, group)) / len(group)) if log else math.fsum(group) / len(group)

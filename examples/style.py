"""Colours and axes of every picture in the examples: a method has the same colour wherever it is drawn.

``lightning-flatness compare`` assigns colours by the order of names: ``sam`` and ``sgd`` get the two of this table (a
test holds this). TensorBoard's screenshots show SGD in warm colours and SAM in cold ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

COLOURS = {
    "SAM": "tab:blue",
    "SGD": "tab:orange",
    "Adam": "tab:purple",
    "small batch": "tab:cyan",
    "medium batch": "tab:olive",
    "large batch": "tab:brown",
    "lightning-flatness": "tab:red",
    "PyHessian": "tab:pink",
    "curvlinops + eigsh": "black",
    "hessian-eigenthings": "tab:green",
    "power iteration": "0.6",
    "reference": "0.45",
}
"""By training method, size of batches, tool; ``"reference"`` is for what something is compared with."""


def set_fonts() -> None:
    """Set the sizes of all texts of the studies' figures."""
    matplotlib.rc("font", size=9)
    matplotlib.rc("axes", titlesize=10, labelsize=9)
    matplotlib.rc("xtick", labelsize=8)
    matplotlib.rc("ytick", labelsize=8)
    matplotlib.rc("legend", fontsize=8)
    matplotlib.rc("figure", titlesize=9)


def in_order(num: int) -> list[str]:
    """Return colours for things with an order, as sizes of batches: dark ones first."""
    shades = matplotlib.colormaps["viridis"]
    return [to_hex(shades(0.85 * i / max(num - 1, 1))) for i in range(num)]


def new_figure(width: float, height: float) -> Figure:
    """Return a figure without pyplot."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(ax: Axes) -> None:
    """Draw a light grid, and no frame at the top and the right."""
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def draw_band(ax: Axes, x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> None:
    """Draw how far a curve may be off, standard errors or seeds, behind it."""
    ax.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)


def standard_error(tag: str) -> str:
    """Return the name of the curve of the standard errors of a curve."""
    return f"flatness_errors/{tag.removeprefix('flatness/')}_standard_error"


def draw_errors(ax: Axes, curves: Mapping[str, Sequence[tuple[int, float]]], tag: str, colour: str) -> None:
    """Draw a band of the standard errors for the whole training set around a curve."""
    errors = dict(curves[standard_error(tag)])
    steps, values = [step for step, _ in curves[tag]], [value for _, value in curves[tag]]
    low, high = ([v + sign * errors[step] for step, v in zip(steps, values, strict=True)] for sign in (-1, 1))
    draw_band(ax, steps, low, high, colour)


def save(figure: Figure, path: Path) -> None:
    """Write a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_factors(factors: dict[str, float], path: Path, label: str, title: str) -> None:
    """Draw by how much each measure changes when the function stays the same, on a log scale."""
    figure = new_figure(7.2, 2.9)
    axes = figure.subplots()
    names = list(reversed(factors))
    stays = [abs(factors[name] - 1) < 0.01 for name in names]
    axes.barh(names, [factors[name] - 1 for name in names], left=1, color=COLOURS["reference"])
    for i, name in enumerate(names):
        text = f" x {float(f'{factors[name]:.3g}'):,.12g}" if not stays[i] else " unchanged"
        axes.text(max(factors[name], 1), i, text, va="center", fontsize="small")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, *factors.values()) / 2, max(factors.values()) * 12)
    axes.set_xlabel(label)
    axes.set_title(title, fontsize="medium")
    tidy(axes)
    axes.grid(axis="y", visible=False)
    save(figure, path)

"""Pictures of loss surfaces: curves and filled contours, several on one scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_flatness.surface.measure import LossSurface


def compare_surfaces(
    surfaces: Sequence[LossSurface], titles: Sequence[str] | None = None, scale: tuple[float, float] | None = None
) -> Figure:
    """Draw surfaces side by side on one scale of colours, or lines on one axis of losses.

    Args:
        surfaces: Lines or planes, all of the same kind and in the same geometry, of one or several models.
        titles: Text above each.
        scale: Smallest and largest loss of the colours, or of the axis. Default: those of these surfaces, without the
            tail of large losses.

    Returns:
        A figure of its own, outside pyplot; write it with ``figure.savefig(path)``.

    Raises:
        ValueError: If there are no surfaces, or they are of different kinds, or there is not one title for each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = [""] * len(surfaces) if titles is None else list(titles)
    if len({(s.losses.dim(), s.geometry) for s in surfaces}) != 1 or len(titles) != len(surfaces):
        raise ValueError(
            "Expected one or more surfaces of the same number of directions in the same geometry, with a title each, "
            f"got {[f'{s.losses.dim()}-d in {s.geometry!r}' for s in surfaces]} and {len(titles)} titles."
        )
    figure = Figure(figsize=(0.9 + 4.1 * len(surfaces), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(surfaces), squeeze=False, sharey=surfaces[0].y is None)[0]
    if surfaces[0].y is None:
        for axes, surface in zip(all_axes, surfaces, strict=True):
            _draw_curve(axes, surface)
        all_axes[0].set_ylabel("loss")
        if scale is not None:
            all_axes[0].set_ylim(*scale)
        figure.legend(handles=all_axes[0].lines[-1:], loc="outside lower center")  # hides no curve
    else:
        low, high = scale or _range(torch.cat([s.losses.flatten() for s in surfaces]))
        levels = [low + (high - low) * (i / 24) ** 2 for i in range(25)]  # equally wide rings of a paraboloid
        for axes, surface in zip(all_axes, surfaces, strict=True):
            mappable = _draw_contours(axes, surface, levels)
        ticks = levels[:: max(1, len(levels) // 8)]
        figure.colorbar(mappable, ax=all_axes, label="loss", ticks=ticks, format="%.3g")
    for axes, surface, title in zip(all_axes, surfaces, titles, strict=True):
        missing = f"{surface.num_missing} points without a finite loss (grey)" if surface.num_missing else ""
        axes.set_title("\n".join(filter(None, [title, missing])), fontsize="medium")
        unit = f"  [$10^{{{_exponent(surface)}}}$]" if _exponent(surface) else ""
        axes.set_xlabel(f"{surface.labels[0]}, geometry '{surface.geometry}'{unit}")
        if surface.y is not None:
            axes.set_ylabel(f"{surface.labels[1]}{unit}")
    return figure


def _draw_curve(axes: Axes, surface: LossSurface) -> None:
    finite = torch.isfinite(surface.losses)
    x = surface.x / 10.0 ** _exponent(surface)
    axes.plot(x, surface.losses.where(finite, torch.nan), marker="o", markersize=3, color="C0")
    for position in x[~finite].tolist():
        axes.axvspan(*_cell(x, position), color="0.85", linewidth=0)
    axes.plot(0, surface.loss, marker="*", markersize=13, color="C3", linestyle="none", label="current weights")
    axes.grid(alpha=0.3)


def _draw_contours(axes: Axes, surface: LossSurface, levels: list[float]) -> Any:
    from matplotlib.colors import BoundaryNorm

    assert surface.y is not None
    losses = surface.losses.where(torch.isfinite(surface.losses), torch.nan).numpy()
    x, y = (positions / 10.0 ** _exponent(surface) for positions in (surface.x, surface.y))
    axes.set_facecolor("0.85")
    norm = BoundaryNorm(levels, ncolors=256, extend="max")
    mappable = axes.contourf(x, y, losses, levels=levels, norm=norm, cmap="viridis", extend="max")
    axes.contour(x, y, losses, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
    axes.plot(0, 0, marker="*", markersize=13, color="C3", markeredgecolor="white", linestyle="none")
    return mappable


def _exponent(surface: LossSurface) -> int:
    """Return the power of ten to factor out of the positions, 0 if they print well."""
    largest = float(surface.x.abs().max())
    return 0 if 0.05 <= largest < 1000 else math.floor(math.log10(largest))


def _range(losses: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest loss, without the tail of large ones."""
    finite = losses[torch.isfinite(losses)]
    if not len(finite):
        return 0.0, 1.0
    low, middle, high = float(finite.min()), float(finite.median()), float(finite.max())
    if middle > low:
        high = min(high, low + 20 * (middle - low))
    if high <= low:
        high = low + max(abs(low), 1.0) * 1e-6
    return low, high


def _cell(x: Tensor, position: float) -> tuple[float, float]:
    half = float(x[1] - x[0]) / 2
    return position - half, position + half

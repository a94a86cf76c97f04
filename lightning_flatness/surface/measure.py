"""Measure the loss along a line or over a plane through the current weights, in any geometry.

Rescaling a ReLU network changes its picture in weight space arbitrarily. The axes are therefore directions in the
coordinates of a geometry, and distances are those of the geometry.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_flatness.estimators import top_eigenvalues
from lightning_flatness.geometry import Chart, Geometry, resolve_geometry
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.module.sharding import reshard, whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIRECTIONS = ("random", "eigenvectors", "between")
"""The directions that have a name. A tensor of coordinates can be passed wherever a name can."""

_MAX_DOUBLINGS = 40


@dataclass(frozen=True)
class LossSurface:
    """The loss on a line or a plane through one set of weights; made by :func:`loss_surface`.

    Attributes:
        x: Positions along the first direction, shape (num_points,), in float64 on the CPU as are the losses.
        y: Positions along the second direction, or None on a line.
        losses: Shape (num_points,), or (num_points, num_points) with one row per ``y``. Entries may be infinite or NaN.
        loss: The loss at the weights themselves, where both positions are 0.
        directions: The directions in the coordinates of the geometry, one row each.
        labels: A description of each direction.
        geometry: Name of the geometry.
    """

    x: Tensor
    y: Tensor | None
    losses: Tensor
    loss: float
    directions: Tensor
    labels: tuple[str, ...]
    geometry: str

    @property
    def num_missing(self) -> int:
        """Number of points where the loss is not finite."""
        return int((~torch.isfinite(self.losses)).sum())

    def figure(self, title: str = "", scale: tuple[float, float] | None = None) -> Figure:
        """Return a figure of a curve or filled contours, with the current weights marked, outside pyplot.

        Args:
            title: Text above the picture.
            scale: Smallest and largest loss of the colours, or of the axis. Default: those of this surface.
        """
        from lightning_flatness.surface.draw import compare_surfaces  # matplotlib is imported where it is used

        return compare_surfaces([self], [title], scale)


def loss_surface(
    landscape: LossLandscape,
    directions: str | Tensor = "random",
    geometry: str | Geometry = "euclidean",
    *,
    num_directions: int = 2,
    other: Tensor | nn.Module | Sequence[Tensor | nn.Module] | None = None,
    radius: float | None = None,
    num_points: int = 21,
    seed: int = 0,
    on_point: Callable[[int, int], None] | None = None,
) -> LossSurface:
    r"""Return the loss ``L(w(x d_1 + y d_2))`` on a grid of ``x`` (and ``y``) around the current weights.

    Weights, buffers and random number generators do not change. Costs one forward pass over the samples per point of
    the grid, a few more to choose the radius, and a Lanczos run for eigenvectors.

    Args:
        landscape: The loss.
        directions: ``"random"``: standard normal in the coordinates of the geometry, orthonormalised.
            ``"eigenvectors"``: of the largest eigenvalues of the Hessian in the geometry. ``"between"``: towards
            ``other`` weights, which lie at 1 (in the path geometry up to rescaling). Or a tensor of shape
            (num_coordinates,), (1, num_coordinates) or (2, num_coordinates), used unchanged.
        geometry: The coordinates; see :mod:`lightning_flatness.geometry`. ``"filter"`` with random directions is the
            filter normalisation of arXiv 1712.09913.
        num_directions: 1 for a line, 2 for a plane; for random directions and eigenvectors.
        other: One or two sets of weights, as flat vectors or modules of the same architecture.
        radius: Largest distance from 0, in lengths of the directions; named directions have length 1. Default: within a
            factor of two, the distance at which the loss rises by one or doubles, whichever is more. Between weights:
            about -0.5 to 1.5, independent of the radius. Pass the same radius to compare models.
        num_points: Points per axis, an odd number: 0 is one of them.
        seed: Seed of random directions and of the start of Lanczos.
        on_point: ``on_point(i, n)`` is called before the i-th of n points.

    Returns:
        The losses. A warning reports points without a finite loss; pictures omit them.

    Raises:
        ValueError: If an argument is out of range; if directions have the wrong size, are zero, not finite or
            parallel; or if the loss at the current weights is not finite.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> net.weight.data = torch.zeros(1, 1)
        >>> landscape = LossLandscape(net, [torch.ones(1, 1)], lambda net, x: net(x).square().mean())
        >>> surface = loss_surface(landscape, torch.ones(1), radius=2.0, num_points=5)
        >>> surface.losses
        tensor([4., 1., 0., 1., 4.], dtype=torch.float64)
    """
    check_options(directions, num_directions, other, radius, num_points)
    with landscape.measurement():
        chart = landscape.chart(geometry := resolve_geometry(geometry))
        loss = float(landscape.loss())
        rows, labels = _directions(landscape, chart, geometry, directions, num_directions, other, seed)
        _check_directions(rows, chart.num_coordinates)
        if other is not None:
            x = _positions_between(num_points)
        else:
            reach = radius if radius is not None else _choose_radius(landscape, chart, rows, loss)
            x = torch.linspace(-reach, reach, num_points, dtype=torch.float64, device="cpu")
            x[num_points // 2] = 0
        y = x if len(rows) == 2 else None
        losses = _losses(landscape, chart, rows, x, [0.0] if y is None else y.tolist(), on_point)
    surface = LossSurface(x, y, losses if y is not None else losses[0], loss, rows, labels, geometry.name)
    if surface.num_missing:
        warnings.warn(
            f"The loss is not finite at {surface.num_missing} of {losses.numel()} points of the surface; they are left "
            "out of its pictures. Choose a smaller `radius` to avoid that.",
            stacklevel=2,
        )
    return surface


def _losses(
    landscape: LossLandscape, chart: Chart, rows: Tensor, x: Tensor, y: Sequence[float], on_point: Any
) -> Tensor:
    """Return the losses of the grid, a row for each ``y``."""
    losses = torch.full((len(y), len(x)), math.nan, dtype=torch.float64, device="cpu")
    for i, (b, a) in enumerate(product(y, x.tolist())):
        if on_point is not None:
            on_point(i + 1, losses.numel())
        losses.view(-1)[i] = _loss_at(landscape, chart, a * rows[0] if len(rows) == 1 else a * rows[0] + b * rows[1])
    return losses


def _loss_at(landscape: LossLandscape, chart: Chart, z: Tensor) -> float:
    displacement = chart.displacement(z)
    if not bool(torch.isfinite(displacement).all()):
        return math.nan
    with landscape.displaced(displacement):
        return float(landscape.loss(allow_non_finite=True))


def _choose_radius(landscape: LossLandscape, chart: Chart, rows: Tensor, loss: float) -> float:
    """Return the start radius times the power of two at which the loss along the axes exceeds the threshold."""
    threshold = loss + max(1.0, abs(loss))

    def is_far(radius: float) -> bool:
        ends = (sign * radius * row for row in rows for sign in (1, -1))
        return not all(_loss_at(landscape, chart, z) < threshold for z in ends)  # NaN counts as far

    radius = 1.0 if math.isinf(chart.radius) else chart.radius
    if is_far(radius):
        for _ in range(_MAX_DOUBLINGS):
            radius /= 2
            if not is_far(radius):
                return 2 * radius
        return radius
    for _ in range(_MAX_DOUBLINGS):
        radius *= 2
        if is_far(radius):
            break
    return radius


def _positions_between(num_points: int) -> Tensor:
    """Return equidistant positions that include 0 and 1, half of them between the two."""
    num_steps = max(1, round((num_points - 1) / 2))
    first = (num_points - 1 - num_steps) // 2
    return (torch.arange(num_points, dtype=torch.float64, device="cpu") - first) / num_steps


def _directions(
    landscape: LossLandscape,
    chart: Chart,
    geometry: Geometry,
    directions: str | Tensor,
    num_directions: int,
    other: Tensor | nn.Module | Sequence[Tensor | nn.Module] | None,
    seed: int,
) -> tuple[Tensor, tuple[str, ...]]:
    """Return the directions as rows, and their labels."""
    size = chart.num_coordinates
    if isinstance(directions, Tensor):
        rows = directions.to(landscape.device, landscape.dtype)
        rows = rows[None] if rows.dim() == 1 else rows
        return rows, tuple(f"direction {i}" for i in range(1, len(rows) + 1))
    if other is not None:
        others = [other] if isinstance(other, Tensor | nn.Module) else list(other)
        rows = torch.stack([chart.coordinates(_displacement_to(landscape, o)) for o in others])
        return rows, tuple(
            f"towards other weights (at 1{', ' + 'xy'[i] if len(others) > 1 else ''})" for i in range(len(others))
        )
    if num_directions > size:
        raise ValueError(
            f"Expected `num_directions` to be at most the number of coordinates, {size}, got {num_directions}."
        )
    if directions == "random":
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randn(size, num_directions, generator=generator, dtype=torch.float64, device="cpu")
        rows = torch.linalg.qr(drawn).Q.T.to(landscape.device, landscape.dtype)
        return rows, tuple(f"random direction {i}" for i in range(1, num_directions + 1))
    result = top_eigenvalues(landscape, geometry, k=num_directions, seed=seed)
    if not result.converged:
        warnings.warn(
            f"The eigenvectors have not converged: residuals {result.residuals.tolist()} of eigenvalues "
            f"{result.eigenvalues.tolist()}. Directions are approximate.",
            stacklevel=3,
        )
    return result.eigenvectors, tuple(
        f"eigenvector {i} ($\\lambda$ = {value:.3g})" for i, value in enumerate(result.eigenvalues.tolist(), 1)
    )


def _displacement_to(landscape: LossLandscape, other: Tensor | nn.Module) -> Tensor:
    if isinstance(other, nn.Module):
        reshard(other)
        other = torch.cat([whole(p.detach()).reshape(-1) for p in other.parameters() if p.requires_grad])
    if other.shape != (landscape.num_parameters,):
        raise ValueError(
            f"Expected `other` to be weights of the same module, {landscape.num_parameters} in a flat vector, got "
            f"shape {tuple(other.shape)}."
        )
    here = torch.cat([p.detach().reshape(-1) for p in landscape.parameters])
    return other.to(landscape.device, landscape.dtype) - here.to(landscape.dtype)


def check_options(directions: Any, num_directions: Any, other: Any, radius: Any, num_points: Any) -> None:
    """Check the arguments of :func:`loss_surface` that need no landscape.

    Raises:
        ValueError: If one is out of range.
    """
    if not isinstance(directions, Tensor) and directions not in DIRECTIONS:
        raise ValueError(f"Expected `directions` to be one of {list(DIRECTIONS)} or a tensor, got {directions!r}.")
    if (isinstance(directions, str) and directions == "between") != (other is not None):
        raise ValueError(
            "Expected `other` weights with directions='between' and only then, got "
            f"{'none' if other is None else 'some'}. Pass other=module or other=flat_vector."
        )
    if isinstance(other, list | tuple) and len(other) not in (1, 2):
        raise ValueError(f"Expected `other` to be one or two sets of weights, got {len(other)}.")
    if num_directions not in (1, 2):
        raise ValueError(f"Expected `num_directions` to be 1 or 2, got {num_directions!r}.")
    if radius is not None and not 0 < radius < math.inf:
        raise ValueError(f"Expected `radius` to be a positive number or None, got {radius!r}.")
    if not isinstance(num_points, int) or num_points < 3 or num_points % 2 == 0:
        raise ValueError(
            f"Expected `num_points` to be an odd integer >= 3, so that 0 is among them, got {num_points!r}."
        )


def _check_directions(rows: Tensor, size: int) -> None:
    if rows.dim() != 2 or len(rows) not in (1, 2) or rows.shape[1] != size:
        raise ValueError(
            f"Expected one or two directions with one entry per coordinate, of shape ({size},), (1, {size}) or "
            f"(2, {size}), got {tuple(rows.shape)}."
        )
    norms = torch.linalg.vector_norm(rows.double(), dim=1)
    if not bool(torch.isfinite(norms).all()) or bool((norms == 0).any()):
        raise ValueError(f"Expected directions other than zero with finite entries, got norms {norms.tolist()}.")
    if len(rows) == 2:
        unit = rows.double() / norms[:, None]
        if float(torch.linalg.vector_norm(unit[1] - (unit[0] @ unit[1]) * unit[0])) < 1e-6:
            raise ValueError(
                "Expected two directions that span a plane, got parallel ones. Pass one of them for a line."
            )

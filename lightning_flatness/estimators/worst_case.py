"""The largest rise of the loss in a ball around the weights.

Projected gradient ascent finds the maximum over a ball in the coordinates ``z``. Its step length comes from the change
of the Lagrangian's gradient over the last step (Barzilai and Borwein): on a sphere, where a convex function has its
maximum, the gradient alone does not set a length. The result is a lower bound of the maximum. To first order no
point of the ball lies higher than ``rho ‖g‖ - <g, z>`` above ``z``; another peak may.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_flatness.estimators.arguments import BallNorm, check_arguments
from lightning_flatness.estimators.eigenvalues import top_eigenvalues
from lightning_flatness.estimators.nearby import check_radius, weight_rounding
from lightning_flatness.estimators.operators import gaussian
from lightning_flatness.estimators.result import Estimate, scalar_estimate
from lightning_flatness.estimators.sampling import of_parts, rise_standard_error
from lightning_flatness.geometry import Chart, Geometry
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.landscape.derived import sub_batches, with_normalized_logits

_MEMORY = 4
"""A step is accepted if it is better than the worst of so many before it: steps of this kind do not rise one by one."""

_SUFFICIENT = 1e-4
_MARGIN = 0.01
"""An ascent stops at this share of the tolerance: its last steps gain the most digits."""

_NUM_EIGENVECTORS = 3
_EIGENVECTOR_TOLERANCE = 1e-2
_EIGENVECTOR_PRODUCTS = 40

_FIRST_SHARE = 0.25
_NUM_PURSUED = 3
"""Each start has this share of the steps; the rest is for the best of them."""


def worst_case_sharpness(
    landscape: LossLandscape,
    rho: float = 0.05,
    geometry: str | Geometry = "euclidean",
    *,
    norm: BallNorm = "l2",
    num_steps: int = 20,
    num_restarts: int = 1,
    num_samples: int | None = None,
    normalize_logits: bool = False,
    tol: float = 0.01,
    seed: int = 0,
) -> Estimate:
    """Return the largest rise of the loss in the ball ``‖z‖ <= rho`` around the current weights; never negative.

    Arguments, cost and errors as of :class:`lightning_flatness.WorstCaseSharpness`. Deterministic given ``seed``.
    """
    counts = {"num_steps": num_steps, "num_restarts": num_restarts, "num_samples": num_samples}
    check_arguments({"rho": rho, "norm": norm, **counts, "tol": tol})
    products = landscape.cost.num_products
    with landscape.measurement():
        if normalize_logits:
            landscape = with_normalized_logits(landscape)
        chart = landscape.chart(geometry)
        reach = rho * (math.sqrt(chart.num_coordinates) if norm == "linf" else 1)
        check_radius(chart, reach, geometry)
        generator = torch.Generator(device="cpu").manual_seed(seed)
        starts = _starts(chart, landscape, rho, norm, num_restarts, generator)
        if num_samples is None:
            starts += _eigenvector_starts(landscape, chart, geometry, rho, norm, seed)
            value, gap, place = _Ball(landscape, chart, rho, norm).maximize(starts, num_steps, tol)
            standard_error = rise_standard_error(landscape, chart.displacement(place))
        else:
            value = gap = 0.0
            rises = []
            for part in sub_batches(landscape, num_samples):
                rise, missed, _ = _Ball(part, chart, rho, norm).maximize(starts, num_steps, tol)
                rises.append(rise)
                share = part.num_samples / landscape.num_samples
                value, gap = value + share * rise, gap + share * missed
                landscape.cost.gradient_evaluations += share * part.cost.gradient_evaluations
            standard_error = of_parts(landscape, rises)
        gap += weight_rounding(landscape)
    return scalar_estimate(
        landscape,
        value,
        gap,
        converged=gap <= tol * value,
        num_products=landscape.cost.num_products - products,
        standard_error=standard_error,
    )


def _starts(
    chart: Chart, landscape: LossLandscape, rho: float, norm: BallNorm, num_restarts: int, generator: torch.Generator
) -> list[Tensor]:
    """Return the centre and random points of the ball's surface."""
    starts = [torch.zeros(chart.num_coordinates, dtype=landscape.dtype, device=landscape.device)]
    for _ in range(num_restarts):
        starts.append(
            _on_surface(gaussian(chart.num_coordinates, generator, landscape.dtype, landscape.device), rho, norm)
        )
    return starts


def _eigenvector_starts(
    landscape: LossLandscape, chart: Chart, geometry: str | Geometry, rho: float, norm: BallNorm, seed: int
) -> list[Tensor]:
    """Return both ends of the axes of the first eigenvectors: on a trained network the best is often not the first."""
    found = top_eigenvalues(
        landscape,
        geometry,
        k=min(_NUM_EIGENVECTORS, chart.num_coordinates),
        tol=_EIGENVECTOR_TOLERANCE,
        max_products=_EIGENVECTOR_PRODUCTS,
        seed=seed,
    )
    ends = [_on_surface(vector, rho, norm) for vector in found.eigenvectors]
    return [sign * end for end in ends for sign in (1, -1)]


def _on_surface(z: Tensor, rho: float, norm: BallNorm) -> Tensor:
    if norm == "linf":
        return rho * torch.sign(z)
    on_sphere: Tensor = z * (rho / torch.linalg.vector_norm(z))
    return on_sphere


class _Peak(NamedTuple):
    """The best point of an ascent: the rise of the loss, the first-order gap, and the coordinates."""

    rise: float
    gap: float
    z: Tensor


class _Ball:
    """The ball ``‖z‖ <= rho`` and the loss in it."""

    def __init__(self, landscape: LossLandscape, chart: Chart, rho: float, norm: BallNorm) -> None:
        self.landscape = landscape
        self.chart = chart
        self.rho = rho
        self.norm: BallNorm = norm

    def maximize(self, starts: list[Tensor], num_steps: int, tol: float) -> tuple[float, float, Tensor]:
        """Return the largest rise found, what an ascent from there gains at most to first order, and where it is."""
        zero = torch.zeros_like(starts[0])
        centre = self._loss_and_gradient(zero)
        num_first = max(1, math.ceil(_FIRST_SHARE * num_steps))
        peaks = [self._ascend(start, centre, num_first, tol) for start in starts]
        for peak in sorted(peaks, key=lambda peak: -peak.rise)[:_NUM_PURSUED]:
            if num_steps > num_first and peak.gap > _MARGIN * tol * peak.rise:
                peaks.append(self._ascend(peak.z, centre, num_steps - num_first, tol))
        best = max(_Peak(0.0, self._gap(zero, centre[1]), zero), *peaks, key=lambda peak: peak.rise)
        return best.rise, best.gap, best.z

    def _ascend(self, z: Tensor, known: tuple[float, Tensor], num_steps: int, tol: float) -> _Peak:
        centre = known[0]
        loss, g = self._loss_and_gradient(z) if z.any() else known
        num_left = num_steps - 1
        best, history = _Peak(loss - centre, self._gap(z, g), z), [loss]
        slope = self._lagrangian(z, g)
        step = self._longest(slope)
        while num_left > 0 and best.gap > _MARGIN * tol * max(best.rise, 0.0):
            new = self._project(z + step * slope)
            change = new - z
            if float(change.abs().max()) <= 8 * torch.finfo(z.dtype).eps * self.rho:
                break
            new_loss, new_g = self._loss_and_gradient(new)
            num_left -= 1
            if new_loss - centre > best.rise:
                best = _Peak(new_loss - centre, self._gap(new, new_g), new)
            if new_loss < min(history[-_MEMORY:]) + _SUFFICIENT * float(torch.dot(slope, change)):
                step = self._shortened(step, change, slope)
                continue
            new_slope = self._lagrangian(new, new_g)
            # The gradient of the Lagrangian at both ends, with the multiplier of the newer one: its change
            # is the curvature along the sphere.
            bend = -float(torch.dot(change, self._lagrangian_change(z, g, new, new_g)))
            longest = self._longest(new_slope)
            step = min(longest, float(torch.dot(change, change)) / bend) if bend > 0 else longest
            z, g, slope = new, new_g, new_slope
            history.append(new_loss)
        return best

    def _shortened(self, step: float, change: Tensor, slope: Tensor) -> float:
        """Return a step a quarter as long; one that the projection had cut off is measured by where it led."""
        length = float(torch.linalg.vector_norm(change)) / max(float(torch.linalg.vector_norm(slope)), 1e-300)
        return 0.25 * min(step, length)

    def _loss_and_gradient(self, z: Tensor) -> tuple[float, Tensor]:
        with self.landscape.displaced(self.chart.displacement(z)):
            loss, gradient = self.landscape.loss_and_gradient()
        return float(loss), self.chart.pull_back_at(z, gradient)

    def _project(self, z: Tensor) -> Tensor:
        if self.norm == "linf":
            return z.clamp(-self.rho, self.rho)
        inside: Tensor = z * (self.rho / torch.linalg.vector_norm(z).clamp(min=self.rho))
        return inside

    def _multiplier(self, z: Tensor, g: Tensor) -> Tensor:
        """Return the factor mu >= 0 of ``z`` in ``g`` where the l2 ball holds the ascent back, else 0."""
        is_inside = torch.linalg.vector_norm(z) < (1 - 1e-6) * self.rho
        mu = torch.dot(g, z).clamp(min=0) / self.rho**2
        return torch.zeros_like(mu) if self.norm == "linf" else mu.masked_fill(is_inside, 0)

    def _lagrangian(self, z: Tensor, g: Tensor) -> Tensor:
        """Return the direction of ascent: the gradient without what leads straight out of the ball."""
        if self.norm == "l2":
            return g - self._multiplier(z, g) * z
        blocked = ((z >= self.rho) & (g > 0)) | ((z <= -self.rho) & (g < 0))
        return g.masked_fill(blocked, 0)

    def _lagrangian_change(self, z: Tensor, g: Tensor, new: Tensor, new_g: Tensor) -> Tensor:
        mu = self._multiplier(new, new_g)
        return (new_g - mu * new) - (g - mu * z)

    def _longest(self, slope: Tensor) -> float:
        """Return the step that crosses the ball along the slope."""
        if self.norm == "linf":
            entries = slope.abs()
            smallest = float(entries[entries > 0].min()) if bool(entries.any()) else 1.0
            return 2 * self.rho / max(smallest, torch.finfo(slope.dtype).tiny)
        return 4 * self.rho / max(float(torch.linalg.vector_norm(slope)), torch.finfo(slope.dtype).tiny)

    def _gap(self, z: Tensor, g: Tensor) -> float:
        """Return ``max_(‖y‖ <= rho) <g, y - z>``."""
        dual = torch.linalg.vector_norm(g, ord=2 if self.norm == "l2" else 1)
        return max(0.0, float(self.rho * dual - torch.dot(g, z)))

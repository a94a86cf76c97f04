"""How much the loss rises nearby: at worst in a ball around the weights, and on average under Gaussian noise.

The worst case is a maximum over a ball in the coordinates ``z``, found by projected gradient ascent. Its step
length comes from how the gradient of the Lagrangian changed over the last step (Barzilai and Borwein): the
gradient alone says nothing about lengths on a sphere, where a convex function is maximal. Each ascent knows by how
much it may have missed: to first order no point of the ball lies higher than ``rho ‖g‖ - <g, z>`` above ``z``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_flatness.estimators.eigenvalues import top_eigenvalues
from lightning_flatness.estimators.trace import mean_and_error
from lightning_flatness.geometry import Chart, Geometry
from lightning_flatness.landscape import LossLandscape

BallNorm = Literal["l2", "linf"]

_MEMORY = 4
"""A step is accepted if it is better than the worst of so many before it: step lengths of this kind need the room."""

_SUFFICIENT = 1e-4
_MARGIN = 0.01
"""An ascent goes on beyond the tolerance: its last steps are the ones that gain digits."""

_EIGENVECTOR_TOLERANCE = 1e-3
_EIGENVECTOR_PRODUCTS = 60


@dataclass(frozen=True)
class SharpnessResult:
    """How much the loss rises nearby.

    Attributes:
        value: The rise ``L(w(z)) - L(w)``, a scalar: the largest found, or the mean.
        error: Of the worst case, the first-order bound on what was missed near the point found; of the mean, the
            standard error.
        converged: Whether the error reached the tolerance.
        num_products: Hessian-vector products.
        gradient_evaluations: What it cost, in gradients on all samples.
    """

    value: Tensor
    error: Tensor
    converged: bool
    num_products: int
    gradient_evaluations: float


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
) -> SharpnessResult:
    """Return the largest rise of the loss in the ball ``‖z‖ <= rho`` around the current weights; never negative.

    Ascends from the centre, from ``num_restarts`` random points and, without sub-batches, from both ends of the
    top eigenvector of the Hessian. So the value is never below the rise along that eigenvector.
    Costs at most ``num_steps`` gradients per start, and the eigenvector (see :func:`top_eigenvalues`). Memory: eight
    vectors of the size of the weights beside the eigenvector's. Deterministic given ``seed``.

    Args:
        landscape: The loss.
        rho: Radius of the ball, in units of ``z``.
        geometry: The coordinates ``z``; see :mod:`lightning_flatness.geometry`. ``"element"``: adaptive sharpness.
        norm: ``"l2"``, or ``"linf"`` for the largest entry of ``z``.
        num_steps: Gradients to spend from each start at most.
        num_restarts: Random starts beside the others.
        num_samples: Size m of the sub-batches of m-sharpness: the average over them of each one's worst case in a
            ball of its own. Default: one ball for the loss of all samples.
        normalize_logits: Divide the logits by their standard deviation; needs an ``OutputLoss``.
        tol: Error, relative to the value, at which the result counts as converged; ascents stop at a hundredth of it.
        seed: Seed of the random starts.

    Returns:
        The rise, with a first-order bound on what may have been missed close by.

    Raises:
        ValueError: If an argument is out of range, or the ball reaches beyond where the chart is defined.
    """
    check_sharpness_arguments(rho, norm, num_steps, num_restarts, num_samples, tol)
    spent, products = landscape.cost.gradient_evaluations, landscape.cost.num_products
    with landscape.measurement():
        if normalize_logits:
            landscape = landscape.with_normalized_logits()
        chart = landscape.chart(geometry)
        reach = rho * (math.sqrt(chart.num_coordinates) if norm == "linf" else 1)
        _check_radius(chart, reach, geometry)
        generator = torch.Generator().manual_seed(seed)
        starts = _starts(chart, landscape, rho, norm, num_restarts, generator)
        if num_samples is None:
            starts += _eigenvector_starts(landscape, chart, geometry, rho, norm, seed)
            value, gap = _Ball(landscape, chart, rho, norm).maximize(starts, num_steps, tol)
        else:
            value = gap = 0.0
            for part in landscape.sub_batches(num_samples):
                rise, missed = _Ball(part, chart, rho, norm).maximize(starts, num_steps, tol)
                share = part.num_samples / landscape.num_samples
                value, gap = value + share * rise, gap + share * missed
                landscape.cost.gradient_evaluations += share * part.cost.gradient_evaluations
        gap += _weight_rounding(landscape)
    return SharpnessResult(
        value=torch.tensor(value, dtype=landscape.dtype, device=landscape.device),
        error=torch.tensor(gap, dtype=landscape.dtype, device=landscape.device),
        converged=gap <= tol * value,
        num_products=landscape.cost.num_products - products,
        gradient_evaluations=landscape.cost.gradient_evaluations - spent,
    )


def average_case_sharpness(
    landscape: LossLandscape,
    rho: float = 0.05,
    geometry: str | Geometry = "euclidean",
    *,
    num_draws: int = 50,
    normalize_logits: bool = False,
    tol: float = 0.1,
    seed: int = 0,
) -> SharpnessResult:
    """Return the mean rise of the loss under noise: of ``L(w(z)) - L(w)`` for ``z ~ N(0, rho²/n I)``.

    So ``‖z‖`` is about ``rho``, as in the worst case. Draws come in pairs ``z`` and ``-z``, which cancels the slope;
    the pairs are independent, and their scatter gives the error. On a quadratic loss the value is
    ``rho² tr(H)/(2n)``. Costs two thirds of a gradient per pair. Memory: two vectors of the size of the weights.

    Args:
        landscape: The loss.
        rho: Root mean square length of the noise, in units of ``z``.
        geometry: The coordinates ``z``; see :mod:`lightning_flatness.geometry`.
        num_draws: Pairs to draw.
        normalize_logits: Divide the logits by their standard deviation; needs an ``OutputLoss``.
        tol: Standard error, relative to the value, at which the result counts as converged.
        seed: Seed of the noise.

    Returns:
        The mean rise with its standard error. It may be negative where the loss curves down.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_average_arguments(rho, num_draws, tol)
    spent = landscape.cost.gradient_evaluations
    with landscape.measurement():
        if normalize_logits:
            landscape = landscape.with_normalized_logits()
        chart = landscape.chart(geometry)
        _check_radius(chart, rho, geometry)
        centre = float(landscape.loss())
        generator = torch.Generator().manual_seed(seed)
        rises = []
        for _ in range(num_draws):
            noise = _gaussian(chart.num_coordinates, generator, landscape)
            z = noise * (rho / math.sqrt(chart.num_coordinates))
            rises.append(sum(_loss_at(landscape, chart, side) for side in (z, -z)) / 2 - centre)
    value, error = mean_and_error(torch.tensor(rises, dtype=torch.float64))
    rounding = max(torch.finfo(landscape.dtype).eps * abs(centre), _weight_rounding(landscape))
    error = torch.hypot(error, torch.tensor(rounding, dtype=torch.float64))
    return SharpnessResult(
        value=value.to(landscape.dtype).to(landscape.device),
        error=error.to(landscape.dtype).to(landscape.device),
        converged=bool(error <= tol * value.abs()),
        num_products=0,
        gradient_evaluations=landscape.cost.gradient_evaluations - spent,
    )


def check_sharpness_arguments(
    rho: Any, norm: Any, num_steps: Any, num_restarts: Any, num_samples: Any, tol: float
) -> None:
    """Raise an error unless the arguments of a worst case are in range.

    Raises:
        ValueError: If one is not.
    """
    _check_rho(rho)
    if norm not in get_args(BallNorm):
        raise ValueError(f"Expected `norm` to be 'l2' or 'linf', got {norm!r}.")
    counts = [("num_steps", num_steps, 1), ("num_restarts", num_restarts, 0)]
    if num_samples is not None:
        counts.append(("num_samples", num_samples, 1))
    for name, value, least in counts:
        if not isinstance(value, int) or value < least:
            raise ValueError(f"Expected `{name}` to be an integer >= {least}, got {value!r}.")
    if not tol >= 0:
        raise ValueError(f"Expected `tol` to be >= 0, got {tol}.")


def check_average_arguments(rho: Any, num_draws: Any, tol: float) -> None:
    """Raise an error unless the arguments of an average case are in range.

    Raises:
        ValueError: If one is not.
    """
    _check_rho(rho)
    if not isinstance(num_draws, int) or num_draws < 2:
        raise ValueError(f"Expected `num_draws` to be an integer >= 2 (two at least give an error), got {num_draws!r}.")
    if not tol >= 0:
        raise ValueError(f"Expected `tol` to be >= 0, got {tol}.")


def _check_rho(rho: Any) -> None:
    if not (isinstance(rho, int | float) and 0 < rho < math.inf):
        raise ValueError(f"Expected `rho` to be > 0 and finite, got {rho!r}.")


def _weight_rounding(landscape: LossLandscape) -> float:
    """Return by how much the rounding of weights of low precision (bfloat16, say) moves the loss, roughly.

    Weights that are kept in the dtype of vectors are moved by full steps; others only from one value to the next.
    """
    coarse = [torch.finfo(p.dtype).eps for p in landscape.parameters if p.dtype != landscape.dtype]
    return max(coarse) * abs(float(landscape.loss())) if coarse else 0.0


def _check_radius(chart: Chart, reach: float, geometry: str | Geometry) -> None:
    if reach >= chart.radius:
        raise ValueError(
            f"Expected a `rho` whose ball stays within ‖z‖ < {chart.radius:.4g}, where the chart of the geometry "
            f"{geometry!r} ends at the current weights, got one that reaches {reach:.4g}. Choose a smaller radius."
        )


# ------------------------------------------------------------------------------------------------------- the ascent


class _Ball:
    """The ball ``‖z‖ <= rho`` and the loss in it."""

    def __init__(self, landscape: LossLandscape, chart: Chart, rho: float, norm: BallNorm) -> None:
        self.landscape = landscape
        self.chart = chart
        self.rho = rho
        self.norm: BallNorm = norm

    def maximize(self, starts: list[Tensor], num_steps: int, tol: float) -> tuple[float, float]:
        """Return the largest rise found from any start, and the first-order bound on what was missed there."""
        zero = torch.zeros_like(starts[0])
        centre, gradient = self._loss_and_gradient(zero)
        best = 0.0, self._gap(zero, gradient)
        for start in starts:
            if start.any():
                found = self._ascend(start, None, centre, num_steps, tol)
            else:
                found = self._ascend(zero, (centre, gradient), centre, num_steps, tol)
            best = max(best, found, key=lambda pair: pair[0])
        return best

    def _ascend(
        self, z: Tensor, known: tuple[float, Tensor] | None, centre: float, num_steps: int, tol: float
    ) -> tuple[float, float]:
        loss, g = self._loss_and_gradient(z) if known is None else known
        num_left = num_steps - 1
        best, history = (loss - centre, self._gap(z, g)), [loss]
        slope = self._lagrangian(z, g)
        step = self._longest(slope)
        while num_left > 0 and best[1] > _MARGIN * tol * max(best[0], 0.0):
            new = self._project(z + step * slope)
            change = new - z
            if float(change.abs().max()) <= 8 * torch.finfo(z.dtype).eps * self.rho:
                break
            new_loss, new_g = self._loss_and_gradient(new)
            num_left -= 1
            if new_loss - centre > best[0]:
                best = new_loss - centre, self._gap(new, new_g)
            if new_loss < min(history[-_MEMORY:]) + _SUFFICIENT * float(torch.dot(slope, change)):
                step = self._shortened(step, change, slope)
                continue
            new_slope = self._lagrangian(new, new_g)
            # The gradient of the Lagrangian at both ends, with the multiplier of the newer: what is left of its
            # change is the curvature along the sphere.
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
        length = float(torch.linalg.vector_norm(z))
        return z if length <= self.rho else z * (self.rho / length)

    def _multiplier(self, z: Tensor, g: Tensor) -> float:
        """Return the factor mu >= 0 of ``z`` in ``g`` where the l2 ball holds the ascent back, else 0."""
        if self.norm == "linf" or float(torch.linalg.vector_norm(z)) < (1 - 1e-6) * self.rho:
            return 0.0
        return max(0.0, float(torch.dot(g, z))) / self.rho**2

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
        return max(0.0, self.rho * float(dual) - float(torch.dot(g, z)))


def _starts(
    chart: Chart, landscape: LossLandscape, rho: float, norm: BallNorm, num_restarts: int, generator: torch.Generator
) -> list[Tensor]:
    """Return the centre and random points of the ball's surface."""
    starts = [torch.zeros(chart.num_coordinates, dtype=landscape.dtype, device=landscape.device)]
    for _ in range(num_restarts):
        starts.append(_on_surface(_gaussian(chart.num_coordinates, generator, landscape), rho, norm))
    return starts


def _eigenvector_starts(
    landscape: LossLandscape, chart: Chart, geometry: str | Geometry, rho: float, norm: BallNorm, seed: int
) -> list[Tensor]:
    """Return the end of the top eigenvector's axis at which the loss is higher."""
    found = top_eigenvalues(
        landscape, geometry, tol=_EIGENVECTOR_TOLERANCE, max_products=_EIGENVECTOR_PRODUCTS, seed=seed
    )
    end = _on_surface(found.eigenvectors[0], rho, norm)
    return [max((end, -end), key=lambda z: _loss_at(landscape, chart, z))]


def _on_surface(z: Tensor, rho: float, norm: BallNorm) -> Tensor:
    if norm == "linf":
        return rho * torch.sign(z)
    on_sphere: Tensor = z * (rho / torch.linalg.vector_norm(z))
    return on_sphere


def _gaussian(size: int, generator: torch.Generator, landscape: LossLandscape) -> Tensor:
    return torch.randn(size, generator=generator, dtype=landscape.dtype).to(landscape.device)


def _loss_at(landscape: LossLandscape, chart: Chart, z: Tensor) -> float:
    with landscape.displaced(chart.displacement(z)):
        return float(landscape.loss())

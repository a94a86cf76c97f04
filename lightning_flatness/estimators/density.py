"""The spectral density of the Hessian by stochastic Lanczos quadrature (arXiv 1901.10159, 1802.03451).

Lanczos from a random vector v projects the operator on a small tridiagonal matrix. Its eigenvalues theta_j and the
squared first components tau_j of its eigenvectors are the Gauss quadrature of the measure that puts the weight
``(vᵀ u_i)²`` on each eigenvalue lambda_i; the average of that measure over v is the spectral density. The moments
``sum_j tau_j theta_j^p`` are therefore unbiased for ``tr(A^p)/n`` up to twice the number of steps less one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_flatness.estimators.arguments import check_arguments
from lightning_flatness.estimators.krylov.basis import Basis
from lightning_flatness.estimators.operators import Operator, check_finite, curvature_product, rademacher, unit_vector
from lightning_flatness.estimators.result import Estimate, mean_and_error
from lightning_flatness.estimators.sampling import moment_standard_errors
from lightning_flatness.geometry import Geometry
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.landscape.vectors import Vectors

NUM_MOMENTS = 4
LEAST = {"num_steps": 3}
_DOUBLE: Any = {"dtype": torch.float64, "device": "cpu"}
_MARGIN = 5.0
"""The margin of the grid beyond the outermost eigenvalues, in widths of the kernel: the density falls to 1e-6 there."""


@dataclass(frozen=True)
class DensityResult(Estimate):
    """An estimated spectral density: per coordinate, so that it integrates to one.

    ``value`` is the density of eigenvalues over ``grid``, smoothed by a Gaussian of standard deviation ``width``, and
    ``error`` its standard error at each point; ``converged`` compares the integral of ``error`` with the tolerance.

    Attributes:
        grid: Where the density is given, shape (num_points,), evenly spaced, from below the smallest to above the
            largest eigenvalue found.
        moments: ``tr(A^p)/n`` for p = 1 … 4; of the eigenvalues themselves, without the smoothing.
        moment_errors: Their standard errors over the random vectors: the scatter, at least what the largest eigenvalue
            alone makes. ``converged`` is about the density, not about these.
        moment_standard_errors: Those for the whole set that the samples were drawn from, of the first two; not numbers
            where they are not known. The negative share has none: on few samples it is smaller, as the rank is.
        negative_share: Share of the eigenvalues that are negative (beyond rounding), a scalar.
        negative_share_error: Its standard error, and what so many steps leave open about eigenvalues around zero: the
            truth is between the share less and plus this. The share itself can be several times too large.
        width: Standard deviation of the kernel, in units of the eigenvalues, a scalar.
        num_runs: Independent random vectors behind it; 0 where the spectrum is exact.
    """

    grid: Tensor
    moments: Tensor
    moment_errors: Tensor
    moment_standard_errors: Tensor
    negative_share: Tensor
    negative_share_error: Tensor
    width: Tensor
    num_runs: int


def spectral_density(
    landscape: LossLandscape,
    geometry: str | Geometry = "euclidean",
    *,
    operator: Operator = "hessian",
    num_runs: int = 10,
    num_steps: int = 30,
    num_points: int = 256,
    width: float = 0.01,
    tol: float = 0.2,
    seed: int = 0,
) -> DensityResult:
    """Return the spectral density of the Hessian (or Gauss-Newton matrix) of ``z -> L(w(z))`` at the current weights.

    Arguments, cost and errors as of :class:`lightning_flatness.SpectralDensity`.
    """
    counts = {"num_runs": num_runs, "num_steps": num_steps, "num_points": num_points}
    check_arguments({"operator": operator, **counts, "width": width, "tol": tol}, LEAST)
    products = landscape.cost.num_products
    with landscape.measurement():
        chart = landscape.chart(geometry)
        size = chart.num_coordinates
        matvec = curvature_product(landscape, chart, operator)
        if size <= num_runs * num_steps:
            runs, num_runs = [_exact_spectrum(matvec, size, landscape)], 0
        else:
            generator = torch.Generator(device="cpu").manual_seed(seed)
            runs = []
            for _ in range(num_runs):
                start = rademacher(size, generator, landscape.dtype, landscape.device)
                runs.append(quadrature(*tridiagonalize(matvec, start, num_steps)))
        nodes, weights = _padded(runs)
        moments = torch.stack([(weights * nodes**p).sum(dim=1).mean() for p in (1, 2)])
        sampling = torch.full((2,), math.nan, **_DOUBLE)
        if operator == "hessian":
            sampling = moment_standard_errors(landscape, chart, matvec, moments, seed)
    return _summary(
        nodes,
        weights,
        num_points=num_points,
        width=width,
        tol=tol,
        eps=torch.finfo(landscape.dtype).eps + landscape.product_error,
        size=size,
        num_runs=num_runs,
        num_products=landscape.cost.num_products - products,
        sampling=sampling,
    )


def tridiagonalize(matvec: Callable[[Tensor], Tensor], start: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return the projection of a symmetric operator on the Krylov space of a vector, by Lanczos: two diagonals.

    Diagonal, shape (steps,), and off-diagonal, shape (steps - 1,), in float64 on the CPU. There are fewer steps if the
    space is smaller. Every vector is orthogonalised against all before it; otherwise copies of eigenvalues show up.
    What ``matvec`` returns is overwritten.

    Example:
        >>> tridiagonalize(lambda v: torch.tensor([1.0, 3.0]) * v, torch.ones(2), 5)
        (tensor([2.0000, 2.0000], dtype=torch.float64), tensor([1.0000], dtype=torch.float64))
    """
    basis = Basis(min(num_steps, len(start)), Vectors(len(start), start.dtype, start.device))
    basis.append(start, torch.linalg.vector_norm(start))
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    scale = 0.0
    for step in range(min(num_steps, len(start))):
        product = matvec(basis[step])
        scale = max(scale, float(torch.linalg.vector_norm(product)))
        coefficients, remainder, norm = basis.orthogonalize(product)
        check_finite(coefficients, norm)
        diagonal.append(float(coefficients[-1]))
        if norm <= 64 * torch.finfo(start.dtype).eps * scale or step + 1 == min(num_steps, len(start)):
            break
        off_diagonal.append(norm)
        basis.append(remainder, norm)
    return torch.tensor(diagonal, **_DOUBLE), torch.tensor(off_diagonal, **_DOUBLE)


def quadrature(diagonal: Tensor, off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes and weights (of sum one) of the Gauss quadrature that belongs to a tridiagonal matrix."""
    matrix = torch.diag(diagonal) + torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    return nodes, vectors[0].square()


def _exact_spectrum(matvec: Callable[[Tensor], Tensor], size: int, landscape: LossLandscape) -> tuple[Tensor, Tensor]:
    columns = [matvec(unit_vector(size, i, landscape.dtype, landscape.device)) for i in range(size)]
    matrix = torch.stack(columns).cpu().double()
    check_finite(matrix)
    eigenvalues = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    return eigenvalues, torch.full_like(eigenvalues, 1 / size)


def _padded(runs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return nodes and weights, a row per run; a run that ended early is filled up with weights of zero."""
    length = max(len(nodes) for nodes, _ in runs)
    nodes = torch.stack([torch.cat([n, n[-1:].expand(length - len(n))]) for n, _ in runs])
    weights = torch.stack([torch.cat([w, w.new_zeros(length - len(w))]) for _, w in runs])
    return nodes, weights


def _summary(
    nodes: Tensor,
    weights: Tensor,
    *,
    num_points: int,
    width: float,
    tol: float,
    eps: float,
    size: int,
    num_runs: int,
    num_products: int,
    sampling: Tensor,
) -> DensityResult:
    low, high, largest = float(nodes.min()), float(nodes.max()), float(nodes.abs().max())
    sigma = width * (high - low if high - low > 64 * eps * largest else largest or 1.0)
    grid = torch.linspace(low - _MARGIN * sigma, high + _MARGIN * sigma, num_points, **_DOUBLE)
    # A run at a time: the kernel has a number for every node and point of the grid.
    smoothed = torch.stack([_smoothed(grid, n, w, sigma) for n, w in zip(nodes, weights, strict=True)])
    density, density_errors = _mean_and_error(smoothed)
    powers = torch.stack([(weights * nodes**p).sum(dim=1) for p in range(1, NUM_MOMENTS + 1)], dim=1)
    moments, moment_errors = _mean_and_error(powers)
    if num_runs > 0:
        # The scatter of a few runs misses the rare vectors along the largest eigenvalue, which alone makes this much.
        alone = [largest**p * math.sqrt(2 / num_runs) / size for p in range(1, NUM_MOMENTS + 1)]
        moment_errors = torch.maximum(moment_errors, torch.tensor(alone, **_DOUBLE))
    scales = torch.stack([(weights * nodes.abs() ** p).sum(dim=1).mean() for p in range(1, NUM_MOMENTS + 1)])
    is_negative = nodes < -64 * eps * largest
    negative_share, negative_share_error = _mean_and_error((weights * is_negative).sum(dim=1))
    if num_runs > 0:
        resolution = torch.stack([_weight_around(w, int(n.sum())) for w, n in zip(weights, is_negative, strict=True)])
        negative_share_error = torch.hypot(negative_share_error, resolution.mean())
    spacing = float(grid[1] - grid[0])
    return DensityResult(
        value=density,
        error=density_errors,
        grid=grid,
        moments=moments,
        moment_errors=torch.hypot(moment_errors, 64 * eps * scales),
        moment_standard_errors=torch.hypot(moment_errors[:2], sampling),
        negative_share=negative_share,
        negative_share_error=negative_share_error,
        width=torch.tensor(sigma, **_DOUBLE),
        num_runs=num_runs,
        converged=float(density_errors.sum()) * spacing <= tol,
        num_products=num_products,
    )


def _weight_around(weights: Tensor, index: int) -> Tensor:
    """Return the larger weight of the two nodes around a place between nodes.

    By the inequalities of Chebyshev, Markov and Stieltjes the share of the spectrum below that place is known up to it:
    of eigenvalues that crowd around zero, a few steps of Lanczos cannot tell the sign.
    """
    return weights[max(index - 1, 0) : index + 1].max()


def _smoothed(grid: Tensor, nodes: Tensor, weights: Tensor, sigma: float) -> Tensor:
    kernel = torch.exp(-0.5 * ((grid[:, None] - nodes) / sigma).square()) / (sigma * math.sqrt(2 * math.pi))
    return kernel @ weights


def _mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard error over the runs; one run alone is the exact spectrum."""
    if len(samples) == 1:
        return samples[0], torch.zeros_like(samples[0])
    return mean_and_error(samples)

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

import torch
from torch import Tensor

from lightning_flatness.estimators.basis import Basis
from lightning_flatness.estimators.operators import (
    Operator,
    check_operator,
    curvature_product,
    rademacher,
    unit_vector,
)
from lightning_flatness.estimators.trace import mean_and_error
from lightning_flatness.geometry import Geometry
from lightning_flatness.landscape import LossLandscape

NUM_MOMENTS = 4
_MARGIN = 5.0
"""What the grid reaches beyond the outermost eigenvalues, in widths of the kernel: the density has fallen to 1e-6."""


@dataclass(frozen=True)
class DensityResult:
    """An estimated spectral density: per coordinate, so that it integrates to one.

    Attributes:
        grid: Where the density is given, shape (num_points,), evenly spaced, from below the smallest to above the
            largest eigenvalue found.
        density: The density of eigenvalues, smoothed by a Gaussian of the standard deviation ``width``.
        density_errors: Its standard errors, point by point.
        moments: ``tr(A^p)/n`` for p = 1 … 4; of the eigenvalues themselves, without the smoothing.
        moment_errors: Their standard errors.
        negative_share: Share of the eigenvalues that are negative (beyond rounding), a scalar.
        negative_share_error: Its standard error, and what so many steps leave open about eigenvalues around zero.
        width: Standard deviation of the kernel, in units of the eigenvalues, a scalar.
        num_runs: Independent random vectors behind it; 0 where the spectrum is exact.
        converged: Whether the standard error of the density, integrated over the grid, reached the tolerance.
        num_products: Products with the operator.
        gradient_evaluations: What they cost, in gradients on all samples.
    """

    grid: Tensor
    density: Tensor
    density_errors: Tensor
    moments: Tensor
    moment_errors: Tensor
    negative_share: Tensor
    negative_share_error: Tensor
    width: Tensor
    num_runs: int
    converged: bool
    num_products: int
    gradient_evaluations: float


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

    Costs one gradient and two per product, of which there are ``num_runs · num_steps``; memory: ``num_steps`` vectors
    of the size of the weights. If there are no more coordinates than that, their products give the spectrum exactly.

    Args:
        landscape: The loss.
        geometry: The coordinates ``z``; see :mod:`lightning_flatness.geometry`.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix.
        num_runs: Independent random vectors; their scatter is the error.
        num_steps: Lanczos steps from each.
        num_points: Points of the grid.
        width: Standard deviation of the smoothing Gaussian, relative to the range of the spectrum.
        tol: Standard error of the density, integrated over the grid, at which the result counts as converged.
        seed: Seed of the random vectors.

    Returns:
        The density over a grid, moments and the share of negative eigenvalues, each with its standard error.

    Raises:
        ValueError: If an argument is out of range.
        RuntimeError: If a product is not finite.
    """
    check_operator(operator)
    check_density_arguments(num_runs, num_steps, num_points, width, tol)
    spent, products = landscape.cost.gradient_evaluations, landscape.cost.num_products
    with landscape.measurement():
        chart = landscape.chart(geometry)
        size = chart.num_coordinates
        matvec = curvature_product(landscape, chart, operator)
        if size <= num_runs * num_steps:
            runs, num_runs = [_exact_spectrum(matvec, size, landscape)], 0
        else:
            generator = torch.Generator().manual_seed(seed)
            runs = []
            for _ in range(num_runs):
                start = rademacher(size, generator, landscape.dtype, landscape.device)
                runs.append(quadrature(*tridiagonalize(matvec, start, num_steps)))
    nodes, weights = _padded(runs)
    return _summary(
        nodes,
        weights,
        num_points=num_points,
        width=width,
        tol=tol,
        eps=torch.finfo(landscape.dtype).eps + landscape.product_error,
        num_runs=num_runs,
        num_products=landscape.cost.num_products - products,
        gradient_evaluations=landscape.cost.gradient_evaluations - spent,
    )


def tridiagonalize(matvec: Callable[[Tensor], Tensor], start: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return the projection of a symmetric operator on the Krylov space of a vector, by Lanczos.

    Every vector is orthogonalised against all before it, without which copies of eigenvalues would show up.

    Args:
        matvec: Product of the operator with a vector; what it returns is overwritten.
        start: The vector, of any length but zero.
        num_steps: Products; fewer if the Krylov space is smaller.

    Returns:
        Diagonal, shape (steps,), and off-diagonal, shape (steps - 1,), of the tridiagonal matrix; float64 on the CPU.

    Raises:
        RuntimeError: If a product is not finite.

    Example:
        >>> tridiagonalize(lambda v: torch.tensor([1.0, 3.0]) * v, torch.ones(2), 5)
        (tensor([2.0000, 2.0000], dtype=torch.float64), tensor([1.0000], dtype=torch.float64))
    """
    basis = Basis(min(num_steps, len(start)), len(start), start.dtype, start.device)
    basis.append(start, torch.linalg.vector_norm(start))
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    scale = 0.0
    for step in range(min(num_steps, len(start))):
        product = matvec(basis[step])
        scale = max(scale, float(torch.linalg.vector_norm(product)))
        coefficients, remainder, norm = basis.orthogonalize(product)
        if not (torch.isfinite(coefficients).all() and norm < math.inf):
            raise RuntimeError(
                "Expected finite Hessian-vector products, got one that is not. Check the gradient of the loss at the "
                "current weights (e.g. a square root or a norm at zero), or measure in float64."
            )
        diagonal.append(float(coefficients[-1]))
        if norm <= 64 * torch.finfo(start.dtype).eps * scale or step + 1 == min(num_steps, len(start)):
            break
        off_diagonal.append(norm)
        basis.append(remainder, norm)
    return torch.tensor(diagonal, dtype=torch.float64), torch.tensor(off_diagonal, dtype=torch.float64)


def quadrature(diagonal: Tensor, off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of the Gauss quadrature that belongs to a tridiagonal matrix.

    Args:
        diagonal: Shape (steps,).
        off_diagonal: Shape (steps - 1,).

    Returns:
        Nodes and weights, shape (steps,); the weights sum to one.
    """
    matrix = torch.diag(diagonal) + torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    return nodes, vectors[0].square()


def check_density_arguments(num_runs: int, num_steps: int, num_points: int, width: float, tol: float) -> None:
    """Raise an error unless the arguments of a spectral density are in range.

    Raises:
        ValueError: If one is not.
    """
    for name, value, least in [("num_runs", num_runs, 2), ("num_steps", num_steps, 3), ("num_points", num_points, 2)]:
        if not isinstance(value, int) or value < least:
            raise ValueError(f"Expected `{name}` to be an integer >= {least}, got {value!r}.")
    if not width > 0:
        raise ValueError(f"Expected `width` to be > 0, got {width}.")
    if not tol >= 0:
        raise ValueError(f"Expected `tol` to be >= 0, got {tol}.")


def _exact_spectrum(matvec: Callable[[Tensor], Tensor], size: int, landscape: LossLandscape) -> tuple[Tensor, Tensor]:
    columns = [matvec(unit_vector(size, i, landscape.dtype, landscape.device)) for i in range(size)]
    matrix = torch.stack(columns).cpu().double()
    if not torch.isfinite(matrix).all():
        raise RuntimeError(
            "Expected finite Hessian-vector products, got one that is not. Check the gradient of the loss at the "
            "current weights (e.g. a square root or a norm at zero), or measure in float64."
        )
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
    num_runs: int,
    num_products: int,
    gradient_evaluations: float,
) -> DensityResult:
    low, high, largest = float(nodes.min()), float(nodes.max()), float(nodes.abs().max())
    sigma = width * (high - low if high - low > 64 * eps * largest else largest or 1.0)
    grid = torch.linspace(low - _MARGIN * sigma, high + _MARGIN * sigma, num_points, dtype=torch.float64)
    # A run at a time: the kernel has a number for every node and point of the grid.
    smoothed = torch.stack([_smoothed(grid, n, w, sigma) for n, w in zip(nodes, weights, strict=True)])
    density, density_errors = _mean_and_error(smoothed)
    powers = torch.stack([(weights * nodes**p).sum(dim=1) for p in range(1, NUM_MOMENTS + 1)], dim=1)
    moments, moment_errors = _mean_and_error(powers)
    scales = torch.stack([(weights * nodes.abs() ** p).sum(dim=1).mean() for p in range(1, NUM_MOMENTS + 1)])
    is_negative = nodes < -64 * eps * largest
    negative_share, negative_share_error = _mean_and_error((weights * is_negative).sum(dim=1))
    if num_runs > 0:
        resolution = torch.stack([_weight_around(w, int(n.sum())) for w, n in zip(weights, is_negative, strict=True)])
        negative_share_error = torch.hypot(negative_share_error, resolution.mean())
    spacing = float(grid[1] - grid[0])
    return DensityResult(
        grid=grid,
        density=density,
        density_errors=density_errors,
        moments=moments,
        moment_errors=torch.hypot(moment_errors, 64 * eps * scales),
        negative_share=negative_share,
        negative_share_error=negative_share_error,
        width=torch.tensor(sigma, dtype=torch.float64),
        num_runs=num_runs,
        converged=float(density_errors.sum()) * spacing <= tol,
        num_products=num_products,
        gradient_evaluations=gradient_evaluations,
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

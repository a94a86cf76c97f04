"""Gradient noise: how much the gradients of single samples scatter, beside how much the loss curves.

The gradients of single samples are made many at a time by ``vmap`` where the module allows it, one at a time
otherwise. Whether a sample has a gradient of its own is checked: their mean has to be the gradient of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_flatness.estimators.operators import Operator
from lightning_flatness.estimators.trace import TraceMethod, hessian_trace
from lightning_flatness.estimators.undefined import UndefinedMeasureError
from lightning_flatness.geometry import Chart, Geometry
from lightning_flatness.landscape import LossLandscape

_CHUNK_BYTES = 2**27


@dataclass(frozen=True)
class GradientNoiseResult:
    """The scatter of the gradients of single samples.

    Attributes:
        value: The trace of their covariance, or its ratio to the trace of the Hessian; a scalar.
        standard_error: Its standard error.
        converged: Whether the standard error reached the tolerance.
        num_products: Hessian-vector products.
        gradient_evaluations: What it cost, in gradients on all samples.
    """

    value: Tensor
    standard_error: Tensor
    converged: bool
    num_products: int
    gradient_evaluations: float


def gradient_noise(
    landscape: LossLandscape, geometry: str | Geometry = "euclidean", *, tol: float = 0.2
) -> GradientNoiseResult:
    """Return the trace of the covariance of the gradients of single samples at the current weights.

    ``tr C = 1/(N-1) sum_n ‖g_n - g‖²``, the unbiased estimate for the distribution that the samples come from; the
    standard error is that of sampling. Costs two gradients of the whole set in operations, more in time where the
    module does not go through ``vmap``. Memory: 128 MiB of gradients at a time, one at least.

    Args:
        landscape: The loss, a mean over samples.
        geometry: The coordinates ``z``, in which gradients are measured; see :mod:`lightning_flatness.geometry`.
        tol: Relative standard error at which the result counts as converged.

    Returns:
        The trace with its standard error.

    Raises:
        UndefinedMeasureError: If there is a single sample, or the loss is not a mean over samples.
    """
    if landscape.num_samples < 2:
        raise UndefinedMeasureError("Expected two or more samples to measure the scatter of their gradients, got one.")
    spent = landscape.cost.gradient_evaluations
    with landscape.measurement():
        chart = landscape.chart(geometry)
        mean = landscape.gradient()
        sums = landscape.sum_over_ranks(lambda total: _add_scatter(landscape, chart, mean, total), _SIZE + len(mean))
        landscape.cost.gradient_evaluations += 1
    n, first, second, longest = sums[:_SIZE].tolist()
    eps = max(torch.finfo(p.dtype).eps for p in landscape.parameters)
    _check_mean(mean, sums[_SIZE:] / n, math.sqrt(longest), tolerance=min(1e3 * eps, 0.1))
    value = first / (n - 1)
    variance = max(0.0, second / n - (first / n) ** 2) * n / (n - 1)
    error = math.hypot(math.sqrt(variance / n) * n / (n - 1), 16 * torch.finfo(landscape.dtype).eps * value)
    return GradientNoiseResult(
        value=torch.tensor(value, dtype=landscape.dtype, device=landscape.device),
        standard_error=torch.tensor(error, dtype=landscape.dtype, device=landscape.device),
        converged=error <= tol * value,
        num_products=0,
        gradient_evaluations=landscape.cost.gradient_evaluations - spent,
    )


def noise_curvature_ratio(
    landscape: LossLandscape,
    geometry: str | Geometry = "euclidean",
    *,
    operator: Operator = "hessian",
    method: TraceMethod = "hutch++",
    num_products: int = 48,
    tol: float = 0.2,
    seed: int = 0,
) -> GradientNoiseResult:
    """Return the ratio ``tr C / tr H`` of gradient noise to curvature at the current weights (arXiv 1906.07774).

    Costs what :func:`gradient_noise` and :func:`hessian_trace` cost. The errors of both add in squares.

    Args:
        landscape: The loss, a mean over samples.
        geometry: The coordinates ``z`` of both; see :mod:`lightning_flatness.geometry`.
        operator: ``"hessian"``, or ``"ggn"`` for the trace of the Gauss-Newton matrix below the line.
        method: ``"hutch++"`` or ``"hutchinson"``.
        num_products: Products to spend on the trace.
        tol: Relative standard error at which the result counts as converged.
        seed: Seed of the trace's probes.

    Returns:
        The ratio with its standard error; infinite or not a number where the trace is zero.

    Raises:
        ValueError: As :func:`gradient_noise` and :func:`hessian_trace`.
    """
    with landscape.measurement():
        noise = gradient_noise(landscape, geometry)
        trace = hessian_trace(
            landscape, geometry, operator=operator, method=method, num_products=num_products, seed=seed
        )
    value = noise.value / trace.value
    error = torch.hypot(noise.standard_error / trace.value, value * trace.standard_error / trace.value)
    return GradientNoiseResult(
        value=value,
        standard_error=error,
        converged=bool(error <= tol * value.abs()),
        num_products=trace.num_products,
        gradient_evaluations=noise.gradient_evaluations + trace.gradient_evaluations,
    )


_SIZE = 4
"""Number of samples, sum of ``‖g_n - g‖²``, sum of its squares, and the sum of ``‖g_n‖²``."""


def _add_scatter(landscape: LossLandscape, chart: Chart, mean: Tensor, total: Tensor) -> None:
    """Add this rank's share of the sums, then of the sum of gradients, to a vector."""
    for gradients in _gradients_of_samples(landscape):
        deviations = gradients - mean
        pulled = torch.stack([chart.pull_back(d) for d in deviations])
        squares = pulled.square().sum(dim=1)
        sums = [len(gradients), squares.sum(), squares.square().sum(), gradients.square().sum()]
        total[:_SIZE] += torch.stack([torch.as_tensor(s, dtype=total.dtype, device=total.device) for s in sums])
        total[_SIZE:] += gradients.sum(dim=0)


def _gradients_of_samples(landscape: LossLandscape) -> Iterator[Tensor]:
    """Yield the gradients of this rank's samples, shape (chunk, num_parameters)."""
    chunk = max(1, _CHUNK_BYTES // (landscape.num_parameters * landscape.dtype.itemsize))
    vmap_works = True
    for index, size in enumerate(landscape.batch_sizes):
        for start in range(0, size, chunk):
            stop = min(start + chunk, size)
            if vmap_works:
                try:
                    yield landscape.gradients_of_samples(index, start, stop, vectorized=True)
                    continue
                except Exception:  # a branch on data, a buffer written in place, an operator without a rule …
                    vmap_works = False  # … or an error of the user's, which will now come up again
            yield landscape.gradients_of_samples(index, start, stop, vectorized=False)


def _check_mean(gradient: Tensor, mean: Tensor, length: float, tolerance: float) -> None:
    deviation = float(torch.linalg.vector_norm(mean - gradient))
    if not deviation <= tolerance * max(length, 1e-30):
        raise UndefinedMeasureError(
            "Expected a loss that is the mean of the losses of single samples, got one whose gradient is not the mean "
            f"of theirs (off by {deviation:.2g}). Measure in mode='eval' if the module normalises or drops out over a "
            "batch, and leave weights of classes and ignored targets out of the mean."
        )

"""Gradient noise: how much the gradients of single samples scatter, beside how much the loss curves.

The gradients of single samples are made many at a time by ``vmap`` where the module allows it, one at a time
otherwise. Whether a sample has a gradient of its own is checked: their mean has to be the gradient of the loss.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from lightning_flatness.estimators.arguments import TraceMethod
from lightning_flatness.estimators.operators import Operator
from lightning_flatness.estimators.result import Estimate, scalar_estimate
from lightning_flatness.estimators.trace import hessian_trace
from lightning_flatness.estimators.undefined import UndefinedMeasureError
from lightning_flatness.geometry import Chart, Geometry
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.landscape.per_sample import sum_over_samples


def gradient_noise(landscape: LossLandscape, geometry: str | Geometry = "euclidean", *, tol: float = 0.2) -> Estimate:
    """Return the trace of the covariance of the gradients of single samples at the current weights.

    Arguments, cost and errors as of :class:`lightning_flatness.GradientNoise`.
    """
    n, total, variance = _squared_norms(landscape, geometry, centred=True)
    value = total / (n - 1)
    return _noise_estimate(landscape, value, math.sqrt(variance / n) * n / (n - 1), tol)


def fisher_trace(landscape: LossLandscape, geometry: str | Geometry = "euclidean", *, tol: float = 0.2) -> Estimate:
    """Return the mean squared norm of the gradients of single samples at the current weights, ``1/N sum_n ‖g_n‖²``.

    Arguments, cost and errors as of :class:`lightning_flatness.FisherTrace`.
    """
    n, total, variance = _squared_norms(landscape, geometry, centred=False)
    return _noise_estimate(landscape, total / n, math.sqrt(variance / n), tol)


def _noise_estimate(landscape: LossLandscape, value: float, scatter: float, tol: float) -> Estimate:
    rounding = 16 * torch.finfo(landscape.dtype).eps * value
    standard_error = math.hypot(scatter * math.sqrt(landscape.samples.unseen_share), rounding)
    converged = standard_error <= tol * value
    return scalar_estimate(landscape, value, rounding, converged=converged, standard_error=standard_error)


def noise_curvature_ratio(
    landscape: LossLandscape,
    geometry: str | Geometry = "euclidean",
    *,
    operator: Operator = "hessian",
    method: TraceMethod = "hutch++",
    num_products: int = 48,
    tol: float = 0.2,
    seed: int = 0,
) -> Estimate:
    """Return the ratio ``tr C / tr H`` of gradient noise to curvature at the current weights (arXiv 1906.07774).

    Arguments, cost and errors as of :class:`lightning_flatness.NoiseCurvatureRatio`. Infinite or not a number where the
    trace is zero.
    """
    with landscape.measurement():
        noise = gradient_noise(landscape, geometry)
        trace = hessian_trace(
            landscape, geometry, operator=operator, method=method, num_products=num_products, seed=seed
        )
    value = noise.value / trace.value
    errors = []
    for of_noise, of_trace in ((noise.error, trace.error), (noise.standard_error, trace.standard_error)):
        assert of_noise is not None
        assert of_trace is not None
        errors.append(torch.hypot(of_noise / trace.value, value * of_trace / trace.value))
    converged = bool(errors[0] <= tol * value.abs())
    return Estimate(value, errors[0], converged, trace.num_products, standard_error=errors[1])


_SIZE = 4
"""Number of samples, sum of ``‖g_n - c‖²``, sum of its squares, and the sum of ``‖g_n‖²``."""


def _squared_norms(landscape: LossLandscape, geometry: str | Geometry, *, centred: bool) -> tuple[float, float, float]:
    """Return the number of samples, the sum of ``‖g_n - c‖²`` in a geometry, and the variance of its terms.

    ``c`` is the mean of the gradients if ``centred``, else zero.

    Raises:
        UndefinedMeasureError: If there is a single sample, or the loss is not a mean over samples.
        ValueError: If the loss of a single sample raises one.
        Error: The same, in TorchScript.
    """
    if landscape.num_samples < 2:
        raise UndefinedMeasureError("Expected two or more samples to measure the scatter of their gradients, got one.")
    with landscape.measurement():
        chart = landscape.chart(geometry)
        mean = landscape.gradient()
        centre = mean if centred else torch.zeros_like(mean)
        try:
            sums = sum_over_samples(landscape, partial(_add_squares, chart, centre), _SIZE + len(mean))
        except (ValueError, torch.jit.Error) as error:
            if "more than 1 value per channel" not in str(error):
                raise
            reason = str(error).splitlines()[-1].removeprefix("builtins.ValueError: ")  # of TorchScript's traceback
            raise UndefinedMeasureError(f"Expected a loss of single samples, got one without: {reason}.") from error
    n, first, second, longest = sums[:_SIZE].tolist()
    eps = max(torch.finfo(p.dtype).eps for p in landscape.parameters)
    _check_mean(mean, sums[_SIZE:] / n, math.sqrt(longest), tolerance=min(1e3 * eps, 0.1))
    return n, first, max(0.0, second / n - (first / n) ** 2) * n / (n - 1)


def _add_squares(chart: Chart, centre: Tensor, gradients: Tensor, total: Tensor) -> None:
    """Add the sums over some samples, then the sum of their gradients, to a vector."""
    deviations = gradients - centre
    pulled = torch.stack([chart.pull_back(d) for d in deviations])
    squares = pulled.square().sum(dim=1)
    sums = [len(gradients), squares.sum(), squares.square().sum(), gradients.square().sum()]
    total[:_SIZE] += torch.stack([torch.as_tensor(s, dtype=total.dtype, device=total.device) for s in sums])
    total[_SIZE:] += gradients.sum(dim=0)


def _check_mean(gradient: Tensor, mean: Tensor, length: float, tolerance: float) -> None:
    deviation = float(torch.linalg.vector_norm(mean - gradient))
    if not deviation <= tolerance * max(length, 1e-30):
        raise UndefinedMeasureError(
            "Expected a loss that is the mean of the losses of single samples, got one whose gradient is not the mean "
            f"of theirs (off by {deviation:.2g}). Measure in mode='eval' if the module normalises or drops out over a "
            "batch, and leave weights of classes and ignored targets out of the mean."
        )

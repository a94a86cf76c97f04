"""Gradient noise as metrics, alone and beside the curvature."""

from __future__ import annotations

from typing import Any

from lightning_flatness.estimators import Operator, TraceMethod, gradient_noise, noise_curvature_ratio
from lightning_flatness.estimators.noise import GradientNoiseResult
from lightning_flatness.estimators.trace import check_trace_arguments
from lightning_flatness.geometry import Geometry, resolve_geometry
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.metrics.base import FlatnessMetric
from lightning_flatness.metrics.trace import TraceMetric


class GradientNoise(FlatnessMetric):
    r"""The trace of the covariance of the gradients of single samples at the current weights.

        tr C = 1/(N-1) sum_n ‖g_n - g‖²,

    unbiased for the distribution that the N samples come from; its standard error is that of sampling them. Stochastic
    gradients of batches of size B scatter by ``tr(C)/B``. Units: loss per weight, squared. In a geometry the gradients
    in its coordinates ``z`` are meant, and the value has its invariances.

    A measurement costs two gradients of the whole set in operations, by ``torch.func.vmap``; where the module does not
    allow that, N backward passes of one sample. Memory: 128 MiB of gradients, a vector of the weights at least.

    Args:
        geometry: ``"euclidean"``, ``"layer"``, ``"filter"``, ``"element"``, … or a ``Geometry``.
        tol: Standard error, relative to the value, at which the value counts as converged.

    Raises:
        ValueError: If ``tol`` is negative; in ``update``, if there is one sample only or the loss is not a mean over
            samples (normalisation over the batch in training mode, class weights, ignored targets).

    Example:
        >>> import torch
        >>> from lightning_flatness import GradientNoise, LossLandscape
        >>> module = torch.nn.Linear(1, 1, bias=False)
        >>> batches = [torch.tensor([[1.0], [2.0], [3.0]])]
        >>> metric = GradientNoise()
        >>> metric.update(LossLandscape(module, batches, lambda module, x: module(x).mean()))
        >>> metric.compute()  # the variance of 1, 2, 3
        tensor(1.)
    """

    error_name = "standard_error"
    effort = "probe_size"

    def __init__(self, geometry: str | Geometry = "euclidean", tol: float = 0.2) -> None:
        check_trace_arguments("hutchinson", 4, tol)
        super().__init__()
        self.geometry = resolve_geometry(geometry)
        self.tol = tol
        self.distinguish(self.geometry, tol)

    def measure(self, landscape: LossLandscape) -> None:
        """Take the gradient of every sample."""
        result = gradient_noise(landscape, self.geometry, tol=self.tol)
        self.store(result.value, result.standard_error, converged=result.converged, num_products=result.num_products)


class NoiseCurvatureRatio(TraceMetric):
    r"""The ratio ``tr(C)/tr(H)`` of gradient noise to curvature at the current weights (arXiv 1906.07774).

    ``C`` is the covariance of the gradients of single samples and ``H`` the Hessian of the loss. Near a minimum of a
    well-specified model under the negative log-likelihood the two agree and the ratio is one. Units: those of the loss.

    Costs what :class:`GradientNoise` and :class:`HessianTrace` cost together, 99 gradients by default; the standard
    error combines both of theirs to first order.

    Args:
        geometry: ``"euclidean"``, ``"layer"``, ``"filter"``, ``"element"``, … or a ``Geometry``, for both.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix, which needs an :class:`OutputLoss`.
        method: ``"hutch++"`` or ``"hutchinson"``.
        num_products: Products to spend on the trace.
        tol: Standard error, relative to the value, at which the value counts as converged.
        seed: Seed of the trace's probes.

    Raises:
        ValueError: As :class:`GradientNoise` and :class:`HessianTrace`.

    Example:
        >>> import torch
        >>> from lightning_flatness import LossLandscape, NoiseCurvatureRatio
        >>> module = torch.nn.Linear(1, 1, bias=False)
        >>> module.weight.data.fill_(1.0)
        tensor([[1.]])
        >>> batches = [torch.tensor([[1.0], [3.0]])]
        >>> metric = NoiseCurvatureRatio()
        >>> metric.update(LossLandscape(module, batches, lambda module, x: module(x).square().mean()))
        >>> metric.compute().round(decimals=4)  # the variance of 2 and 18, over 2 · mean x² = 10
        tensor(12.8000)
    """

    def __init__(
        self,
        geometry: str | Geometry = "euclidean",
        operator: Operator = "hessian",
        method: TraceMethod = "hutch++",
        num_products: int = 48,
        tol: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(geometry, operator, method, num_products, tol, seed)

    @staticmethod
    def estimate(landscape: LossLandscape, geometry: Geometry, **options: Any) -> GradientNoiseResult:
        """Measure noise and curvature and divide."""
        return noise_curvature_ratio(landscape, geometry, **options)

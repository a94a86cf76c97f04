"""Gradient noise as metrics, alone and beside the curvature."""

from __future__ import annotations

from lightning_flatness.estimators import Operator, TraceMethod, fisher_trace, gradient_noise, noise_curvature_ratio
from lightning_flatness.geometry import Geometry
from lightning_flatness.metrics.base import FlatnessMetric, arguments


class GradientNoise(FlatnessMetric):
    r"""The trace of the covariance of the gradients of single samples at the current weights.

        tr C = 1/(N-1) sum_n ‖g_n - g‖²,

    unbiased for the distribution that the N samples come from. The standard error is that of sampling them, the
    numerical error is rounding. Stochastic gradients of batches of size B scatter by ``tr(C)/B``. Units: loss per
    weight, squared. In a geometry the gradients in its coordinates ``z`` are meant, and the value has its invariances.

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

    error_name = "numerical_error"
    effort = "probe_size"
    estimator = staticmethod(gradient_noise)

    def __init__(self, geometry: str | Geometry = "euclidean", tol: float = 0.2) -> None:
        super().__init__(**arguments(locals()))


class FisherTrace(FlatnessMetric):
    r"""The trace of the empirical Fisher matrix: the mean squared norm of the gradients of single samples.

        tr F = 1/N sum_n ‖g_n‖²,

    at the current weights; its standard error is that of sampling the N samples. arXiv 1905.12558 says where it differs
    from the Fisher matrix and the Hessian. It is the uncentred :class:`GradientNoise`: same cost, units, invariances.

    Args:
        geometry: ``"euclidean"``, ``"layer"``, ``"filter"``, ``"element"``, … or a ``Geometry``.
        tol: Standard error, relative to the value, at which the value counts as converged.

    Raises:
        ValueError: As :class:`GradientNoise`.

    Example:
        >>> import torch
        >>> from lightning_flatness import FisherTrace, LossLandscape
        >>> module = torch.nn.Linear(1, 1, bias=False)
        >>> metric = FisherTrace()
        >>> metric.update(LossLandscape(module, [torch.tensor([[1.0], [3.0]])], lambda module, x: module(x).mean()))
        >>> metric.compute()  # of the gradients 1 and 3
        tensor(5.)
    """

    error_name = "numerical_error"
    effort = "probe_size"
    estimator = staticmethod(fisher_trace)

    def __init__(self, geometry: str | Geometry = "euclidean", tol: float = 0.2) -> None:
        super().__init__(**arguments(locals()))


class NoiseCurvatureRatio(FlatnessMetric):
    r"""The ratio ``tr(C)/tr(H)`` of gradient noise to curvature at the current weights (arXiv 1906.07774).

    ``C`` is the covariance of the gradients of single samples and ``H`` the Hessian of the loss. Near a minimum of a
    well-specified model under the negative log-likelihood the two agree and the ratio is one. Units: those of the loss.

    Costs what :class:`GradientNoise` and :class:`HessianTrace` cost together, 112 gradients by default. The
    numerical ``error`` is about the ratio of these samples: that of the random probes of the trace. ``standard_error``
    is about the ratio on the whole training set: it combines both standard errors to first order, as if they were
    independent, and is somewhat too large where samples with large gradients curve more, too.

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

    error_name = "numerical_error"
    effort = "num_products"
    estimator = staticmethod(noise_curvature_ratio)

    def __init__(
        self,
        geometry: str | Geometry = "euclidean",
        operator: Operator = "hessian",
        method: TraceMethod = "hutch++",
        num_products: int = 48,
        tol: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(**arguments(locals()))

"""The trace of the Hessian as a metric."""

from __future__ import annotations

from lightning_flatness.estimators import Operator, TraceMethod, hessian_trace
from lightning_flatness.geometry import Geometry
from lightning_flatness.metrics.base import FlatnessMetric, arguments


class HessianTrace(FlatnessMetric):
    r"""The trace of the Hessian of the loss at the current weights: the sum of all its eigenvalues.

    ``tr S H S`` in the coordinates ``z`` of a geometry (``w = w0 + S z``), with its standard error, from random signs
    ``v``: ``E[vᵀ H v] = tr H`` (Hutchinson), after the directions that matter most were taken out and their share of
    the trace was taken exactly (Hutch++). In the Euclidean geometry the units are loss per weight squared; in the
    others loss per relative change squared, and the value has the invariances of the geometry.

    A measurement costs one gradient and two per product, and 13 for the standard error, mostly: 110 by default. Memory:
    a quarter of ``num_products`` vectors of the size of the weights for Hutch++, two for Hutchinson. If there are no
    more coordinates than products, the trace is exact.

    Args:
        geometry: ``"euclidean"``, ``"layer"``, ``"filter"``, ``"element"``, … or a ``Geometry``.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix, which is never negative for the usual losses
            and needs an :class:`OutputLoss`.
        method: ``"hutch++"`` (arXiv 2010.09649) or ``"hutchinson"``.
        num_products: Products to spend on a measurement.
        tol: Standard error, relative to the trace, at which the value counts as converged.
        seed: Seed of the probes.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from lightning_flatness import HessianTrace, LossLandscape
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [torch.tensor([[1.0, 0.0], [0.0, 3.0]])]
        >>> metric = HessianTrace()
        >>> metric.update(LossLandscape(module, batches, lambda module, x: module(x).square().mean()))
        >>> metric.compute().round()  # of 2 · mean x xᵀ = diag(1, 9)
        tensor(10.)
    """

    error_name = "numerical_error"
    effort = "num_products"
    estimator = staticmethod(hessian_trace)

    def __init__(
        self,
        geometry: str | Geometry = "euclidean",
        operator: Operator = "hessian",
        method: TraceMethod = "hutch++",
        num_products: int = 48,
        tol: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(**arguments(locals()))

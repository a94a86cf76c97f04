"""The trace of the Hessian as a metric."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning_flatness.estimators import Operator, TraceMethod, hessian_trace
from lightning_flatness.estimators.operators import check_operator
from lightning_flatness.estimators.trace import TraceResult, check_trace_arguments
from lightning_flatness.geometry import Geometry, resolve_geometry
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.metrics.base import FlatnessMetric


class TraceMetric(FlatnessMetric):
    """A metric that is made of a stochastic trace in a geometry; a subclass says how in :meth:`estimate`."""

    error_name = "standard_error"
    effort = "num_products"

    def __init__(
        self,
        geometry: str | Geometry = "euclidean",
        operator: Operator = "hessian",
        method: TraceMethod = "hutch++",
        num_products: int = 48,
        tol: float = 0.1,
        seed: int = 0,
    ) -> None:
        check_operator(operator)
        check_trace_arguments(method, num_products, tol)
        super().__init__()
        self.geometry = resolve_geometry(geometry)
        self.operator: Operator = operator
        self.method: TraceMethod = method
        self.max_products = num_products
        self.tol = tol
        self.seed = seed
        self.distinguish(self.geometry, operator, method, num_products, tol, seed)

    def measure(self, landscape: LossLandscape) -> None:
        """Estimate the value."""
        result = self.estimate(
            landscape,
            self.geometry,
            operator=self.operator,
            method=self.method,
            num_products=self.max_products,
            tol=self.tol,
            seed=self.seed,
        )
        self.store(result.value, result.standard_error, converged=result.converged, num_products=result.num_products)

    @staticmethod
    @abstractmethod
    def estimate(landscape: LossLandscape, geometry: Geometry, **options: Any) -> Any:
        """Return a result with ``value``, ``standard_error``, ``converged`` and ``num_products``."""


class HessianTrace(TraceMetric):
    r"""The trace of the Hessian of the loss at the current weights: the sum of all its eigenvalues.

    ``tr S H S`` in the coordinates ``z`` of a geometry (``w = w0 + S z``), with its standard error, from random signs
    ``v``: ``E[vᵀ H v] = tr H`` (Hutchinson), after the directions that matter most were taken out and their share of
    the trace was taken exactly (Hutch++). In the Euclidean geometry the units are loss per weight squared; in the
    others loss per relative change squared, and the value has the invariances of the geometry.

    A measurement costs one gradient and two per product, 97 by default. Memory: a quarter of ``num_products`` vectors
    of the size of the weights for Hutch++, two for Hutchinson. If there are no more coordinates than products, the
    trace is exact.

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

    @staticmethod
    def estimate(landscape: LossLandscape, geometry: Geometry, **options: Any) -> TraceResult:
        """Estimate the trace."""
        return hessian_trace(landscape, geometry, **options)

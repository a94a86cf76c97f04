"""The trace of the Hessian as a metric."""

from __future__ import annotations

from lightning_flatness.estimators import Estimate, Operator, TraceMethod, hessian_trace
from lightning_flatness.geometry import Geometry
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.metrics.base import Curve, arguments
from lightning_flatness.metrics.layered import LayeredMetric


class HessianTrace(LayeredMetric):
    r"""The trace of the Hessian of the loss at the current weights: the sum of all its eigenvalues.

    ``tr S H S`` in the coordinates ``z`` of a geometry (``w = w0 + S z``), with its standard error, from random signs
    ``v``: ``E[vᵀ H v] = tr H`` (Hutchinson), after the directions that matter most were taken out and their share of
    the trace was taken exactly (Hutch++). In the Euclidean geometry the units are loss per weight squared; in the
    others loss per relative change squared, and the value has the invariances of the geometry.

    A measurement costs one gradient and two per product, and 13 for the standard error, mostly: 110 by default. Memory:
    a quarter of ``num_products`` vectors of the size of the weights for Hutch++, two for Hutchinson. If there are no
    more coordinates than products, the trace is exact.

    With ``per_layer=True`` the same products also give the trace of the diagonal block of every layer, of every module
    that holds weights itself: ``E[v_lᵀ (H v)_l] = tr H_ll``. The value has the shape (1 + layers,), the layers behind
    the whole, of which they are the parts; their names are in ``layers``, their curves are
    ``flatness/hessian_trace/encoder.0`` and the like. Each has its own errors. Small layers beside large ones have
    large ones, for random signs of other layers add to the scatter. Standard errors cost 25 gradients then.

    Args:
        geometry: ``"euclidean"``, ``"layer"``, ``"filter"``, ``"element"``, … or a ``Geometry``.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix, which is never negative for the usual losses
            and needs an :class:`OutputLoss`.
        method: ``"hutch++"`` (arXiv 2010.09649) or ``"hutchinson"``.
        num_products: Products to spend on a measurement.
        tol: Standard error, relative to the trace, at which the value counts as converged.
        seed: Seed of the probes.
        per_layer: Return the traces of the layers, too.

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

        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
        >>> net[0].weight.data.fill_(2.0), net[1].weight.data.fill_(3.0)
        (tensor([[2.]]), tensor([[3.]]))
        >>> metric = HessianTrace(per_layer=True)
        >>> metric.update(LossLandscape(net, [torch.ones(1, 1)], lambda net, x: net(x).square().mean()))
        >>> metric.compute(), metric.layers  # the loss is (w1 w2)², its second derivatives 2 w2² and 2 w1²
        (tensor([26., 18.,  8.]), ('0', '1'))
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
        per_layer: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))

    def estimate(self, landscape: LossLandscape) -> Estimate:
        """Estimate the trace."""
        return self.estimator(landscape, per_layer=self.per_layer, **self.settings)

    def curves(self, name: str) -> list[Curve]:
        """Return a point of the trace, and one per layer."""
        return self.layered_curves([name], name)

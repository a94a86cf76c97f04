"""Eigenvalues of the Hessian as metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_flatness.estimators import (
    TOLERANCE,
    Estimate,
    LayeredEstimate,
    LearningRates,
    Operator,
    Which,
    layer_eigenvalues,
    stability_edge,
    top_eigenvalues,
)
from lightning_flatness.estimators.krylov.basis import mixed
from lightning_flatness.estimators.sampling import eigenvalue_standard_errors
from lightning_flatness.geometry import Euclidean, Geometry, OptimizerGeometry, is_preconditioned
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.landscape.sharded_landscape import takes_shards
from lightning_flatness.metrics.base import Curve, arguments
from lightning_flatness.metrics.layered import LayeredMetric


class EigenvalueMetric(LayeredMetric):
    """A metric of eigenvalues. A measurement starts from the eigenvectors of the previous one: ``start``."""

    estimator = staticmethod(top_eigenvalues)

    k: int
    which: Which
    operator: Operator

    def reset(self) -> None:
        """Forget the latest value, and its eigenvectors as a start of the next measurement."""
        super().reset()
        self.start = None

    @property
    def takes_shards(self) -> bool:
        """Whether a :class:`ShardedLandscape` can be measured: by its Hessian, in a geometry of single tensors."""
        return self.operator == "hessian" and not self.per_layer and takes_shards(self.geometry)

    def estimate(self, landscape: LossLandscape) -> Estimate:
        """Find the eigenvalues."""
        previous = self.start
        start = None if previous is None else self.start_of_whole(previous).to(landscape.device)
        result = self.estimator(landscape, start=start, **self.settings)
        vectors = landscape.vectors_in(landscape.chart(self.geometry))
        self.start = mixed(result.subspace, self.k, vectors)  # all that a start takes from them, in the memory of one
        errors = self._standard_errors(landscape, result.eigenvalues, result.eigenvectors)
        found = Estimate(
            result.eigenvalues, result.residuals, result.converged, result.num_products, standard_error=errors
        )
        return self.with_layers(landscape, self.summarized(found), previous)

    def start_of_whole(self, start: Tensor) -> Tensor:
        """Return the part of a start that is for the whole network."""
        return start

    def with_layers(self, landscape: LossLandscape, whole: Estimate, start: Tensor | None) -> Estimate:  # noqa: ARG002
        """Return the value with those of the layers, if they are asked for; ``start`` is that of both."""
        return whole

    def _standard_errors(self, landscape: LossLandscape, values: Tensor, vectors: Iterable[Tensor]) -> Tensor:
        if self.operator != "hessian":
            return torch.full_like(values, math.nan)
        return eigenvalue_standard_errors(landscape, landscape.chart(self.geometry), values, vectors)

    def summarized(self, estimate: Estimate) -> Estimate:
        """Return the value of the metric, given the eigenvalues and their residuals."""
        return estimate


class TopEigenvalues(EigenvalueMetric):
    r"""The largest eigenvalues of the Hessian of the loss at the current weights; the first is lambda_max.

    Eigenvalues ``theta_1 >= ... >= theta_k`` of the second derivative of ``z -> L(w(z))`` at ``z = 0``, by Lanczos.
    In the Euclidean geometry this is the Hessian itself, and ``theta_1`` the lambda_max of arXiv 2206.10654; units are
    loss per weight squared. In ``"layer"``, ``"filter"`` and ``"element"`` the values are per *relative* change of the
    weights and stay put when layers, filters or single weights are rescaled without changing the function.

    A measurement costs one gradient and two per Hessian-vector product: 10 to 20 products for k = 1 from a random
    start, half of that when an earlier ``update`` and the gradient provide the start. Memory: the basis, a few tens of
    vectors at most.

    With ``per_layer=True`` the value has the shape (k + layers,): behind the k eigenvalues follows the most wanted one
    of the diagonal block of every layer, of every module that holds weights itself. Names are in ``layers``, curves are
    ``flatness/lambda_max/encoder.0`` and the like. By interlacing no layer is sharper than the whole. Every layer costs
    as much as the whole, since a product with one layer's weights mixes all of them: about 20 gradients each, half of
    that later on. Converged means that all have.

    Args:
        k: Number of eigenvalues.
        geometry: ``"euclidean"``, ``"layer"``, ``"filter"``, ``"element"``, or a ``Geometry``.
        which: ``"LA"``: largest; ``"SA"``: most negative; ``"LM"``: of largest modulus.
        tol: Relative residual ``‖H y - theta y‖ / |theta|`` to reach, the errors of products included. The relative
            error of the eigenvalue is mostly far smaller, of the order of its square.
        max_products: Hessian-vector products to stop at in any case; ``converged`` is then False.
        max_basis: Vectors of the size of the weights to keep at most.
        seed: Seed of the random start.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix, which needs an :class:`OutputLoss`.
        shared_start: Start from the sharpest directions that another metric has found in another geometry, in the same
            measurement. Saves products; the value then depends on that metric, within its residual.
        per_layer: Return the most wanted eigenvalue of every layer, too.

    Raises:
        ValueError: If an argument is out of range. ``k`` is checked against the number of parameters in ``update``.

    Example:
        >>> import torch
        >>> from lightning_flatness import LossLandscape, TopEigenvalues
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [torch.tensor([[1.0, 0.0], [0.0, 3.0]])]
        >>> landscape = LossLandscape(module, batches, lambda module, x: module(x).square().mean())
        >>> metric = TopEigenvalues(k=2)
        >>> metric.update(landscape)
        >>> metric.compute().round(decimals=3)  # of 2 · mean x xᵀ = diag(1, 9)
        tensor([9., 1.])
    """

    def __init__(
        self,
        k: int = 1,
        geometry: str | Geometry = "euclidean",
        which: Which = "LA",
        tol: float = TOLERANCE,
        max_products: int = 300,
        max_basis: int | None = None,
        seed: int = 0,
        operator: Operator = "hessian",
        shared_start: bool = False,
        per_layer: bool = False,
    ) -> None:
        super().__init__(shape=(k,), **arguments(locals()))

    def start_of_whole(self, start: Tensor) -> Tensor:
        """Return the part of a start that is for the whole network."""
        return start[0] if start.dim() > 1 else start  # that of the layers is missing where they failed

    def with_layers(self, landscape: LossLandscape, whole: Estimate, start: Tensor | None) -> Estimate:
        """Return the eigenvalues with those of the layers."""
        if not self.per_layer:
            return whole
        names = ("operator", "which", "tol", "max_products", "max_basis", "seed")
        settings = {name: getattr(self, name) for name in names}
        start = None if start is None or start.dim() < 2 else start[1].to(landscape.device)
        found = layer_eigenvalues(landscape, self.geometry, start=start, **settings)
        assert self.start is not None
        assert whole.standard_error is not None
        self.start = torch.stack([self.start, found.directions])
        errors = self._standard_errors(landscape, found.eigenvalues, found.vectors())
        return LayeredEstimate(
            torch.cat([whole.value, found.eigenvalues]),
            torch.cat([whole.error, found.residuals]),
            whole.converged and found.converged,
            whole.num_products + found.num_products,
            standard_error=torch.cat([whole.standard_error, errors]),
            layers=tuple(found.layers),
        )

    def curves(self, name: str) -> list[Curve]:
        """Return a point per eigenvalue, and one per layer."""
        return self.layered_curves(self._curve_names(name), name)

    def charts(self, name: str, optimizers: Sequence[Optimizer]) -> dict[str, list[str]]:
        """Return the chart of lambda_max with the edge of the optimizers' stability, and that of all eigenvalues."""
        names = self._curve_names(name)
        several = {f"{names[0]} … {names[-1]}": names} if self.k > 1 else {}
        return super().charts(name, optimizers) | several

    def stability_edge(self, optimizers: Sequence[Optimizer], learning_rates: LearningRates | None = None) -> float:
        """Return the edge of lambda_max, if that is measured as the optimizers see it: in their own geometry."""
        own = OptimizerGeometry if is_preconditioned(optimizers) else Euclidean
        is_lambda_max = (self.which, self.operator) == ("LA", "hessian") and isinstance(self.geometry, own)
        return stability_edge(optimizers, learning_rates) if is_lambda_max else math.nan

    def _curve_names(self, name: str) -> list[str]:
        return [name, *(f"{name.removesuffix('_max')}_{i}" for i in range(2, self.k + 1))]


class SpectralNorm(EigenvalueMetric):
    """The largest modulus of an eigenvalue of the Hessian in a geometry, a scalar: what named sharpness measures share.

    Args:
        geometry: The coordinates.
        settings: Other arguments of :func:`top_eigenvalues`.
    """

    def __init__(self, geometry: str | Geometry, **settings: Any) -> None:
        super().__init__(k=1, geometry=geometry, which="LM", operator="hessian", **settings)

    def summarized(self, estimate: Estimate) -> Estimate:
        """Return the modulus of the only eigenvalue, as a scalar."""
        known = estimate.standard_error
        standard_error = None if known is None else known[0]
        return replace(estimate, value=estimate.value[0].abs(), error=estimate.error[0], standard_error=standard_error)


class InvariantSharpness(SpectralNorm):
    r"""The sharpness of arXiv 1902.02434, invariant to rescaling whole tensors: the norm of the Riemannian Hessian.

    With the metric ``<u, v>_w = sum_i <u_i, v_i> / ‖w_i‖_F²`` over the parameter tensors ``w_i``, this is

        max |eigenvalue| of D^(1/2) H D^(1/2),   D = blockdiag(‖w_i‖_F² I),

    the curvature of the loss per relative change of a layer. Rescaling the layers by factors with product one (and
    the biases by the running products) does not change a ReLU network, and does not change this number. Rescaling
    single units or weights does: use geometry ``"element"`` or ``"path"`` for those. Dimension: that of the
    loss. Costs as :class:`TopEigenvalues` with ``k=1``.

    Args:
        tol: Relative residual to reach.
        max_products: Hessian-vector products to stop at in any case.
        max_basis: Vectors of the size of the weights to keep at most.
        seed: Seed of the random start.
        shared_start: See :class:`TopEigenvalues`; with lambda_max measured before, fewer products do.

    Example:
        >>> import torch
        >>> from lightning_flatness import InvariantSharpness, LossLandscape
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> module.weight.data = torch.tensor([[3.0, 4.0]])
        >>> batches = [torch.tensor([[1.0, 0.0], [0.0, 3.0]])]
        >>> metric = InvariantSharpness()
        >>> metric.update(LossLandscape(module, batches, lambda module, x: module(x).square().mean()))
        >>> metric.compute()  # ‖w‖² · lambda_max = 25 · 9
        tensor(225.0000)
    """

    def __init__(
        self,
        tol: float = TOLERANCE,
        max_products: int = 300,
        max_basis: int | None = None,
        seed: int = 0,
        shared_start: bool = False,
    ) -> None:
        super().__init__("layer", **arguments(locals()))

"""The trace of the Hessian, by random probes: Hutchinson's estimator and Hutch++.

For random signs v, ``E[vᵀ A v] = tr A``. Hutch++ first finds the directions that matter most (a few products with
random vectors, orthonormalised), takes the trace over them exactly, and probes their orthogonal
complement. Given those directions the probes are independent and unbiased, so their scatter is the error of the whole.

The trace of a diagonal block takes no product more: with the projection ``P`` on the block's coordinates,
``E[vᵀ P A v] = tr P A``, for the directions of Hutch++ and for random ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_flatness.estimators.arguments import TraceMethod, check_arguments
from lightning_flatness.estimators.krylov.basis import Basis
from lightning_flatness.estimators.layer_errors import layer_trace_standard_errors
from lightning_flatness.estimators.layers import layers_in
from lightning_flatness.estimators.operators import Operator, check_finite, curvature_product, rademacher, unit_vector
from lightning_flatness.estimators.result import Estimate, mean_and_error
from lightning_flatness.estimators.sampling import trace_standard_error
from lightning_flatness.geometry import Geometry
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.landscape.vectors import Vectors

_SKETCH_SHARE = 0.25
"""Share of products that look for directions; as many more take the trace over them. Hutch++ has a third; fewer leave
more probes, so that the standard error is known well."""

_ROUNDING = 16
"""Rounding errors of a sum of products, in units of the machine precision."""


@dataclass(frozen=True)
class LayeredEstimate(Estimate):
    """The value of a whole network and those of its layers, shape (1 + layers,).

    Attributes:
        layers: Names of the layers.
    """

    layers: tuple[str, ...]


def stochastic_trace(
    matvec: Callable[[Tensor], Tensor],
    size: int,
    *,
    method: TraceMethod = "hutch++",
    num_products: int = 48,
    tol: float = 0.1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    blocks: Sequence[slice] | None = None,
) -> Estimate:
    """Return the trace of a symmetric operator, exactly if ``num_products`` suffices for all its coordinates.

    Args:
        matvec: Product of the operator with a vector of shape (size,); its result is overwritten.
        size: Dimension.
        method: ``"hutch++"`` or ``"hutchinson"``. Hutch++ keeps a quarter of ``num_products`` vectors in memory.
        num_products: Products to spend.
        tol: Standard error, relative to the trace, at which the result counts as converged.
        seed: Seed of the probes.
        dtype: Of the vectors.
        device: Of the vectors.
        blocks: Coordinates of diagonal blocks whose traces are returned, too.

    Returns:
        The trace with its standard error; with ``blocks``, of the shape (1 + blocks,). The first says whether it has
        converged.

    Raises:
        ValueError: If an argument is out of range.
        RuntimeError: If a product is not finite.

    Example:
        >>> diagonal = torch.tensor([1.0, 5.0, -7.0, 2.0])
        >>> stochastic_trace(lambda v: diagonal * v, 4).value
        tensor(1., dtype=torch.float64)
    """
    check_arguments({"method": method, "num_products": num_products, "tol": tol})
    device = torch.device(device)
    if size <= num_products:
        vectors = (unit_vector(size, i, dtype, device) for i in range(size))
        return _result([_quadratic_form(matvec, v, blocks) for v in vectors], [], tol, size, blocks)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    basis = Basis(num_products, Vectors(size, dtype, device))
    if method == "hutch++":
        for _ in range(int(_SKETCH_SHARE * num_products)):
            _extend(basis, matvec(rademacher(size, generator, dtype, device)))
    exact = [_quadratic_form(matvec, basis[i], blocks) for i in range(len(basis))]
    num_sketched = int(_SKETCH_SHARE * num_products) if method == "hutch++" else 0
    probes = []
    for _ in range(num_products - num_sketched - len(exact)):
        probe = rademacher(size, generator, dtype, device)
        _, remainder, _ = basis.orthogonalize(probe)
        probes.append(_quadratic_form(matvec, remainder, blocks))
    return _result(exact, probes, tol, num_products, blocks)


def num_probes(method: TraceMethod, num_products: int) -> int:
    """Return how many of the products are probes, if the sketch has full rank: their scatter is the error."""
    return num_products - 2 * int(_SKETCH_SHARE * num_products) if method == "hutch++" else num_products


def hessian_trace(
    landscape: LossLandscape,
    geometry: str | Geometry = "euclidean",
    *,
    operator: Operator = "hessian",
    method: TraceMethod = "hutch++",
    num_products: int = 48,
    tol: float = 0.1,
    seed: int = 0,
    per_layer: bool = False,
) -> Estimate:
    """Return the trace of the Hessian (or Gauss-Newton matrix) of ``z -> L(w(z))`` at the current weights.

    Arguments, cost and errors as of :class:`lightning_flatness.HessianTrace`. The error contains that of finite
    differences. Deterministic given ``seed``. With ``per_layer`` it is a :class:`LayeredEstimate`.
    """
    check_arguments({"operator": operator})
    with landscape.measurement():
        chart = landscape.chart(geometry)
        layers = layers_in(landscape, chart) if per_layer else {}
        result = stochastic_trace(
            curvature_product(landscape, chart, operator),
            chart.num_coordinates,
            method=method,
            num_products=num_products,
            tol=tol,
            seed=seed,
            dtype=landscape.dtype,
            device=landscape.device,
            blocks=list(layers.values()) if per_layer else None,
        )
        size = chart.num_coordinates
        if not per_layer:
            error = trace_standard_error(landscape, chart.displacement, size, float(result.value), operator, seed)
            return with_product_error(result, landscape, error)
        errors = layer_trace_standard_errors(landscape, chart, list(layers.values()), operator, seed)
        if errors.isnan().all():  # that of the whole may be known from differences of losses
            whole = float(result.value[0])
            errors[0] = trace_standard_error(landscape, chart.displacement, size, whole, operator, seed)
    return LayeredEstimate(**vars(with_product_error(result, landscape, errors)), layers=tuple(layers))


def with_product_error(result: Estimate, landscape: LossLandscape, sampling: float | Tensor = math.nan) -> Estimate:
    """Return the estimate of an operator in the landscape's dtype, with the errors of its products and samples."""
    error = result.error + landscape.product_error * result.value.abs()
    standard_error = torch.hypot(error, torch.as_tensor(sampling, dtype=error.dtype, device=error.device))
    value, error, standard_error = (
        t.to(landscape.dtype).to(landscape.device) for t in (result.value, error, standard_error)
    )
    return Estimate(value, error, result.converged, result.num_products, standard_error=standard_error)


def _extend(basis: Basis, vector: Tensor) -> None:
    """Add a direction to the basis unless rounding is all that sticks out."""
    check_finite(vector)
    norm = torch.linalg.vector_norm(vector)
    _, remainder, remaining = basis.orthogonalize(vector)
    if remaining > 64 * torch.finfo(vector.dtype).eps * norm:
        basis.append(remainder, remaining)


def _quadratic_form(matvec: Callable[[Tensor], Tensor], v: Tensor, blocks: Sequence[slice] | None) -> Tensor:
    """Return ``vᵀ A v`` and the parts of it that blocks make, and what rounding may have done: (2, 1 + blocks)."""
    product = matvec(v)
    check_finite(product)
    own = [(v, product), *((v[block], product[block]) for block in blocks or ())]
    forms = torch.stack([torch.dot(a, b) for a, b in own])
    lengths = torch.stack([torch.linalg.vector_norm(a) for a, _ in own])
    # Forms are sums of terms that may cancel.
    rounding = lengths * torch.linalg.vector_norm(product) * torch.finfo(v.dtype).eps
    return torch.stack([forms, rounding]).cpu().double()


def _result(
    exact: list[Tensor], probes: list[Tensor], tol: float, num_products: int, blocks: Sequence[slice] | None
) -> Estimate:
    value = error = torch.zeros(1 + len(blocks or ()), dtype=torch.float64, device="cpu")
    if exact:
        forms, rounding = torch.stack(exact).unbind(dim=1)
        value, error = forms.sum(dim=0), _ROUNDING * torch.linalg.vector_norm(rounding, dim=0)
    if probes:
        (mean, rounding), (standard_error, _) = mean_and_error(torch.stack(probes))
        value, error = value + mean, torch.hypot(error, torch.hypot(standard_error, _ROUNDING * rounding))
    converged = bool(error[0] <= tol * value[0].abs())
    return Estimate(*((value[0], error[0]) if blocks is None else (value, error)), converged, num_products)

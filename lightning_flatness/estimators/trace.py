"""The trace of the Hessian, by random probes: Hutchinson's estimator and Hutch++.

For random signs v, ``E[vᵀ A v] = tr A``. Hutch++ first finds the directions that matter most (a few products with
random vectors, orthonormalised), takes the trace over them exactly, and probes their orthogonal
complement. Given those directions the probes are independent and unbiased, so their scatter is the error of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_flatness.estimators.arguments import TraceMethod, check_arguments
from lightning_flatness.estimators.krylov.basis import Basis
from lightning_flatness.estimators.operators import Operator, check_finite, curvature_product, rademacher, unit_vector
from lightning_flatness.estimators.result import Estimate, mean_and_error, scalar_estimate
from lightning_flatness.estimators.sampling import trace_standard_error
from lightning_flatness.geometry import Geometry
from lightning_flatness.landscape import LossLandscape

_SKETCH_SHARE = 0.25
"""Share of products that look for directions; as many more take the trace over them. Hutch++ has a third; fewer leave
more probes, so that the standard error is known well."""

_ROUNDING = 16
"""Rounding errors of a sum of products, in units of the machine precision."""


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

    Returns:
        The trace with its standard error.

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
        return _result([_quadratic_form(matvec, v) for v in vectors], [], tol, size)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    basis = Basis(num_products, size, dtype, device)
    if method == "hutch++":
        for _ in range(int(_SKETCH_SHARE * num_products)):
            _extend(basis, matvec(rademacher(size, generator, dtype, device)))
    exact = [_quadratic_form(matvec, basis[i]) for i in range(len(basis))]
    num_sketched = int(_SKETCH_SHARE * num_products) if method == "hutch++" else 0
    probes = []
    for _ in range(num_products - num_sketched - len(exact)):
        probe = rademacher(size, generator, dtype, device)
        _, remainder, _ = basis.orthogonalize(probe)
        probes.append(_quadratic_form(matvec, remainder))
    return _result(exact, probes, tol, num_products)


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
) -> Estimate:
    """Return the trace of the Hessian (or Gauss-Newton matrix) of ``z -> L(w(z))`` at the current weights.

    Arguments, cost and errors as of :class:`lightning_flatness.HessianTrace`. The error contains that of finite
    differences. Deterministic given ``seed``.
    """
    check_arguments({"operator": operator})
    with landscape.measurement():
        chart = landscape.chart(geometry)
        result = stochastic_trace(
            curvature_product(landscape, chart, operator),
            chart.num_coordinates,
            method=method,
            num_products=num_products,
            tol=tol,
            seed=seed,
            dtype=landscape.dtype,
            device=landscape.device,
        )
        sampling = trace_standard_error(
            landscape, chart.displacement, chart.num_coordinates, float(result.value), operator, seed
        )
    return with_product_error(result, landscape, sampling)


def with_product_error(result: Estimate, landscape: LossLandscape, sampling: float = math.nan) -> Estimate:
    """Return the estimate of an operator in the landscape's dtype, with the errors of its products and samples."""
    error = float(result.error + landscape.product_error * result.value.abs())
    return scalar_estimate(
        landscape,
        float(result.value),
        error,
        converged=result.converged,
        num_products=result.num_products,
        standard_error=math.hypot(error, sampling),
    )


def _extend(basis: Basis, vector: Tensor) -> None:
    """Add a direction to the basis unless rounding is all that sticks out."""
    check_finite(vector)
    norm = torch.linalg.vector_norm(vector)
    _, remainder, remaining = basis.orthogonalize(vector)
    if remaining > 64 * torch.finfo(vector.dtype).eps * norm:
        basis.append(remainder, remaining)


def _quadratic_form(matvec: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    product = matvec(v)
    check_finite(product)
    form = torch.dot(v, product).cpu().double()
    # What rounding may have done to the form: it is a sum of terms that may cancel.
    rounding = torch.linalg.vector_norm(v) * torch.linalg.vector_norm(product) * torch.finfo(v.dtype).eps
    return torch.stack([form, rounding.cpu().double()])


def _result(exact: list[Tensor], probes: list[Tensor], tol: float, num_products: int) -> Estimate:
    value = error = torch.zeros((), dtype=torch.float64, device="cpu")
    if exact:
        forms, rounding = torch.stack(exact).unbind(dim=1)
        value, error = forms.sum(), _ROUNDING * torch.linalg.vector_norm(rounding)
    if probes:
        (mean, rounding), (standard_error, _) = mean_and_error(torch.stack(probes))
        value, error = value + mean, torch.hypot(error, torch.hypot(standard_error, _ROUNDING * rounding))
    return Estimate(value, error, bool(error <= tol * value.abs()), num_products)

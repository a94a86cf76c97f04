"""The trace of the Hessian, by random probes: Hutchinson's estimator and Hutch++.

For random signs v, ``E[vᵀ A v] = tr A``. Hutch++ first finds the directions that matter most (a few products with
random vectors, orthonormalised), takes the trace over them exactly, and leaves to the probes what is orthogonal
to them. Given those directions the probes are independent and unbiased, so their scatter is the error of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_flatness.estimators.basis import Basis
from lightning_flatness.estimators.operators import (
    Operator,
    check_operator,
    curvature_product,
    rademacher,
    unit_vector,
)
from lightning_flatness.geometry import Geometry
from lightning_flatness.landscape import LossLandscape

TraceMethod = Literal["hutch++", "hutchinson"]

_SKETCH_SHARE = 0.25
"""Share of products that look for directions; as many more take the trace over them. Hutch++ has a third; fewer leave
more probes, so that the standard error is known well."""

_ROUNDING = 16
"""Rounding errors of a sum of products, in units of the machine precision."""


@dataclass(frozen=True)
class TraceResult:
    """An estimated trace.

    Attributes:
        value: The trace, a scalar; of an operator without a landscape in float64 on the CPU.
        standard_error: Its standard error; where every coordinate was probed, what rounding leaves.
        converged: Whether the standard error reached the tolerance.
        num_products: Products with the operator.
        gradient_evaluations: What they cost, in gradients on all samples; zero for an operator without a landscape.
    """

    value: Tensor
    standard_error: Tensor
    converged: bool
    num_products: int
    gradient_evaluations: float = 0.0


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
) -> TraceResult:
    """Return the trace of a symmetric operator, exactly if ``num_products`` suffices for all its coordinates.

    Args:
        matvec: Product of the operator with a vector of shape (size,); what it returns is overwritten.
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
    check_trace_arguments(method, num_products, tol)
    device = torch.device(device)
    if size <= num_products:
        vectors = (unit_vector(size, i, dtype, device) for i in range(size))
        return _result([_quadratic_form(matvec, v) for v in vectors], [], tol, size)
    generator = torch.Generator().manual_seed(seed)
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


def hessian_trace(
    landscape: LossLandscape,
    geometry: str | Geometry = "euclidean",
    *,
    operator: Operator = "hessian",
    method: TraceMethod = "hutch++",
    num_products: int = 48,
    tol: float = 0.1,
    seed: int = 0,
) -> TraceResult:
    """Return the trace of the Hessian (or Gauss-Newton matrix) of ``z -> L(w(z))`` at the current weights.

    Costs one gradient and two per product; Hutch++ keeps ``num_products / 4`` vectors of the size of the weights.
    Deterministic given ``seed``.

    Args:
        landscape: The loss.
        geometry: The coordinates ``z``; see :mod:`lightning_flatness.geometry`.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix.
        method: ``"hutch++"`` or ``"hutchinson"``.
        num_products: Products to spend. Exact if there are no more coordinates than that.
        tol: Relative standard error at which the result counts as converged.
        seed: Seed of the probes.

    Returns:
        The trace with its standard error (the error of finite differences added where those are used).

    Raises:
        ValueError: If an argument is out of range.
    """
    check_operator(operator)
    spent = landscape.cost.gradient_evaluations
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
    return with_cost(result, landscape, spent)


def with_cost(result: TraceResult, landscape: LossLandscape, spent: float) -> TraceResult:
    """Return the result of an operator with the landscape's cost since ``spent``, device, dtype and product error."""
    error = result.standard_error + landscape.product_error * result.value.abs()
    return TraceResult(
        result.value.to(landscape.dtype).to(landscape.device),
        error.to(landscape.dtype).to(landscape.device),
        result.converged,
        result.num_products,
        landscape.cost.gradient_evaluations - spent,
    )


def check_trace_arguments(method: Any, num_products: Any, tol: float) -> None:
    """Raise an error unless the arguments of a stochastic trace are in range.

    Raises:
        ValueError: If one is not.
    """
    if method not in get_args(TraceMethod):
        raise ValueError(f"Expected `method` to be 'hutch++' or 'hutchinson', got {method!r}.")
    if not isinstance(num_products, int) or num_products < 4:
        raise ValueError(
            f"Expected `num_products` to be an integer >= 4 (two probes at least give an error), got {num_products!r}."
        )
    if not tol >= 0:
        raise ValueError(f"Expected `tol` to be >= 0, got {tol}.")


def mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of independent samples along the first axis, and its standard error; float64 on the CPU."""
    samples = samples.cpu().double()
    if len(samples) < 2:
        return samples.mean(dim=0), torch.full_like(samples.mean(dim=0), math.nan)
    return samples.mean(dim=0), samples.std(dim=0) / math.sqrt(len(samples))


def _extend(basis: Basis, vector: Tensor) -> None:
    """Add a direction to the basis unless rounding is all that sticks out."""
    _check_finite(vector)
    norm = torch.linalg.vector_norm(vector)
    _, remainder, remaining = basis.orthogonalize(vector)
    if remaining > 64 * torch.finfo(vector.dtype).eps * norm:
        basis.append(remainder, remaining)


def _quadratic_form(matvec: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    product = matvec(v)
    _check_finite(product)
    form = torch.dot(v, product).cpu().double()
    # What rounding may have done to the form: it is a sum of terms that may cancel.
    rounding = torch.linalg.vector_norm(v) * torch.linalg.vector_norm(product) * torch.finfo(v.dtype).eps
    return torch.stack([form, rounding.cpu().double()])


def _check_finite(product: Tensor) -> None:
    if not torch.isfinite(product).all():
        raise RuntimeError(
            "Expected finite Hessian-vector products, got one that is not. Check the gradient of the loss at the "
            "current weights (e.g. a square root or a norm at zero), or measure in float64."
        )


def _result(exact: list[Tensor], probes: list[Tensor], tol: float, num_products: int) -> TraceResult:
    value = error = torch.zeros((), dtype=torch.float64)
    if exact:
        forms, rounding = torch.stack(exact).unbind(dim=1)
        value, error = forms.sum(), _ROUNDING * torch.linalg.vector_norm(rounding)
    if probes:
        (mean, rounding), (standard_error, _) = mean_and_error(torch.stack(probes))
        value, error = value + mean, torch.hypot(error, torch.hypot(standard_error, _ROUNDING * rounding))
    return TraceResult(value, error, bool(error <= tol * value.abs()), num_products)

"""Eigenvalues of the Hessian of the loss, seen in a geometry."""

from __future__ import annotations

from torch import Tensor

from lightning_flatness.estimators.krylov.lanczos import TOLERANCE, lanczos
from lightning_flatness.estimators.krylov.solver import EigenResult, Which
from lightning_flatness.estimators.krylov.starts import remember_covectors, start_noise, start_vector, usable
from lightning_flatness.estimators.operators import Operator, curvature_product
from lightning_flatness.geometry import Geometry
from lightning_flatness.landscape import LossLandscape


def top_eigenvalues(
    landscape: LossLandscape,
    geometry: str | Geometry = "euclidean",
    *,
    operator: Operator = "hessian",
    k: int = 1,
    which: Which = "LA",
    tol: float = TOLERANCE,
    max_products: int = 300,
    max_basis: int | None = None,
    start: Tensor | None = None,
    shared_start: bool = False,
    seed: int = 0,
) -> EigenResult:
    """Return the extreme eigenpairs of the Hessian (or Gauss-Newton matrix) of ``z -> L(w(z))`` at the current weights.

    Arguments, cost and errors as of :class:`lightning_flatness.TopEigenvalues`; ``start`` is the ``subspace`` of an
    earlier result to start from, shape (any, number of coordinates). The vectors are in ``z``. The residuals contain
    the errors of finite differences and of weights in low precision. Deterministic given ``seed``.
    """
    with landscape.measurement():
        chart = landscape.chart(geometry)
        start = usable(start, chart)
        result = lanczos(
            curvature_product(landscape, chart, operator),
            chart.num_coordinates,
            k=k,
            which=which,
            tol=tol,
            max_products=max_products,
            max_basis=max_basis,
            start=start_vector(landscape, chart, start, operator=operator, k=k, which=which, shared=shared_start),
            start_noise=start_noise(landscape, start, shared=shared_start),
            seed=seed,
            dtype=landscape.dtype,
            device=landscape.device,
            product_error=lambda: landscape.product_error,
        )
        if which != "SA":
            remember_covectors(landscape, chart, result.eigenvectors)
    return result

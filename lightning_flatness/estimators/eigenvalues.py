"""Eigenvalues of the Hessian of the loss, seen in a geometry."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lightning_flatness.estimators.krylov import EigenResult, Which
from lightning_flatness.estimators.lanczos import lanczos
from lightning_flatness.estimators.operators import Operator, curvature_product
from lightning_flatness.estimators.starts import remember_covectors, start_noise, start_vector, usable
from lightning_flatness.geometry import Geometry
from lightning_flatness.landscape import LossLandscape


def top_eigenvalues(
    landscape: LossLandscape,
    geometry: str | Geometry = "euclidean",
    *,
    operator: Operator = "hessian",
    k: int = 1,
    which: Which = "LA",
    tol: float = 1e-3,
    max_products: int = 300,
    max_basis: int | None = None,
    start: Tensor | None = None,
    shared_start: bool = False,
    seed: int = 0,
) -> EigenResult:
    """Return the extreme eigenpairs of the Hessian (or Gauss-Newton matrix) of ``z -> L(w(z))`` at the current weights.

    Costs one gradient and two per Hessian-vector product; memory for the basis, ``max_basis`` times the weights at
    most. Deterministic given ``seed``.

    Args:
        landscape: The loss.
        geometry: The coordinates ``z``; see :mod:`lightning_flatness.geometry`.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix, which needs an ``OutputLoss``.
        k: Number of pairs.
        which: ``"LA"``: largest; ``"SA"``: most negative; ``"LM"``: of largest modulus.
        tol: Relative Ritz residual ``‖H y - theta y‖ / |theta|`` at which to stop.
        max_products: Hessian-vector products after which to stop in any case.
        max_basis: Vectors of the size of the weights to keep at most; see :func:`lanczos` for the default.
        start: ``subspace`` of an earlier result to start from, shape (any, number of coordinates).
        shared_start: Start from the sharpest directions that an earlier call in the same ``measurement()`` has found
            in another geometry, where there was one: fewer products then do. The result depends on that call, within
            its residual.
        seed: Seed of the random start.

    Returns:
        Values, residuals (with the error of finite differences added where those are used), and vectors in ``z``.

    Raises:
        ValueError: If an argument is out of range, ``k`` larger than the number of coordinates among them.
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
        )
        if which != "SA":
            remember_covectors(landscape, chart, result.eigenvectors)
    product_error = landscape.product_error * result.eigenvalues.abs().max()
    return replace(result, residuals=result.residuals + product_error)

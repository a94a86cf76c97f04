"""Eigenvalues of the Hessian of the loss, seen in a geometry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_flatness.estimators.krylov.lanczos import TOLERANCE, lanczos
from lightning_flatness.estimators.krylov.solver import EigenResult, Which
from lightning_flatness.estimators.krylov.starts import (
    remember_covectors,
    start_in_block,
    start_noise,
    start_vector,
    usable,
)
from lightning_flatness.estimators.layers import layers_in, within
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
    with landscape.measurement(on_shards=operator == "hessian"):
        chart = landscape.chart(geometry)
        vectors = landscape.vectors_in(chart)
        start = usable(start, vectors)
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
            product_error=lambda: landscape.product_error,
            vectors=vectors,
        )
        if which != "SA":
            remember_covectors(landscape, chart, result.eigenvectors)
    return result


@dataclass(frozen=True)
class LayerEigenvalues:
    """The most wanted eigenvalue of the diagonal block of the Hessian that belongs to each layer.

    Attributes:
        layers: Their coordinates by their names.
        eigenvalues: Shape (layers,).
        residuals: Shape (layers,), as of :class:`EigenResult`.
        directions: The unit eigenvectors of all layers behind each other, shape (num_coordinates,).
        converged: Whether all have converged.
        num_products: Products with the Hessian.
    """

    layers: dict[str, slice]
    eigenvalues: Tensor
    residuals: Tensor
    directions: Tensor
    converged: bool
    num_products: int

    def vectors(self) -> Iterator[Tensor]:
        """Yield the eigenvectors, zero outside of their layer, shape (num_coordinates,)."""
        for block in self.layers.values():
            vector = torch.zeros_like(self.directions)
            vector[block] = self.directions[block]
            yield vector


def layer_eigenvalues(
    landscape: LossLandscape,
    geometry: str | Geometry = "euclidean",
    *,
    operator: Operator = "hessian",
    which: Which = "LA",
    tol: float = TOLERANCE,
    max_products: int = 300,
    max_basis: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
) -> LayerEigenvalues:
    """Return the most wanted eigenvalue of each layer's diagonal block of the Hessian in a geometry.

    One run of Lanczos per layer, each with products of the whole Hessian: a product mixes all layers. ``max_products``
    is that of each layer, ``start`` the ``directions`` of an earlier result. Other arguments, cost and errors as of
    :class:`lightning_flatness.TopEigenvalues`.
    """
    with landscape.measurement():
        chart = landscape.chart(geometry)
        layers = layers_in(landscape, chart)
        product = curvature_product(landscape, chart, operator)
        start = usable(start, landscape.vectors_in(chart))
        results = []
        for block in layers.values():
            vector, noise = start_in_block(landscape, chart, start, block, operator=operator, which=which)
            results.append(
                lanczos(
                    within(product, block, chart.num_coordinates),
                    block.stop - block.start,
                    which=which,
                    tol=tol,
                    max_products=max_products,
                    max_basis=max_basis,
                    start=vector,
                    start_noise=noise,
                    seed=seed,
                    dtype=landscape.dtype,
                    device=landscape.device,
                    product_error=lambda: landscape.product_error,
                )
            )
    return LayerEigenvalues(
        layers,
        torch.cat([result.eigenvalues for result in results]),
        torch.cat([result.residuals for result in results]),
        torch.cat([result.eigenvectors[0] for result in results]),
        all(result.converged for result in results),
        sum(result.num_products for result in results),
    )

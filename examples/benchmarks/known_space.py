"""Eigenvalues in several geometries from one set of products, for ``fewer_products.py``.

``H d`` is known for displacements d of the weights. In the chart ``w0 + S z`` the operator is ``S H S``, and its
product with ``S^-1 d`` is ``S (H d)``: Rayleigh-Ritz on those vectors takes no product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_flatness import LossLandscape
from lightning_flatness.estimators import TOLERANCE
from lightning_flatness.estimators.sampling import eigenvalue_standard_errors
from lightning_flatness.geometry.base import LinearChart

LARGEST_RESIDUAL = 0.2
"""Of an eigenvalue whose error is to be a quarter of the standard error."""

Row = dict[str, Any]


def is_quarter(value: float, residual: float, following: float, relative_error: float) -> bool:
    """Return whether the error of an eigenvalue is a quarter of its standard error at most, given the next one."""
    gap = abs(value) - following
    error = min(residual, residual**2 / gap) if gap > residual else residual
    return residual <= LARGEST_RESIDUAL * abs(value) and error <= relative_error / 4 * abs(value)


@dataclass
class KnownSpace:
    """Displacements of the weights and their products with the Hessian at one point."""

    landscape: LossLandscape
    displacements: list[Tensor] = field(default_factory=list)
    products: list[Tensor] = field(default_factory=list)

    def add(self, displacement: Tensor) -> None:
        """Multiply one more."""
        self.displacements.append(displacement)
        self.products.append(self.landscape.hvp(displacement))

    def ritz(self, scale: Tensor, modulus: bool) -> tuple[float, Tensor, Tensor, float, Tensor]:
        """Return the most wanted Ritz value in a chart, its vector and residual, the next value, and the basis."""
        s = scale.double()[:, None]
        vectors = torch.stack(self.displacements, dim=1).double() / s
        images = s * torch.stack(self.products, dim=1).double()
        lengths = torch.linalg.vector_norm(vectors, dim=0)
        vectors, images = vectors / lengths, images / lengths
        keep = torch.linalg.qr(vectors)[1].diagonal().abs() > 1e-5
        basis, triangle = torch.linalg.qr(vectors[:, keep])
        images = torch.linalg.solve_triangular(triangle, images[:, keep], upper=True, left=False)
        projection = basis.T @ images
        values, coefficients = torch.linalg.eigh((projection + projection.T) / 2)
        key = values.abs() if modulus else values
        order = torch.argsort(key, descending=True)
        first, vector = values[order[0]], coefficients[:, order[0]]
        y = basis @ vector
        following = float(key[order[1]]) if len(key) > 1 else -math.inf
        return float(first), y, images @ vector - first * y, following, basis


class SpaceMetric:
    """The sharpest direction in a geometry, from a known space that it widens."""

    def __init__(self, geometry: str) -> None:
        self.geometry = geometry
        self.previous: Tensor | None = None
        self.relative_error = math.nan

    def measure(self, space: KnownSpace, covector: Tensor | None, quarter: bool) -> tuple[Row, Tensor]:
        """Return value, products and what was known before the first one; and the covector for the next geometry."""
        landscape = space.landscape
        chart = landscape.chart(self.geometry)
        assert isinstance(chart, LinearChart)
        scale = torch.ones(landscape.num_parameters) if chart.scale is None else chart.scale.clamp_min(1e-6)
        row: Row = {}
        before, start = len(space.products), self._start(landscape.gradient(keep_graphs=True), scale, covector)
        while True:
            if space.products:
                value, y, residual, following, basis = space.ritz(scale, self.geometry == "layer")
                size = float(torch.linalg.vector_norm(residual))
                if before and len(space.products) == before:
                    row = {
                        f"known value {self.geometry}": abs(value),
                        f"known residual {self.geometry}": size / abs(value),
                    }
                is_done = size <= TOLERANCE * abs(value)
                if quarter and not math.isnan(self.relative_error):
                    is_done = is_quarter(value, size, following, self.relative_error)
                if is_done:
                    break
            z = (residual - basis @ (basis.T @ residual)).float() if start is None else start
            space.add(scale * normalized(z))
            start = None
        self.previous = y.float()
        error = eigenvalue_standard_errors(landscape, chart, torch.tensor([value]), [self.previous])
        self.relative_error = float(error) / abs(value)
        row |= {f"value {self.geometry}": abs(value), f"products {self.geometry}": len(space.products) - before}
        return row, self.previous / scale

    def _start(self, gradient: Tensor, scale: Tensor, covector: Tensor | None) -> Tensor | None:
        """Return what the package starts from."""
        sharp = normalized(scale * gradient)
        if covector is not None:
            start = added(normalized(scale * covector), sharp, 0.1)
        else:
            start = sharp if self.previous is None else added(normalized(self.previous), sharp, 1.0)
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0))
        return normalized(start) + 0.03 * normalized(noise)


def normalized(v: Tensor) -> Tensor:
    """Return a vector of norm one in the same direction."""
    unit: Tensor = v / torch.linalg.vector_norm(v)
    return unit


def added(v: Tensor, other: Tensor, share: float) -> Tensor:
    """Return the sum of two directions."""
    return v + (share if float(v @ other) >= 0 else -share) * other

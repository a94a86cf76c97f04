"""The Hessian or the Gauss-Newton matrix of the loss in a geometry, as a linear operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_flatness.geometry import Chart
from lightning_flatness.landscape import LossLandscape

Operator = Literal["hessian", "ggn"]
"""``"hessian"``: the second derivative of the loss. ``"ggn"``: its Gauss-Newton part ``Jᵀ B J``."""


def curvature_product(landscape: LossLandscape, chart: Chart, operator: Operator) -> Callable[[Tensor], Tensor]:
    """Return the product with the Hessian or the Gauss-Newton matrix of ``z -> L(w(z))`` at ``z = 0``."""
    if operator == "ggn":  # the curvature of the chart belongs to what Gauss and Newton leave out
        return partial(chart.hvp, landscape.ggnvp, gradient=None)
    return partial(chart.hvp, landscape.hvp, gradient=landscape.gradient)


class NonFiniteProductError(RuntimeError):
    """A Hessian-vector product is infinite or not a number, though the loss is finite."""


def check_finite(product: Tensor, norm: float = 0.0) -> None:
    """Raise an error unless a Hessian-vector product, or numbers computed from one, and a norm are finite.

    Raises:
        NonFiniteProductError: If it is not.
    """
    if not (torch.isfinite(product).all() and math.isfinite(norm)):
        raise NonFiniteProductError(
            "Expected finite Hessian-vector products, got one that is not. Check the gradient of the loss at the "
            "current weights (e.g. a square root or a norm at zero), or measure in float64."
        )


def rademacher(size: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a vector of independent random signs, the same on every device and rank."""
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8, device=generator.device)
    return signs.to(device, dtype).mul_(2).sub_(1)


def unit_vector(size: int, index: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the vector that is one at ``index`` and zero elsewhere."""
    vector = torch.zeros(size, dtype=dtype, device=device)
    vector[index] = 1
    return vector


def gaussian(size: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a vector of independent standard normal numbers, the same on every device and rank."""
    return torch.randn(size, generator=generator, dtype=dtype, device=generator.device).to(device)

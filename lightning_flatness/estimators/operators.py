"""Which curvature: the Hessian or the Gauss-Newton matrix of the loss, seen in a geometry, as a linear operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_flatness.geometry import Chart
from lightning_flatness.landscape import LossLandscape

Operator = Literal["hessian", "ggn"]
"""``"hessian"``: the second derivative of the loss. ``"ggn"``: its Gauss-Newton part ``Jᵀ B J``."""


def check_operator(operator: Any) -> None:
    """Raise an error unless ``operator`` is the name of a curvature.

    Raises:
        ValueError: If it is not.
    """
    if operator not in get_args(Operator):
        raise ValueError(f"Expected `operator` to be 'hessian' or 'ggn', got {operator!r}.")


def curvature_product(landscape: LossLandscape, chart: Chart, operator: Operator) -> Callable[[Tensor], Tensor]:
    """Return the product with the Hessian or the Gauss-Newton matrix of ``z -> L(w(z))`` at ``z = 0``.

    Args:
        landscape: The loss.
        chart: The coordinates ``z``.
        operator: ``"hessian"`` or ``"ggn"``.

    Returns:
        A function of a vector of shape (chart.num_coordinates,).

    Raises:
        ValueError: If ``operator`` is neither.
    """
    check_operator(operator)
    if operator == "ggn":  # the curvature of the chart belongs to what Gauss and Newton leave out
        return lambda v: chart.hvp(landscape.ggnvp, v, gradient=None)
    return lambda v: chart.hvp(landscape.hvp, v, gradient=landscape.gradient)


def rademacher(size: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a vector of independent random signs, the same on every device and rank."""
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8)
    return signs.to(device, dtype).mul_(2).sub_(1)


def unit_vector(size: int, index: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the vector that is one at ``index`` and zero elsewhere."""
    vector = torch.zeros(size, dtype=dtype, device=device)
    vector[index] = 1
    return vector

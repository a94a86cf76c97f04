"""The balance of the basis paths of a ReLU network: the largest over the smallest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_flatness.estimators.arguments import check_arguments
from lightning_flatness.estimators.result import Estimate
from lightning_flatness.geometry import Geometry, PathChart, PathGeometry
from lightning_flatness.landscape import LossLandscape


def basis_path_balance(
    landscape: LossLandscape,
    geometry: Geometry | None = None,
    *,
    log10: bool = False,
    ignore_zeros: bool = False,
    quantile: float = 0.0,
) -> Estimate:
    """Return the largest modulus of the values of the basis paths over the smallest one, at the current weights.

    Arguments as of :class:`lightning_flatness.BasisPathBalance`. The ratio has no error and costs nothing.
    """
    check_arguments({"quantile": quantile})
    chart = landscape.chart(geometry or PathGeometry())
    assert isinstance(chart, PathChart)
    ratio = balance(chart.values, ignore_zeros=ignore_zeros, quantile=quantile)
    value = (ratio.log10() if log10 else ratio).to(landscape.dtype)
    return Estimate(value, torch.zeros_like(value), converged=True, num_products=0)


def balance(values: Tensor, *, ignore_zeros: bool = False, quantile: float = 0.0) -> Tensor:
    """Return the largest modulus of some values over the smallest one, in float64 on the CPU; infinite if one is zero.

    The share ``quantile`` of the values is left out at each end.

    Example:
        >>> balance(torch.tensor([-8.0, 2.0, 0.0]), ignore_zeros=True)
        tensor(4., dtype=torch.float64)
    """
    moduli = values.abs()
    if ignore_zeros:
        moduli = moduli[moduli > 0]
    outside = math.floor(quantile * len(moduli))
    largest = moduli.kthvalue(len(moduli) - outside).values
    smallest = moduli.kthvalue(1 + outside).values
    return largest.cpu().double() / smallest.cpu().double()

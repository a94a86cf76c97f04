"""Relative flatness of a linear layer (arXiv 2001.00939): curvature weighted by the layer's own weights.

The sum over pairs of rows ``kappa = sum_(s,s') <w_s, w_s'> Tr(H_ss')`` is a trace: with the singular value
decomposition ``W = U D Vᵀ`` it is the trace of the Hessian in the coordinates Y of ``W + U D Y``, since
``W Wᵀ = U D² Uᵀ``. So it is measured like any trace, and exactly where the layer is small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flatness.estimators.layers import linear_layer, offset_of
from lightning_flatness.estimators.operators import Operator, check_operator
from lightning_flatness.estimators.trace import TraceMethod, TraceResult, stochastic_trace, with_cost
from lightning_flatness.landscape import LossLandscape


def relative_flatness(
    landscape: LossLandscape,
    layer: str | None = None,
    *,
    operator: Operator = "hessian",
    method: TraceMethod = "hutch++",
    num_products: int = 48,
    tol: float = 0.1,
    seed: int = 0,
) -> TraceResult:
    """Return the relative flatness ``sum_(s,s') <w_s, w_s'> Tr(H_ss')`` of a linear layer at the current weights.

    Costs one gradient and two per product. Memory: the layer's weights three times, and with Hutch++ a quarter of
    ``num_products`` times.

    Args:
        landscape: The loss.
        layer: Name of an ``nn.Linear`` in the module. Default: the last one.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix.
        method: ``"hutch++"`` or ``"hutchinson"``.
        num_products: Products to spend. Exact where ``min(rows, columns) · columns`` is no more than that.
        tol: Relative standard error at which the result counts as converged.
        seed: Seed of the probes.

    Returns:
        The relative flatness with its standard error.

    Raises:
        ValueError: If there is no linear layer of that name, or an argument is out of range.
    """
    check_operator(operator)
    with landscape.measurement():
        _, module = linear_layer(landscape, layer)
        weight = module.weight.detach()
        left, singular, _ = torch.linalg.svd(weight.to(landscape.dtype), full_matrices=False)
        factor = left * singular
        start = offset_of(landscape, module.weight)
        stop = start + weight.numel()
        product = landscape.ggnvp if operator == "ggn" else landscape.hvp

        def matvec(y: Tensor) -> Tensor:
            v = torch.zeros(landscape.num_parameters, dtype=landscape.dtype, device=landscape.device)
            v[start:stop] = (factor @ y.view(len(singular), -1)).flatten()
            pulled_back: Tensor = factor.T @ product(v)[start:stop].view(weight.shape)
            return pulled_back.flatten()

        spent = landscape.cost.gradient_evaluations
        result = stochastic_trace(
            matvec,
            len(singular) * weight.shape[1],
            method=method,
            num_products=num_products,
            tol=tol,
            seed=seed,
            dtype=landscape.dtype,
            device=landscape.device,
        )
    return with_cost(result, landscape, spent)

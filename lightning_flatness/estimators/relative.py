"""Relative flatness of a linear layer (arXiv 2001.00939): curvature weighted by the layer's own weights.

The sum over pairs of rows ``kappa = sum_(s,s') <w_s, w_s'> Tr(H_ss')`` is a trace: with the singular value
decomposition ``W = U D Vᵀ`` it is the trace of the Hessian in the coordinates Y of ``W + U D Y``, since
``W Wᵀ = U D² Uᵀ``. So it is measured like any trace, and exactly where the layer is small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flatness.estimators.arguments import TraceMethod, check_arguments
from lightning_flatness.estimators.layers import block_product, linear_layer, offset_of
from lightning_flatness.estimators.operators import Operator
from lightning_flatness.estimators.result import Estimate
from lightning_flatness.estimators.sampling import trace_standard_error
from lightning_flatness.estimators.trace import stochastic_trace, with_product_error
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
) -> Estimate:
    """Return the relative flatness ``sum_(s,s') <w_s, w_s'> Tr(H_ss')`` of a linear layer at the current weights.

    Arguments, cost and errors as of :class:`lightning_flatness.RelativeFlatness`.
    """
    check_arguments({"operator": operator})
    with landscape.measurement():
        _, module = linear_layer(landscape, layer)
        weight = module.weight.detach()
        left, singular, _ = torch.linalg.svd(weight.to(landscape.dtype), full_matrices=False)
        # Each library chooses signs of its own, and the random probes would be others on a GPU.
        largest = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
        factor = left * singular * largest.sign()
        product = block_product(landscape, module.weight, operator)

        def matvec(y: Tensor) -> Tensor:
            pulled_back: Tensor = factor.T @ product((factor @ y.view(len(singular), -1)).flatten()).view(weight.shape)
            return pulled_back.flatten()

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

        def displacement(y: Tensor) -> Tensor:
            v = torch.zeros(landscape.num_parameters, dtype=landscape.dtype, device=landscape.device)
            start = offset_of(landscape, module.weight)
            v[start : start + weight.numel()] = (factor @ y.view(len(singular), -1)).flatten()
            return v

        size = len(singular) * weight.shape[1]
        sampling = trace_standard_error(landscape, displacement, size, float(result.value), operator, seed)
    return with_product_error(result, landscape, sampling)

"""Names of layers and where their weights are in flat vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_flatness.estimators.operators import Operator, curvature_product
from lightning_flatness.estimators.undefined import UndefinedMeasureError
from lightning_flatness.landscape import LossLandscape


def linear_layer(landscape: LossLandscape, name: str | None) -> tuple[str, nn.Linear]:
    """Return the name and the layer of a trainable ``nn.Linear`` of the module; the last one for None.

    Raises:
        UndefinedMeasureError: If the module has no linear layer.
        ValueError: If there is no layer of that name; the error lists those there are.
    """
    trainable = {id(p) for p in landscape.parameters}
    layers = {
        n: m
        for n, m in landscape.module.named_modules()
        if isinstance(m, nn.Linear) and id(getattr(m, "weight", None)) in trainable
    }
    if not layers:
        raise UndefinedMeasureError(
            f"Expected a module with a trainable nn.Linear layer, got {type(landscape.module).__name__} without one. "
            "Relative flatness is defined for linear layers only; measure HessianTrace(geometry='layer') instead."
        )
    if name is None:
        return list(layers.items())[-1]
    if name not in layers:
        modules = dict(landscape.module.named_modules())
        what = f"a {type(modules[name]).__name__}" if name in modules else "no module of that name"
        raise ValueError(
            f"Expected `layer` to be the name of a trainable nn.Linear layer, one of {list(layers)}, got {name!r}, "
            f"{what}."
        )
    return name, layers[name]


def block_product(landscape: LossLandscape, parameter: Tensor, operator: Operator) -> Callable[[Tensor], Tensor]:
    """Return the product of the Hessian's block of one parameter with a vector of shape (parameter.numel(),)."""
    start = offset_of(landscape, parameter)
    block = slice(start, start + parameter.numel())
    product = curvature_product(landscape, landscape.chart("euclidean"), operator)

    def matvec(y: Tensor) -> Tensor:
        v = torch.zeros(landscape.num_parameters, dtype=landscape.dtype, device=landscape.device)
        v[block] = y
        return product(v)[block]

    return matvec


def offset_of(landscape: LossLandscape, parameter: Tensor) -> int:
    """Return where a trainable parameter begins in flat vectors."""
    start = 0
    for p in landscape.parameters:
        if p is parameter:
            return start
        start += p.numel()
    raise ValueError("Expected a trainable parameter of the module, got another tensor.")

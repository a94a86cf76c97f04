"""Names of layers and where their weights are in flat vectors.

A layer is a module that holds weights itself, by its name in ``named_modules()``. A weight of the network itself,
outside of its modules, is a layer of its own, by its name.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lightning_flatness.estimators.operators import Operator, curvature_product
from lightning_flatness.estimators.undefined import UndefinedMeasureError
from lightning_flatness.geometry import Chart
from lightning_flatness.geometry.base import SymmetricChart
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


def layers_in(landscape: LossLandscape, chart: Chart) -> dict[str, slice]:
    """Return the coordinates of each layer's measured weights, by the name of the layer.

    A weight that several layers share belongs to the first of them.

    Raises:
        UndefinedMeasureError: If coordinates do not belong to single weights.
    """
    if not isinstance(chart, SymmetricChart):
        raise UndefinedMeasureError(
            f"Expected a geometry whose coordinates belong to single weights for per_layer=True, got a "
            f"{type(chart).__name__}. Use 'euclidean', 'layer', 'filter', 'element', 'optimizer' or 'path_norm'."
        )
    measured = {id(p) for p in landscape.parameters}
    found: dict[str, slice] = {}
    start = 0
    for name, p in landscape.module.named_parameters():
        if id(p) in measured:
            parts = [part for part in name.split(".") if part != "_orig_mod"]  # compiled or not, it is one layer
            layer = ".".join(parts[:-1] or parts)
            first = found[layer].start if layer in found else start
            start += p.numel()
            found[layer] = slice(first, start)
    return found


def block_product(landscape: LossLandscape, parameter: Tensor, operator: Operator) -> Callable[[Tensor], Tensor]:
    """Return the product of the Hessian's block of one parameter with a vector of shape (parameter.numel(),)."""
    start = offset_of(landscape, parameter)
    product = curvature_product(landscape, landscape.chart("euclidean"), operator)
    return within(product, slice(start, start + parameter.numel()), landscape.num_parameters)


def within(product: Callable[[Tensor], Tensor], block: slice, size: int) -> Callable[[Tensor], Tensor]:
    """Return the product of a diagonal block of an operator of some size, given the product of the operator."""

    def matvec(y: Tensor) -> Tensor:
        v = y.new_zeros(size)
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

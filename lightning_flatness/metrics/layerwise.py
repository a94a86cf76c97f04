"""Flatness relative to the size of layers: relative flatness and minimum sharpness as metrics."""

from __future__ import annotations

from lightning_flatness.estimators import Operator, TraceMethod, minimum_sharpness, relative_flatness
from lightning_flatness.metrics.base import FlatnessMetric, arguments


class RelativeFlatness(FlatnessMetric):
    r"""The relative flatness of one linear layer at the current weights (arXiv 2001.00939). Small is flat.

        kappa = sum_(s,s') <w_s, w_s'> Tr(H_ss'),

    over pairs of rows ``w_s`` of the weight matrix ``W``, with the blocks ``H_ss'`` of the Hessian of the loss that
    belong to them. Scaling the layer by c > 0 and the next one by 1/c does not change it. Units: those of the loss.
    With ``W = U D Vᵀ`` it is the trace of the Hessian in the coordinates Y of ``W + U D Y``, and is measured like
    :class:`HessianTrace`, at the same cost: one gradient and two per product, 110 by default.

    Args:
        layer: Name of an ``nn.Linear`` as in ``module.named_modules()``, e.g. ``"net.4"``. Default: the last one.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix, which needs an :class:`OutputLoss`.
        method: ``"hutch++"`` or ``"hutchinson"``.
        num_products: Products to spend on a measurement. Exact where min(rows, columns) · columns is no more.
        tol: Standard error, relative to the value, at which the value counts as converged.
        seed: Seed of the probes.

    Raises:
        ValueError: If an argument is out of range; in ``update``, if there is no linear layer of that name.

    Example:
        >>> import torch
        >>> from lightning_flatness import LossLandscape, RelativeFlatness
        >>> module = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> module[0].weight.data = torch.tensor([[3.0, 4.0]])
        >>> batches = [torch.tensor([[1.0, 0.0], [0.0, 3.0]])]
        >>> metric = RelativeFlatness(layer="0")
        >>> metric.update(LossLandscape(module, batches, lambda module, x: module(x).square().mean()))
        >>> metric.compute().round()  # ‖w‖² tr(H) = 25 · 10
        tensor(250.)
    """

    error_name = "numerical_error"
    effort = "num_products"
    estimator = staticmethod(relative_flatness)

    def __init__(
        self,
        layer: str | None = None,
        operator: Operator = "hessian",
        method: TraceMethod = "hutch++",
        num_products: int = 48,
        tol: float = 0.1,
        seed: int = 0,
    ) -> None:
        if layer is not None and not isinstance(layer, str):
            raise ValueError(f"Expected `layer` to be the name of a layer or None, got {type(layer).__name__}.")
        super().__init__(**arguments(locals()))


class MinimumSharpness(FlatnessMetric):
    r"""The smallest Hessian trace that rescaling the layers can give at the current weights (arXiv 2106.12612).

        min over alpha, prod alpha_l = 1, of  sum_l t_l / alpha_l² + b_l / (alpha_1 … alpha_l)²,

    with the traces ``t_l``, ``b_l`` of the Hessian's blocks of the weights and biases of layer l: the trace at the
    rescaled weights. Without biases it is ``L (prod t_l)^(1/L)``. For chains of linear and convolutional layers with
    positively homogeneous activations (ReLU, pooling, …); whether the module is one is checked by rescaling it.
    Invariant under rescaling layers. Units: loss per weight squared, at the scales that make it smallest.

    A measurement costs one gradient and two per product, 207 by default. Memory: four vectors of the
    size of the weights. A layer whose trace is negative (under a loss that is not convex in the outputs) leaves no
    minimum: the value is minus infinity, not converged; with ``operator="ggn"`` and the usual losses there is one.

    Args:
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix, which needs an :class:`OutputLoss`.
        method: ``"hutch++"`` or ``"hutchinson"``, for the trace of each tensor's block.
        num_products: Products to spend on all tensors together, 8 on each at least; small tensors are done exactly.
        tol: Standard error, relative to the value, at which the value counts as converged.
        seed: Seed of the probes.

    Raises:
        ValueError: If an argument is out of range; in ``update``, if rescaling the layers changes the loss.

    Example:
        >>> import torch
        >>> from lightning_flatness import LossLandscape, MinimumSharpness
        >>> linear = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        >>> linear[0].weight.data, linear[1].weight.data = torch.tensor([[1.0]]), torch.tensor([[4.0]])
        >>> module = torch.nn.Sequential(linear[0], torch.nn.ReLU(), linear[1])
        >>> metric = MinimumSharpness()
        >>> metric.update(LossLandscape(module, [torch.ones(1, 1)], lambda module, x: module(x).square().mean()))
        >>> metric.compute().round()  # the traces are 2 · 4² and 2 · 1²: twice the root of their product
        tensor(16.)
    """

    error_name = "numerical_error"
    effort = "num_products"
    estimator = staticmethod(minimum_sharpness)

    def __init__(
        self,
        operator: Operator = "hessian",
        method: TraceMethod = "hutch++",
        num_products: int = 96,
        tol: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(**arguments(locals()))

"""Minimum sharpness (arXiv 2106.12612): the smallest Hessian trace that rescaling the layers can give.

In a chain of linear layers with positively homogeneous activations, multiplying the weights of layer l by alpha_l > 0,
and its bias by ``alpha_1 … alpha_l``, changes nothing in the outputs while the product of all is one; but it
changes the trace of the Hessian to ``sum_l t_l / alpha_l² + sum_l b_l / (alpha_1 … alpha_l)²``, with the traces t_l
and b_l of the blocks of weights and biases. That sum is convex in ``log alpha``; its minimum is the measure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_flatness.estimators.arguments import TraceMethod, check_arguments
from lightning_flatness.estimators.layers import block_product, offset_of
from lightning_flatness.estimators.operators import Operator
from lightning_flatness.estimators.result import Estimate, scalar_estimate, small_sample_factor
from lightning_flatness.estimators.sampling import trace_standard_error
from lightning_flatness.estimators.trace import num_probes, stochastic_trace
from lightning_flatness.estimators.undefined import UndefinedMeasureError
from lightning_flatness.landscape import LossLandscape

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_INVARIANCE = 1e-3
_TENSORS = ("weight", "bias")
_LEAST_PRODUCTS = 8
_DOUBLE: Any = {"dtype": torch.float64, "device": "cpu"}


@dataclass(frozen=True)
class MinimumSharpnessResult(Estimate):
    """The minimum of the trace over layer scales, minus infinity where a layer's trace is negative: then there is none.

    Attributes:
        layers: Names of the layers, in the order in which they run.
        scales: The alpha of each layer at the minimum, shape (layers,).
    """

    layers: tuple[str, ...]
    scales: Tensor


def minimum_sharpness(
    landscape: LossLandscape,
    *,
    operator: Operator = "hessian",
    method: TraceMethod = "hutch++",
    num_products: int = 96,
    tol: float = 0.1,
    seed: int = 0,
) -> MinimumSharpnessResult:
    """Return the minimum over layer scales (of product one) of the Hessian's trace at the rescaled weights.

    Arguments, cost and errors as of :class:`lightning_flatness.MinimumSharpness`. Each weight and each bias tensor is
    probed by itself. The standard error is that of the sum at the scales found.
    """
    check_arguments({"operator": operator, "method": method, "num_products": num_products, "tol": tol})
    with landscape.measurement():
        layers = _layers_in_order(landscape)
        _check_invariance(landscape, [layer for _, layer in layers])
        modules = [layer for _, layer in layers]
        traces, errors, spent_products = _block_traces(landscape, modules, operator, method, num_products, seed)
        log_scales = minimizing_log_scales(*traces)
        exists = bool((traces >= -4 * errors).all())  # a trace of zero may come out a little below it
        terms = _rescaled(log_scales, *traces.clamp_min(0))
        value = float(terms.sum()) if exists else -math.inf
        # To first order the error of a minimum is that of the function at the place of the minimum.
        rescaled = _rescaling(landscape, modules, log_scales)
        size = landscape.num_parameters
        sampling = trace_standard_error(landscape, rescaled.__mul__, size, value, operator, seed)
    error = float(torch.linalg.vector_norm(_rescaled(log_scales, *errors)))
    error += landscape.product_error * float(terms.sum())
    converged = exists and error <= tol * value
    estimate = scalar_estimate(
        landscape,
        value,
        error,
        converged=converged,
        num_products=spent_products,
        standard_error=math.hypot(error, sampling),
    )
    scales = log_scales.exp().to(landscape.dtype).to(landscape.device)
    return MinimumSharpnessResult(**vars(estimate), layers=tuple(name for name, _ in layers), scales=scales)


def minimizing_log_scales(weights: Tensor, biases: Tensor) -> Tensor:
    """Return the ``x = log alpha`` of sum zero that minimise the trace of the rescaled layers.

    Args:
        weights: Traces t_l of the layers' weights, shape (layers,).
        biases: Traces b_l of their biases, zero where there is none.

    Returns:
        Shape (layers,); damped Newton steps of a convex problem. Negative traces count as zero.

    Example:
        >>> minimizing_log_scales(torch.tensor([1.0, 16.0]), torch.zeros(2)).exp()  # 2 sqrt(1 · 16) = 8
        tensor([0.5000, 2.0000], dtype=torch.float64)
    """
    t, b = weights.cpu().double().clamp_min(0), biases.cpu().double().clamp_min(0)
    num_layers, total = len(t), float(t.sum() + b.sum())
    x = torch.zeros(num_layers, **_DOUBLE)
    if num_layers < 2 or total == 0:
        return x
    t, b = t / total, b / total
    # Rows: the exponents x_l of the weights, and their running sums of the biases; the columns add up to zero.
    identity = torch.eye(num_layers, **_DOUBLE)
    exponents = torch.cat([identity, torch.tril(torch.ones_like(identity))])
    factors = torch.cat([t, b])
    free = torch.linalg.qr(identity - 1 / num_layers)[0][:, : num_layers - 1]
    rows = exponents @ free
    y = torch.zeros(num_layers - 1, **_DOUBLE)

    def objective(y: Tensor) -> Tensor:
        return torch.dot(factors, torch.exp(-2 * (rows @ y)))

    for _ in range(200):
        terms = factors * torch.exp(-2 * (rows @ y))
        gradient = -2 * (rows.T @ terms)
        hessian = 4 * (rows.T * terms) @ rows
        ridge = 1e-14 * float(hessian.diagonal().max()) * identity[1:, 1:]
        step = -torch.linalg.solve(hessian + ridge, gradient)
        step = step * min(1.0, 2.0 / max(float(step.abs().max()), 1e-300))
        decrease = float(gradient @ step)
        length = 1.0
        while objective(y + length * step) > terms.sum() + 1e-4 * length * decrease and length > 1e-10:
            length /= 2
        y = y + length * step
        if -decrease <= 1e-15 * float(terms.sum()) or float((free @ y).abs().max()) > 50:
            break
    log_scales: Tensor = free @ y
    return log_scales


def _rescaled(log_scales: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Return the terms ``t_l / alpha_l²`` and ``b_l / (alpha_1 … alpha_l)²``, shape (2, layers)."""
    terms = weights * torch.exp(-2 * log_scales), biases * torch.exp(-2 * log_scales.cumsum(dim=0))
    return torch.stack(terms)


def _rescaling(landscape: LossLandscape, layers: Sequence[nn.Module], log_scales: Tensor) -> Tensor:
    """Return by what changes of the rescaled weights are multiplied to be changes of the weights, a flat vector."""
    factors = torch.zeros(landscape.num_parameters, dtype=landscape.dtype, device=landscape.device)
    for layer, powers in zip(layers, torch.stack([log_scales, log_scales.cumsum(dim=0)], dim=1), strict=True):
        for name, power in zip(_TENSORS, powers.tolist(), strict=True):
            parameter = getattr(layer, name)
            if parameter is not None and parameter.requires_grad:
                start = offset_of(landscape, parameter)
                factors[start : start + parameter.numel()] = math.exp(-power)
    return factors


def _block_traces(
    landscape: LossLandscape,
    layers: Sequence[nn.Module],
    operator: Operator,
    method: TraceMethod,
    num_products: int,
    seed: int,
) -> tuple[Tensor, Tensor, int]:
    """Return traces and standard errors of the blocks of weights and biases, shape (2, layers); and the products.

    Every tensor is probed by itself. A network that is linear in each of its layers has positive semi-definite blocks
    under the usual losses, so that no probe is negative; probing all blocks at once would not give that.
    """
    values = torch.zeros(2, len(layers), **_DOUBLE)
    errors, spent = torch.zeros_like(values), 0
    blocks = [(i, j, getattr(layer, name)) for j, layer in enumerate(layers) for i, name in enumerate(_TENSORS)]
    blocks = [(i, j, p) for i, j, p in blocks if p is not None and p.requires_grad]
    blocks.sort(key=lambda block: int(block[2].numel()))  # the large ones get the products that are left
    for done, (i, j, parameter) in enumerate(blocks):
        share = max(_LEAST_PRODUCTS, (num_products - spent) // (len(blocks) - done))
        result = stochastic_trace(
            block_product(landscape, parameter, operator),
            parameter.numel(),
            method=method,
            num_products=share,
            seed=seed + done,
            dtype=landscape.dtype,
            device=landscape.device,
        )
        factor = small_sample_factor(num_probes(method, share)) if parameter.numel() > share else 1.0
        values[i, j], errors[i, j] = result.value, factor * result.error
        spent += result.num_products
    return values, errors, spent


def _layers_in_order(landscape: LossLandscape) -> list[tuple[str, nn.Module]]:
    """Return the linear and convolutional layers with trainable weights, in the order in which they run."""
    trainable = {id(p): name for name, p in landscape.module.named_parameters() if p.requires_grad}
    layers = [
        (name, m)
        for name, m in landscape.module.named_modules()
        if isinstance(m, _LAYERS) and id(m.weight) in trainable
    ]
    held = {id(p) for _, layer in layers for p in layer.parameters(recurse=False)}
    if others := sorted(name for i, name in trainable.items() if i not in held):
        owner = others[0].rpartition(".")[0]
        what = type(landscape.module.get_submodule(owner)).__name__
        raise UndefinedMeasureError(
            f"Expected all trainable weights in linear and convolutional layers, got {others[0]!r} of a {what}: "
            "minimum sharpness is defined for chains of those. Measure HessianTrace(geometry='layer') instead."
        )
    calls: list[nn.Module] = []
    hooks = [layer.register_forward_pre_hook(lambda m, _: calls.append(m)) for _, layer in layers]
    try:
        landscape.loss()
    finally:
        for hook in hooks:
            hook.remove()
    order = {id(m): i for i, m in reversed(list(enumerate(calls)))}
    return sorted(layers, key=lambda named: order.get(id(named[1]), -1))


def _check_invariance(landscape: LossLandscape, layers: Sequence[nn.Module]) -> None:
    """Raise an error unless rescaling the layers by powers of two, of product one, leaves the loss alone."""
    exponents = [0.0] * len(layers)
    for i in range(len(layers) // 2):
        exponents[2 * i], exponents[2 * i + 1] = (4.0, -4.0) if i % 2 == 0 else (-4.0, 4.0)
    change = torch.zeros(landscape.num_parameters, dtype=landscape.dtype, device=landscape.device)
    running = 0.0
    for layer, exponent in zip(layers, exponents, strict=True):
        running += exponent
        for parameter, power in [(layer.weight, exponent), (layer.bias, running)]:
            if isinstance(parameter, Tensor) and parameter.requires_grad:
                start = offset_of(landscape, parameter)
                change[start : start + parameter.numel()] = (
                    (2**power - 1) * parameter.detach().to(change.dtype)
                ).flatten()
    before = float(landscape.loss())
    with landscape.displaced(change):
        try:
            after = float(landscape.loss())
        except ValueError:  # not finite
            after = math.inf
    if not abs(after - before) <= _INVARIANCE * abs(before):
        raise UndefinedMeasureError(
            f"Expected a chain of linear layers with positively homogeneous activations, got "
            f"{type(landscape.module).__name__}, whose loss moves from {before:.6g} to {after:.6g} when its layers are "
            "rescaled by factors of product one (a tanh, a sum of branches, a normalisation or a layer used twice does "
            "that). Measure HessianTrace(geometry='layer') instead."
        )

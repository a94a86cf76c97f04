"""Cross-entropy over a large vocabulary with its derivatives, in less memory than operators of torch keep.

Differentiated twice, ``cross_entropy`` keeps and makes about ten tensors as large as the logits, which for a vocabulary
of 50,000 words are larger than the rest of the graph. Here one tensor of their size is kept, and what the derivatives
make of it is made a few rows at a time.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

LEAST_CLASSES = 4096
"""Below, the logits are not what takes memory."""

_BLOCK = 2**20
_CALLERS = ("torch.utils.checkpoint", "torch._functorch")
"""Checkpoints repeat their part in the backward pass, outside of the mode; transforms take no plain functions."""

_SIGNATURE = inspect.signature(F.cross_entropy)


class CompactCrossEntropy(TorchFunctionMode):
    """Computes ``cross_entropy`` of logits of many classes by :class:`_SumOfLosses`; the value differs by rounding."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.cross_entropy:
            bound = _SIGNATURE.bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            if _is_taken(**bound.arguments) and not _is_called_by(_CALLERS):
                return _cross_entropy(**bound.arguments)
        return func(*args, **(kwargs or {}))


def is_own(node: Any) -> bool:
    """Return whether a node of a graph is one of the functions here, whose derivatives are known to be right."""
    return node.name() in ("_SumOfLossesBackward", "_SlopeBackward")


def _is_taken(input: Tensor, target: Tensor, reduction: str, label_smoothing: float, **others: Any) -> bool:
    is_plain = others["size_average"] is None and others["reduce"] is None and label_smoothing == 0
    has_classes = input.dim() == 2 and target.dim() == 1 and not target.is_floating_point() and len(input) > 0
    has_many = has_classes and input.shape[1] >= LEAST_CLASSES
    return has_many and is_plain and reduction in ("mean", "sum") and input.requires_grad


def _is_called_by(modules: tuple[str, ...]) -> bool:
    frame = inspect.currentframe()
    while frame is not None and not str(frame.f_globals.get("__name__")).startswith(modules):
        frame = frame.f_back
    return frame is not None


def _cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, **_: Any
) -> Tensor:
    counts = target != ignore_index
    classes = target.long().where(counts, 0)
    shares = counts.to(input.dtype) if weight is None else weight.to(input.dtype)[classes] * counts
    sum_of_losses: Any = _SumOfLosses.apply  # has no types
    total: Tensor = sum_of_losses(input, classes, shares.detach())
    if reduction == "sum":
        return total
    size = shares.sum().detach()
    is_empty = size == 0  # then the mean is not a number, with a slope of zero
    return (total / size.masked_fill(is_empty, 1)).masked_fill(is_empty, math.nan)


def _blocks(logits: Tensor) -> Iterator[slice]:
    size = max(1, _BLOCK // logits.shape[1])
    return (slice(first, first + size) for first in range(0, len(logits), size))


class _SumOfLosses(torch.autograd.Function):
    """``sum_n s_n (log sum_k exp f_nk - f_n,y_n)`` of logits ``f``, classes ``y`` and shares ``s``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor, shares: Tensor) -> Tensor:
        ctx.save_for_backward(logits, classes, shares)
        own = logits.gather(1, classes[:, None])[:, 0]
        norms = torch.cat([torch.logsumexp(logits[rows], dim=1) for rows in _blocks(logits)])
        return (shares * (norms - own)).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        slope: Any = _Slope.apply  # has no types
        return slope(*ctx.saved_tensors, *gradients), None, None


class _Slope(torch.autograd.Function):
    """The derivative of the sum in the logits, times ``g``: ``g s_n (p_nk - [k = y_n])``, ``p`` the probabilities.

    It has the probabilities in it, so that the logits need not be kept for its own derivative.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor, shares: Tensor, g: Tensor) -> Tensor:
        slope = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for rows in _blocks(logits):
            torch.softmax(logits[rows], dim=1, out=slope[rows])
        own = slope.gather(1, classes[:, None])
        slope.scatter_(1, classes[:, None], own - 1).mul_((g * shares)[:, None])
        ctx.has_slope = bool(g != 0)
        ctx.save_for_backward(slope if ctx.has_slope else logits, classes, shares, g, own)
        return slope

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, Tensor]:
        (u,) = gradients
        source, classes, shares, g, own = ctx.saved_tensors
        is_last = not torch.is_grad_enabled()  # else it is to be differentiated once more
        product = torch.empty_like(u, memory_format=torch.contiguous_format) if is_last else None
        factors = (g * shares)[:, None]
        inverse = torch.where(factors == 0, 0.0, 1 / torch.where(factors == 0, 1.0, factors))
        parts, along = [], []
        for rows in _blocks(source):
            y = classes[rows, None]
            if ctx.has_slope:
                p = source[rows] * inverse[rows]
                # One less than a small number has lost most of its digits.
                p = p.scatter(1, y, own[rows]) if is_last else p.scatter_add(1, y, torch.ones_like(own[rows]))
            else:
                p = torch.softmax(source[rows], dim=1)
            mean = (p * u[rows]).sum(dim=1, keepdim=True)
            bent = p * (u[rows] - mean) * factors[rows]
            if product is None:
                parts.append(bent)
            else:
                product[rows] = bent
            along.append(mean - u[rows].gather(1, y))
        change = (shares * torch.cat(along)[:, 0]).sum()
        return torch.cat(parts) if product is None else product, None, None, change

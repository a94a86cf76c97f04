"""Forward mode over reverse mode: ``H v`` as the derivative of the gradient along ``v``.

Neither engine is chosen by itself. In ``examples/benchmark_engines.py`` dual numbers cost no less than rebuilding the
graph, and what a linearised product saves over a kept graph is far less than its set-up. And forward mode can be wrong
without an error (``torch.func.jvp`` through BatchNorm in training mode, torch 2.13), so the first product of every
measurement is compared with autograd's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_flatness.engines.base import BatchedLoss, BatchEngine
from lightning_flatness.second_derivatives import NotTwiceDifferentiableError


class ForwardEngineError(NotTwiceDifferentiableError):
    """Forward mode cannot differentiate the gradient, or differentiates it wrongly."""


class ForwardOverReverse(BatchEngine):
    """Dual numbers through the forward and the backward pass: no graph of the gradient is ever built."""

    def name(self, loss: BatchedLoss) -> str:
        """Return ``"forward_over_reverse"``."""
        return "forward_over_reverse"

    def batch_product(self, loss: BatchedLoss, index: int, pieces: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the tangents of the gradient where the weights have the tangents ``v``."""
        try:
            with warnings.catch_warnings(), forward_ad.dual_level():
                warnings.filterwarnings("ignore", message=".torch.jit.script")  # torch's own use of it
                duals = [
                    forward_ad.make_dual(p.detach().requires_grad_(), piece.to(p.dtype))  # type: ignore[no-untyped-call]
                    for p, piece in zip(loss.parameters, pieces, strict=True)
                ]
                gradient = torch.autograd.grad(_loss_at(loss, index, duals), duals, allow_unused=True)
                tangents = [None if g is None else _tangent(g) for g in gradient]
        except Exception as error:  # if it is the user's own, autograd will meet it again
            raise ForwardEngineError(_first_line(error)) from error
        loss.cost.add_batch_gradient(index, loss.batch_sizes)
        return tangents


class Linearized(BatchEngine):
    """The gradient linearised once by ``torch.func.linearize``: products evaluate its linear part only.

    All linear parts are kept. Tracing them costs tens of gradients. What forward mode cannot do is an error
    there, but can end the process in a trace (``mse_loss``, torch 2.13): so it has to be tried before.
    """

    def name(self, loss: BatchedLoss) -> str:
        """Return ``"linearized"``."""
        return "linearized"

    def batch_product(self, loss: BatchedLoss, index: int, pieces: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the linear part of the gradient, at ``v``."""
        try:
            linear = None if loss.graphs is None else loss.graphs.get((Linearized, index))
            if linear is None:
                linear = _linearized(loss, index)
                loss.cost.add_batch_gradient(index, loss.batch_sizes)
                if loss.graphs is not None:
                    loss.graphs.offer((Linearized, index), linear, 0)
            return linear([piece.to(p.dtype) for p, piece in zip(loss.parameters, pieces, strict=True)])
        except Exception as error:
            raise ForwardEngineError(_first_line(error)) from error


def _tangent(dual: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(dual).tangent  # type: ignore[no-untyped-call]
    return tangent


def _linearized(loss: BatchedLoss, index: int) -> Callable[[list[Tensor]], list[Tensor]]:

    def gradient(weights: list[Tensor]) -> list[Tensor]:
        value = _loss_at(loss, index, weights)
        return list(torch.autograd.grad(value, weights, materialize_grads=True))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer about its own constants
        _, linear = torch.func.linearize(gradient, [p.detach().requires_grad_() for p in loss.parameters])
        with loss.forward_pass(index):  # the first call evaluates what is constant, random numbers among it
            linear([torch.zeros_like(p) for p in loss.parameters])
    return linear


def _loss_at(loss: BatchedLoss, index: int, values: Sequence[Tensor]) -> Tensor:
    """Return the loss of a batch with other tensors in the place of the weights."""
    holder = _Holder(loss.module, lambda: loss.batch_loss(index, allow_non_finite=True))  # a check would end a trace
    names = [name for name, p in holder.named_parameters() if p.requires_grad]
    value: Tensor = torch.func.functional_call(holder, dict(zip(names, values, strict=True)), ())
    return value


class _Holder(nn.Module):
    """A module whose output is the loss: ``functional_call`` takes modules."""

    def __init__(self, module: nn.Module, evaluate: Callable[[], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.evaluate = evaluate

    def forward(self) -> Tensor:
        return self.evaluate()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"

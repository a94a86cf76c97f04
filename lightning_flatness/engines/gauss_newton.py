"""Products with the Gauss-Newton matrix ``Jᵀ B J``, from the graphs of the outputs or by differences of the outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_flatness.batches import tensors_in
from lightning_flatness.engines.base import BatchedLoss, BatchEngine
from lightning_flatness.engines.finite_difference import length_scale
from lightning_flatness.gauss_newton import Linearization, OutputLoss, output_loss_of
from lightning_flatness.isolation import DifferentiableWeightNorm
from lightning_flatness.loss import check_loss
from lightning_flatness.second_derivatives import (
    counted_bytes,
    from_autograd,
    graph_nodes,
    has_custom_functions,
    second_derivative_error,
)

_PURPOSE = "the Gauss-Newton matrix, operator='ggn'"


class GaussNewton(BatchEngine):
    """``J v`` by differentiating ``u -> Jᵀ u``; the graphs of the outputs are kept where they have room."""

    def name(self, loss: BatchedLoss) -> str:
        """Return ``"gauss_newton"``."""
        return "gauss_newton"

    def batch_product(self, loss: BatchedLoss, index: int, pieces: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return ``J_bᵀ B_b J_b v``."""
        linearization: Linearization | None = None if loss.graphs is None else loss.graphs.get((GaussNewton, index))
        is_kept = linearization is not None
        if linearization is None:
            linearization, num_bytes = _linearized_batch(loss, index)
            is_kept = loss.graphs is not None and loss.graphs.offer((GaussNewton, index), linearization, num_bytes)
        try:
            return linearization.product(pieces, keep=is_kept)
        except RuntimeError as error:
            raise from_autograd(error) from error


class NumericGaussNewton(BatchEngine):
    """``J v`` as a central difference of the outputs; ``Jᵀ`` and ``B`` need no second derivative of them.

    A difference with twice the step tells the error.
    """

    def name(self, loss: BatchedLoss) -> str:
        """Return ``"finite_difference"``."""
        return "finite_difference"

    def product(self, loss: BatchedLoss, v: Tensor) -> Tensor:
        """Return ``Jᵀ B J v``; zero for a zero vector."""
        return super().product(loss, v) if v.any() else torch.zeros_like(v)

    def batch_product(self, loss: BatchedLoss, index: int, pieces: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return ``J_bᵀ B_b (f_b(w + h v) - f_b(w - h v)) / 2h``."""
        output_loss = output_loss_of(loss, _PURPOSE)
        v = torch.cat([piece.reshape(-1) for piece in pieces])
        eps = max(torch.finfo(p.dtype).eps for p in loss.parameters)
        step = eps ** (1 / 3) * length_scale(loss.parameters, pieces)
        jv, coarse = (_difference_of_outputs(loss, output_loss, index, v, factor * step) for factor in (1, 2))
        distance, norm = _norm(_minus(coarse, jv)), _norm(jv)
        loss.product_error = max(loss.product_error, distance / norm if norm > 0 else 0.0)
        with loss.forward_pass(index):
            linearization = Linearization(output_loss, loss.module, loss.fresh_batch(index), loss.parameters)
        used = [t for t, is_used in zip(jv, linearization.is_used, strict=True) if is_used]
        return linearization.product_from(used, keep=False)


def _linearized_batch(loss: BatchedLoss, index: int) -> tuple[Linearization, int]:
    """Return the outputs of a batch with their graph, and the bytes that it holds."""
    output_loss = output_loss_of(loss, _PURPOSE)
    with counted_bytes(loss.parameters) as storages:
        with loss.forward_pass(index), DifferentiableWeightNorm():
            linearization = Linearization(output_loss, loss.module, loss.fresh_batch(index), loss.parameters)
        check_loss(linearization.loss)
        try:
            linearization.pulled_back()
        except RuntimeError as error:
            raise from_autograd(error) from error
    if has_custom_functions(graph_nodes(linearization.outputs)) and not linearization.is_adjoint():
        raise second_derivative_error("a torch.autograd.Function whose backward is not differentiable.")
    loss.cost.add_batch_gradient(index, loss.batch_sizes)
    return linearization, sum(storages.values())


def _difference_of_outputs(
    loss: BatchedLoss, output_loss: OutputLoss, index: int, v: Tensor, step: float
) -> list[Tensor]:
    """Return ``(f(w + step v) - f(w - step v)) / (2 step)``."""
    sides = []
    for sign in (1, -1):
        with loss.displaced(v, sign * step), torch.no_grad(), loss.forward_pass(index):
            outputs = output_loss.outputs(loss.module, loss.fresh_batch(index))
        sides.append([t.clone() for t in tensors_in(outputs)])
    return [t / (2 * step) for t in _minus(*sides)]


def _minus(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    return [a - b for a, b in zip(left, right, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t)) for t in tensors))

"""Products with the Gauss-Newton matrix ``Jᵀ B J``, from the graphs of the outputs or by differences of the outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_flatness.landscape.batched_loss import BatchedLoss
from lightning_flatness.landscape.engines.base import BatchEngine, Engine
from lightning_flatness.landscape.engines.finite_difference import length_scale
from lightning_flatness.landscape.engines.second_derivatives import (
    counted_bytes,
    from_autograd,
    has_custom_functions,
    second_derivative_error,
)
from lightning_flatness.landscape.output_loss import Linearization, output_loss_of
from lightning_flatness.module.batches import tensors_in
from lightning_flatness.module.kernels import DifferentiableWeightNorm
from lightning_flatness.module.loss import check_loss, graph_nodes

_PURPOSE = "the Gauss-Newton matrix, operator='ggn'"


class GaussNewton(BatchEngine):
    """``J v`` by differentiating ``u -> Jᵀ u``; the graphs of the outputs are kept where they have room."""

    def name(self, loss: BatchedLoss) -> str:
        """Return ``"gauss_newton"``."""
        return "gauss_newton"

    def graph(self, loss: BatchedLoss, index: int) -> tuple[Linearization, bool]:
        """Return the outputs of a batch with their graph."""
        key, graphs = (GaussNewton, index), loss.point.graphs
        kept: Linearization | None = graphs.get(key)
        if kept is not None:
            return kept, True
        with counted_bytes(loss.parameters) as storages:
            with DifferentiableWeightNorm():
                linearization = _linearized(loss, index)
            check_loss(linearization.loss)
            try:
                linearization.pulled_back()
            except RuntimeError as error:
                raise from_autograd(error) from error
        if has_custom_functions(graph_nodes(linearization.outputs)) and not linearization.is_adjoint():
            raise second_derivative_error("a torch.autograd.Function whose backward is not differentiable.")
        loss.cost.add_batch_gradient(index, loss.samples.sizes)
        return linearization, graphs.offer(key, linearization, sum(storages.values()))

    def multiply(
        self, loss: BatchedLoss, graph: Linearization, pieces: Sequence[Tensor], is_kept: bool
    ) -> Sequence[Tensor | None]:
        """Return ``J_bᵀ B_b J_b v``."""
        try:
            return graph.product(pieces, keep=is_kept)
        except RuntimeError as error:
            raise from_autograd(error) from error


class NumericGaussNewton(Engine):
    """``J v`` as a central difference of the outputs; ``Jᵀ`` and ``B`` need no second derivative of them.

    The disagreement with a difference of twice the step is the reported error.
    """

    def name(self, loss: BatchedLoss) -> str:
        """Return ``"finite_difference"``."""
        return "finite_difference"

    def product(self, loss: BatchedLoss, v: Tensor) -> Tensor:
        """Return the sum of ``J_bᵀ B_b (f_b(w + h v) - f_b(w - h v)) / 2h``; zero for a zero vector."""
        if not v.any():
            return torch.zeros_like(v)
        eps = max(torch.finfo(p.dtype).eps for p in loss.parameters)
        step = eps ** (1 / 3) * length_scale(loss, v)
        with loss.summed_vector() as product:
            views = loss.unflatten(product)
            for index in loss.indices:
                jv, coarse = (_difference_of_outputs(loss, index, v, factor * step) for factor in (1, 2))
                distance, norm = _norm(_minus(coarse, jv)), _norm(jv)
                error = distance / norm if norm > 0 else 0.0
                loss.operators.product_error = max(loss.operators.product_error, error)
                linearization = _linearized(loss, index)
                used = [t for t, is_used in zip(jv, linearization.is_used, strict=True) if is_used]
                loss.add(views, index, linearization.product_from(used, keep=False))
        loss.cost.add_product()
        return product


def _linearized(loss: BatchedLoss, index: int) -> Linearization:
    output_loss = output_loss_of(loss, _PURPOSE)
    with loss.measured.forward_pass(index):
        return Linearization(output_loss, loss.module, loss.samples.fresh(index), loss.parameters)


def _difference_of_outputs(loss: BatchedLoss, index: int, v: Tensor, step: float) -> list[Tensor]:
    """Return ``(f(w + step v) - f(w - step v)) / (2 step)``."""
    output_loss, sides = output_loss_of(loss, _PURPOSE), []
    for sign in (1, -1):
        with loss.displaced(v, sign * step), torch.no_grad(), loss.measured.forward_pass(index):
            outputs = output_loss.outputs(loss.module, loss.samples.fresh(index))
        sides.append([t.clone() for t in tensors_in(outputs)])
    return [t / (2 * step) for t in _minus(*sides)]


def _minus(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    return [a - b for a, b in zip(left, right, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t)) for t in tensors))

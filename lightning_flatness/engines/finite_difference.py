"""Central differences of the gradient, for losses that have no second derivative."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_flatness.engines.base import BatchedLoss, Engine


class FiniteDifference(Engine):
    """Central differences of the gradient; the step is chosen once, and its error kept in ``product_error``."""

    def __init__(self) -> None:
        self._step: float | None = None

    def name(self, loss: BatchedLoss) -> str:
        """Return ``"finite_difference"``."""
        return "finite_difference"

    def product(self, loss: BatchedLoss, v: Tensor) -> Tensor:
        """Return ``‖v‖ (g(w + h u) - g(w - h u)) / 2h`` with ``u = v / ‖v‖``."""
        norm = float(torch.linalg.vector_norm(v))
        if norm == 0:
            return torch.zeros_like(v)
        if self._step is None:
            self._step = _chosen_step(loss, v / norm)
        product = norm * _central_difference(loss, v / norm, self._step)
        loss.cost.num_products += 1
        return product


def _central_difference(loss: BatchedLoss, direction: Tensor, step: float) -> Tensor:
    with loss.displaced(direction, step):
        forward = loss.gradient()
    with loss.displaced(direction, -step):
        backward = loss.gradient()
    return forward.sub_(backward).div_(2 * step)


def _chosen_step(loss: BatchedLoss, direction: Tensor) -> float:
    """Shrink the step as long as that changes the result less each time; keep the change as the error.

    Truncation shrinks with the square of the step and rounding grows with its inverse, so the change
    between neighbouring steps has its minimum where the two balance.
    """
    weights = math.hypot(*(float(torch.linalg.vector_norm(p.detach())) for p in loss.parameters))
    step: float = torch.finfo(direction.dtype).eps ** (1 / 4) * (1 + weights)
    previous = _central_difference(loss, direction, step)
    best = math.inf
    for _ in range(12):
        current = _central_difference(loss, direction, step / 4)
        change = float(torch.linalg.vector_norm(current - previous))
        if change >= best:
            break
        scale = float(torch.linalg.vector_norm(current))
        best, step, previous = change, step / 4, current
        loss.product_error = change / scale if scale > 0 else 0.0
    return step

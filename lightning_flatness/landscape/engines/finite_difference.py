"""Central differences of the gradient, for losses that have no second derivative, with an error to trust.

``H u ~ (g(w + h u) - g(w - h u)) / 2h``. One part of the error grows with ``h²`` (the third derivative), one vanishes
only where the step crosses no kink of a ReLU unit, and one grows with ``1/h`` (the rounding of the gradient and of
``w + h u``). Where they balance depends on the loss, so several steps are tried. The disagreement between neighbouring
steps is the reported error.

The step is relative to the norms of the tensors it changes: a direction within a small tensor gets a small step. Its
relative size is found once, used for all directions, and checked on the first, second, fourth, eighth ... product of
every measurement.

A fourth-order formula takes four gradients instead of two and gains nothing where rounding or kinks limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_flatness.landscape.batched_loss import BatchedLoss
from lightning_flatness.landscape.engines.base import Engine

_RATIO = 4.0
_MAX_RELATIVE_STEP = 1.0
_MIN_STEP_IN_EPS = 64
_POOR = 0.05
"""If neighbouring steps disagree by more, all steps are tried."""

_MUCH_WORSE = 4.0
"""If a check finds so many times the expected error, a new step is chosen."""


class FiniteDifference(Engine):
    """Central differences of the gradient: two gradients per product, and about ten once to find the step."""

    def __init__(self) -> None:
        self._relative_step: float | None = None
        self._relative_error = 0.0  # where the step was chosen
        self._error = 0.0  # of products with unit vectors, the largest found in this measurement
        self._largest = 0.0  # norm of such a product

    def name(self, loss: BatchedLoss) -> str:
        """Return ``"finite_difference"``."""
        return "finite_difference"

    def product(self, loss: BatchedLoss, v: Tensor) -> Tensor:
        """Return ``‖v‖ (g(w + h u) - g(w - h u)) / 2h`` with ``u = v / ‖v‖``.

        ``loss.operators.product_error`` becomes the largest error found over the largest product found, an error in
        units of the norm of ``H``.
        """
        norm = loss.norm(v)
        if norm == 0:
            return torch.zeros_like(v)
        length = length_scale(loss, v)
        loss.point.num_differences += 1
        number = loss.point.num_differences
        if self._relative_step is None:
            product = self._with_new_step(loss, v, length)
            self._error = self._relative_error * loss.norm(product) / norm
        else:
            product = _central_difference(loss, v, self._relative_step * length)
            if number == 1:  # other weights
                self._error, self._largest = self._relative_error * loss.norm(product) / norm, 0.0
            if number & (number - 1) == 0:
                product = self._checked(loss, v, length, product)
        self._largest = max(self._largest, loss.norm(product) / norm)
        loss.operators.product_error = self._error / self._largest if self._largest > 0 else 0.0
        loss.cost.num_products += 1
        return product

    def _checked(self, loss: BatchedLoss, v: Tensor, length: float, product: Tensor) -> Tensor:
        """Return a product compared with one of twice the step; a better one if they differ by much."""
        assert self._relative_step is not None
        norm = loss.norm(v)
        error = loss.norm(_central_difference(loss, v, 2 * self._relative_step * length).sub_(product)) / norm
        if error > _MUCH_WORSE * self._error:
            product = self._with_new_step(loss, v, length)
            error = self._relative_error * loss.norm(product) / norm
        self._error = max(self._error, error)
        return product

    def _with_new_step(self, loss: BatchedLoss, v: Tensor, length: float) -> Tensor:
        """Choose the step between the two neighbouring ones that agree best; return the product it gives."""
        eps = max(torch.finfo(p.dtype).eps for p in loss.parameters)
        start = min(eps ** (1 / 3), _MAX_RELATIVE_STEP / _RATIO)
        difference = _central_difference(loss, v, length * start)
        down, up = (_walk(loss, v, length, difference, start, factor) for factor in (1 / _RATIO, _RATIO))
        del difference
        (best, walk) = min((next(down), down), (next(up), up), key=lambda found: found[0][0])
        for found in walk:
            if found[0] >= best[0]:
                break
            best = found
        for walk in (down, up):
            if best[0] > _POOR:
                rest = [found for found in walk if found[0] > 0]
                # Three steps in a row have to agree: of many pairs of mere noise two may do so by chance.
                best = min([best, *((max(a[0], b[0]), a[1]) for a, b in pairwise(rest))])
        self._relative_error, self._relative_step = best
        return _central_difference(loss, v, length * self._relative_step)


def _walk(
    loss: BatchedLoss, v: Tensor, length: float, difference: Tensor, step: float, factor: float
) -> Iterator[tuple[float, float]]:
    """Yield the disagreement of neighbouring steps and the step between them, from ``step`` outwards."""
    smallest = _MIN_STEP_IN_EPS * torch.finfo(v.dtype).eps
    while smallest <= step * factor <= _MAX_RELATIVE_STEP:
        following = _central_difference(loss, v, length * step * factor)
        finer = following if factor < 1 else difference
        distance, norm = loss.norm(following - difference), loss.norm(finer)
        yield (distance / norm if norm > 0 else 0.0 if distance == 0 else float("inf")), step * factor**0.5
        difference, step = following, step * factor


def length_scale(loss: BatchedLoss, v: Tensor) -> float:
    """Return the ``h`` for which ``h v`` is as large as the weights, each tensor compared with its own norm."""
    weights = loss.vectors.norms([p.detach().to(v.dtype) for p in loss.parameters])
    return relative_length(weights, loss.vectors.norms(loss.unflatten(v)), loss.parameter_sizes)


def relative_length(weights: Tensor, changes: Tensor, num_entries: Sequence[int]) -> float:
    """Return ``1 / sqrt(sum_l ‖v_l‖² / ‖w_l‖²)``, given the norms of tensors and of their changes.

    A tensor of zeros counts as one of entries of the usual size, which is one if all weights are zero.
    """
    sizes = torch.tensor(num_entries, dtype=weights.dtype, device=weights.device)
    usual = torch.linalg.vector_norm(weights) / sizes.sum().sqrt()
    usual = torch.where(usual > 0, usual, torch.ones_like(usual))
    lengths = torch.where(weights > 0, weights, usual * sizes.sqrt())
    return 1 / float(torch.linalg.vector_norm(changes / lengths))


def _central_difference(loss: BatchedLoss, v: Tensor, step: float) -> Tensor:
    """Return ``(g(w + step v) - g(w - step v)) / (2 step)``."""
    with loss.displaced(v, step):
        forward = loss.gradient()
    with loss.displaced(v, -step):
        backward = loss.gradient()
    return forward.sub_(backward).div_(2 * step)

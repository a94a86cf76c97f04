"""Differentiating twice by autograd: the gradient with its graph, kept between products or rebuilt in each.

``H v`` is the derivative of ``<g(w), v>``: backward through the gradient's own graph, which costs two gradients. The
graph costs one more to build, and memory; how many of them are kept is the business of the :class:`GraphStore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_flatness.engines.base import BatchedLoss, BatchEngine
from lightning_flatness.second_derivatives import counted_bytes, from_autograd


@dataclass
class GradientGraph:
    """The gradient of one batch's loss with its graph, ready to be differentiated again."""

    gradient: tuple[Tensor | None, ...]
    num_bytes: int


class Autograd(BatchEngine):
    """Reverse mode over reverse mode: ``"kept"`` where the graphs have room, ``"rebuilt"`` where not."""

    def name(self, loss: BatchedLoss) -> str:
        """Return which graphs are kept: all, none, or some."""
        num_kept = sum(kept_gradient(loss, index) is not None for index in range(len(loss.batch_sizes)))
        if num_kept == len(loss.batch_sizes):
            return "kept"
        return "kept+rebuilt" if num_kept else "rebuilt"

    def batch_product(self, loss: BatchedLoss, index: int, pieces: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the derivative of ``<g_b(w), v>``."""
        graph = None if loss.graphs is None else loss.graphs.get((Autograd, index))
        is_kept = graph is not None
        if graph is None:
            graph = _differentiated_batch(loss, index)
            is_kept = loss.graphs is not None and loss.graphs.offer((Autograd, index), graph, graph.num_bytes)
        active = [(g, v) for g, v in zip(graph.gradient, pieces, strict=True) if g is not None and g.requires_grad]
        if not active:  # the loss is linear in the weights
            return [None] * len(pieces)
        outputs, directions = zip(*active, strict=True)
        try:
            return torch.autograd.grad(outputs, loss.parameters, directions, retain_graph=is_kept, allow_unused=True)
        except RuntimeError as error:
            raise from_autograd(error) from error


def kept_gradient(loss: BatchedLoss, index: int) -> tuple[Tensor | None, ...] | None:
    """Return the gradient of a batch that a product of this measurement has left behind, if one has."""
    graph: GradientGraph | None = None if loss.graphs is None else loss.graphs.get((Autograd, index))
    return None if graph is None else graph.gradient


def _differentiated_batch(loss: BatchedLoss, index: int) -> GradientGraph:
    with counted_bytes() as storages:
        value = loss.batch_loss(index)
        if loss.operators.must_rewrite(value):
            value = loss.batch_loss(index)
        try:
            gradient = torch.autograd.grad(value, loss.parameters, create_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise from_autograd(error) from error
    loss.cost.add_batch_gradient(index, loss.batch_sizes)
    return GradientGraph(gradient, sum(storages.values()))

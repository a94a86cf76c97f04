"""Differentiating twice by autograd: the gradient with its graph, kept between products or rebuilt in each.

``H v`` is the derivative of ``<g(w), v>``: backward through the gradient's own graph, which costs two gradients. The
graph costs one more to build, and memory; how many of them are kept is the business of the :class:`GraphStore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_flatness.engines.base import BatchedLoss, BatchEngine
from lightning_flatness.second_derivatives import counted_bytes, from_autograd


@dataclass
class GradientGraph:
    """The graph of the gradient of one batch's loss, without the gradient itself.

    Attributes:
        edges: Where the graph of each parameter's gradient starts; None where that does not depend on the weights.
        num_bytes: What the graph holds, beside the weights.
    """

    edges: list[GradientEdge | None]
    num_bytes: int


class Autograd(BatchEngine):
    """Reverse mode over reverse mode: ``"kept"`` where the graphs have room, ``"rebuilt"`` where not."""

    def name(self, loss: BatchedLoss) -> str:
        """Return which graphs are kept: all, none, or some."""
        indices = range(len(loss.batch_sizes))
        num_kept = 0 if loss.graphs is None else sum(loss.graphs.get((Autograd, i)) is not None for i in indices)
        if num_kept == len(indices):
            return "kept"
        return "kept+rebuilt" if num_kept else "rebuilt"

    def batch_product(self, loss: BatchedLoss, index: int, pieces: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the derivative of ``<g_b(w), v>``."""
        key = (Autograd, index)
        graph: GradientGraph | None = None if loss.graphs is None else loss.graphs.get(key)
        is_kept = graph is not None
        if graph is None:
            may_fit = loss.graphs is not None and loss.graphs.may_fit(key)
            graph = _differentiated_batch(loss, index, is_measured=may_fit)
            is_kept = may_fit and loss.graphs is not None and loss.graphs.offer(key, graph, graph.num_bytes)
        active = [(edge, v) for edge, v in zip(graph.edges, pieces, strict=True) if edge is not None]
        if not active:  # the loss is linear in the weights
            return [None] * len(pieces)
        outputs, directions = zip(*active, strict=True)
        try:
            return torch.autograd.grad(outputs, loss.parameters, directions, retain_graph=is_kept, allow_unused=True)
        except RuntimeError as error:
            raise from_autograd(error) from error


def keep_graph(loss: BatchedLoss, index: int) -> None:
    """Build the graph of a batch for the products to come, if there is room, and leave its gradient to the loss."""
    key = (Autograd, index)
    if loss.graphs is not None and loss.graphs.get(key) is None and loss.graphs.may_fit(key):
        graph = _differentiated_batch(loss, index, is_measured=True)
        loss.graphs.offer(key, graph, graph.num_bytes)


def _differentiated_batch(loss: BatchedLoss, index: int, *, is_measured: bool) -> GradientGraph:
    no_count: dict[int, int] = {}
    with counted_bytes(loss.parameters) if is_measured else nullcontext(no_count) as storages:
        value = loss.batch_loss(index)
        if loss.operators.must_rewrite(value):
            value = loss.batch_loss(index)
        try:
            gradient = torch.autograd.grad(value, loss.parameters, create_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise from_autograd(error) from error
    loss.cost.add_batch_gradient(index, loss.batch_sizes)
    loss.leave_gradient(index, gradient)
    edges = [get_gradient_edge(g) if g is not None and g.requires_grad else None for g in gradient]
    return GradientGraph(edges, sum(storages.values()))

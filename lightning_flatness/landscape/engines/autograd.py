"""Differentiating twice by autograd: the gradient with its graph, kept between products or rebuilt in each.

``H v`` is the derivative of ``<g(w), v>``: backward through the gradient's own graph, which costs two gradients. The
graph costs one more to build, and memory; the :class:`GraphStore` decides how many are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_flatness.landscape.batched_loss import BatchedLoss
from lightning_flatness.landscape.engines.base import BatchEngine
from lightning_flatness.landscape.engines.second_derivatives import from_autograd


@dataclass
class GradientGraph:
    """The graph of the gradient of one batch's loss, without the gradient itself.

    Attributes:
        edges: Where the graph of each parameter's gradient starts; None where that does not depend on the weights.
        num_bytes: Memory of the graph, beside the weights.
    """

    edges: list[GradientEdge | None]
    num_bytes: int


class Autograd(BatchEngine):
    """Reverse mode over reverse mode: ``"kept"`` where the graphs have room, ``"rebuilt"`` where not."""

    def name(self, loss: BatchedLoss) -> str:
        """Return which graphs are kept: all, none, or some."""
        num_kept = sum(loss.point.graphs.get((Autograd, i)) is not None for i in loss.indices)
        if num_kept == len(loss.indices):
            return "kept"
        return "kept+rebuilt" if num_kept else "rebuilt"

    def graph(self, loss: BatchedLoss, index: int) -> tuple[GradientGraph, bool]:
        """Return the graph of a batch's gradient; the gradient of a graph that is built is left to the loss."""
        key, graphs = (Autograd, index), loss.point.graphs
        kept: GradientGraph | None = graphs.get(key)
        if kept is not None:
            return kept, True
        may_fit = graphs.may_fit(key)
        with loss.recorded(is_counted=may_fit) as storages:
            value = loss.objective(index)
            if loss.operators.must_rewrite(value):
                value = loss.objective(index)
            try:
                gradient = torch.autograd.grad(value, loss.parameters, create_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise from_autograd(error) from error
        loss.cost.add_batch_gradient(index, loss.samples.sizes)
        loss.leave_gradient(index, gradient)
        edges = [get_gradient_edge(g) if g is not None and g.requires_grad else None for g in gradient]
        graph = GradientGraph(edges, loss.agreed_bytes(storages))
        return graph, may_fit and graphs.offer(key, graph, graph.num_bytes)

    def multiply(
        self, loss: BatchedLoss, graph: GradientGraph, pieces: Sequence[Tensor], is_kept: bool
    ) -> Sequence[Tensor | None]:
        """Return the derivative of ``<g_b(w), v>``."""
        active = [(edge, v) for edge, v in zip(graph.edges, pieces, strict=True) if edge is not None]
        if not active:  # the loss is linear in the weights
            return [None] * len(pieces)
        outputs, directions = zip(*active, strict=True)
        try:
            return torch.autograd.grad(outputs, loss.parameters, directions, retain_graph=is_kept, allow_unused=True)
        except RuntimeError as error:
            raise from_autograd(error) from error

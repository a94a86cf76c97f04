"""An engine: a way to multiply a matrix of second derivatives of a loss with a vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_flatness.landscape.batched_loss import BatchedLoss


class Engine(ABC):
    """Multiplies a matrix of second derivatives of a loss with a vector."""

    @abstractmethod
    def product(self, loss: BatchedLoss, v: Tensor) -> Tensor:
        """Return the product, a flat vector like ``v``, the same on all ranks; count what it cost.

        Raises:
            NotTwiceDifferentiableError: If this engine cannot differentiate the loss twice.
        """

    @abstractmethod
    def name(self, loss: BatchedLoss) -> str:
        """Return the name to report, which can depend on what fitted into memory."""


class BatchEngine(Engine):
    """An engine that multiplies batch by batch, with a graph that it makes for each."""

    def product(self, loss: BatchedLoss, v: Tensor) -> Tensor:
        """Return the product for about two gradients, and one more for each graph that was built."""
        pieces = loss.unflatten(v)
        with loss.summed_vector() as product:
            views = loss.unflatten(product)
            for index in loss.indices:
                graph, is_kept = self.graph(loss, index)
                loss.add(views, index, self.multiply(loss, graph, pieces, is_kept))
        loss.cost.add_product()
        return product

    @abstractmethod
    def graph(self, loss: BatchedLoss, index: int) -> tuple[Any, bool]:
        """Return what :meth:`multiply` needs of a batch, and whether it is kept for the next product."""

    @abstractmethod
    def multiply(
        self, loss: BatchedLoss, graph: Any, pieces: Sequence[Tensor], is_kept: bool
    ) -> Sequence[Tensor | None]:
        """Return the product of a batch, from its :meth:`graph`, a piece per parameter; None stands for zeros."""

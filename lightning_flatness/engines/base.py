"""What an engine is: a way to multiply the Hessian of a loss with a vector; and what it asks of the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, get_args

from torch import Tensor, nn

from lightning_flatness.cost import Cost
from lightning_flatness.engines.graphs import GraphStore
from lightning_flatness.loss import LossFunction
from lightning_flatness.second_derivatives import Operators

EngineName = Literal[
    "auto", "exact", "kept", "rebuilt", "forward_over_reverse", "linearized", "finite_difference"
]  # fmt: skip
"""How Hessian-vector products are made; see :class:`LossLandscape`."""


def check_engine(engine: Any) -> None:
    """Raise an error unless ``engine`` is the name of an engine.

    Raises:
        ValueError: If it is not.
    """
    if engine not in get_args(EngineName):
        names = ", ".join(repr(name) for name in get_args(EngineName))
        raise ValueError(f"Expected `engine` to be one of {names}, got {engine!r}.")


class BatchedLoss(Protocol):
    """The loss of a module on batches, at its weights: what an engine asks of a landscape."""

    module: nn.Module
    loss_fn: LossFunction
    parameters: list[Tensor]
    num_parameters: int
    batch_sizes: list[int]
    cost: Cost
    product_error: float
    operators: Operators
    graphs: GraphStore | None
    """Where graphs may be left for the next product; None at displaced weights."""

    def batch_loss(self, index: int, *, allow_non_finite: bool = False) -> Tensor:
        """Return the loss of a batch with its graph."""

    def fresh_batch(self, index: int) -> Any:
        """Return a copy of a batch."""

    def forward_pass(self, index: int) -> AbstractContextManager[None]:
        """Guard one evaluation of the module on a batch."""

    def mean_over_samples(self, local: Callable[[int], Sequence[Tensor | None]], size: int) -> Tensor:
        """Return the mean over all samples, on all ranks, of what ``local`` returns for a batch."""

    def gradient(self) -> Tensor:
        """Return the gradient of the mean loss."""

    def leave_gradient(self, index: int, pieces: Sequence[Tensor | None]) -> None:
        """Take the gradient of a batch, which is a by-product of a Hessian-vector product."""

    def displaced(self, displacement: Tensor, scale: float = 1.0) -> AbstractContextManager[None]:
        """Evaluate at ``w + scale · displacement`` inside."""

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Return views of a flat vector in the shapes of the parameters."""


class Engine(ABC):
    """Multiplies the Hessian of a loss with a vector."""

    @abstractmethod
    def product(self, loss: BatchedLoss, v: Tensor) -> Tensor:
        """Return ``H v``, a flat vector like ``v``, the same on all ranks; count what it cost.

        Args:
            loss: The loss, inside of one of its measurements.
            v: Shape (num_parameters,).

        Raises:
            NotTwiceDifferentiableError: If this engine cannot differentiate the loss twice.
        """

    @abstractmethod
    def name(self, loss: BatchedLoss) -> str:
        """Return what the engine is called, given what it could do in this measurement."""


class BatchEngine(Engine):
    """An engine that multiplies the Hessian of one batch after the other."""

    def product(self, loss: BatchedLoss, v: Tensor) -> Tensor:
        """Return ``H v`` for about two gradients, and one more for each graph that had to be built."""
        pieces = loss.unflatten(v)
        product = loss.mean_over_samples(lambda index: self.batch_product(loss, index, pieces), loss.num_parameters)
        loss.cost.add_product()
        return product

    @abstractmethod
    def batch_product(self, loss: BatchedLoss, index: int, pieces: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the product of a batch, a piece per parameter; None stands for zeros.

        Args:
            loss: The loss.
            index: Which of this rank's batches.
            pieces: The vector, a piece per parameter.
        """

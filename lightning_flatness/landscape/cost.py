"""The cost of evaluations, in gradients of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Cost:
    """The cost of evaluations on all samples.

    Attributes:
        num_products: Hessian-vector products.
        gradient_evaluations: Everything, in gradients: a loss counts one third, a Hessian-vector product two,
            and one more where its graph had to be built.
    """

    num_products: int = 0
    gradient_evaluations: float = 0.0

    def add_product(self) -> None:
        """Count one product of a matrix of second derivatives with a vector."""
        self.num_products += 1
        self.gradient_evaluations += 2

    def add_batch_gradient(self, index: int, batch_sizes: Sequence[int]) -> None:
        """Count the gradient of one batch as its share of all of this rank's."""
        self.gradient_evaluations += batch_sizes[index] / max(1, sum(batch_sizes))

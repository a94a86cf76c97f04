"""Which engine makes the products: the one that was asked for, unless it cannot, or its products are wrong."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lightning_flatness.engines.autograd import Autograd
from lightning_flatness.engines.base import BatchedLoss, Engine, EngineName
from lightning_flatness.engines.finite_difference import FiniteDifference
from lightning_flatness.engines.gauss_newton import GaussNewton, NumericGaussNewton
from lightning_flatness.second_derivatives import NotTwiceDifferentiableError, second_derivative_error

_VERIFICATION_TOLERANCE = 0.05


class Products:
    """Makes products with the Hessian and the Gauss-Newton matrix.

    Args:
        engine: What was asked for.
    """

    def __init__(self, engine: EngineName) -> None:
        self.asked = engine
        self._engine: Engine = FiniteDifference() if engine == "finite_difference" else Autograd()
        self.engine: str = engine
        """The engine that made the last product; before the first one what was asked for."""

    def budget(self, graph_memory: float) -> float:
        """Return the bytes of graphs that a measurement may keep."""
        return {"kept": float("inf"), "rebuilt": 0.0}.get(self.asked, graph_memory)

    def fresh(self) -> Products:
        """Return the same choice for another loss of the module, which wants another step of finite differences."""
        return Products("finite_difference" if isinstance(self._engine, FiniteDifference) else self.asked)

    def hessian(self, loss: BatchedLoss, v: Tensor) -> Tensor:
        """Return ``H v``."""
        while True:
            try:
                product = self._engine.product(loss, v)
                self._verify(loss, v, product)
            except NotTwiceDifferentiableError as error:
                self._fall_back(error)
            else:
                self.engine = self._engine.name(loss)
                return product

    def gauss_newton(self, loss: BatchedLoss, v: Tensor) -> Tensor:
        """Return ``Jᵀ B J v``."""
        if not isinstance(self._engine, FiniteDifference):
            try:
                return GaussNewton().product(loss, v)
            except NotTwiceDifferentiableError as error:
                self._fall_back(error)
        return NumericGaussNewton().product(loss, v)

    def _verify(self, loss: BatchedLoss, v: Tensor, product: Tensor) -> None:
        """Compare the first product with finite differences if the module uses ``torch.autograd.Function``."""
        if isinstance(self._engine, FiniteDifference):
            return
        if loss.operators.is_verified or not loss.operators.has_custom_functions:
            return
        loss.operators.is_verified = True
        numeric = FiniteDifference().product(loss, v)
        error, loss.product_error = loss.product_error, 0.0
        difference = torch.linalg.vector_norm(product - numeric)
        if difference > max(_VERIFICATION_TOLERANCE, 5 * error) * torch.linalg.vector_norm(numeric):
            loss.product_error = error
            raise second_derivative_error("a torch.autograd.Function whose backward is not differentiable.")

    def _fall_back(self, error: NotTwiceDifferentiableError) -> None:
        if self.asked != "auto":
            raise error
        self._engine = FiniteDifference()
        self.engine = "finite_difference"
        warnings.warn(
            f"{error} Using central finite differences of the gradient instead; their estimated error is added to "
            "the reported one. Pass engine='finite_difference' to choose them without this warning.",
            stacklevel=5,
        )

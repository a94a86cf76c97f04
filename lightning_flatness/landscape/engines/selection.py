"""Selection of the engine: the one that was asked for, unless it cannot differentiate or its products are wrong.

``"auto"`` never times anything: engines round differently, so a choice by the clock would make two identical runs
differ. Where memory allows, keeping the graph was the fastest way, or nearly so, wherever it was measured.
"""

from __future__ import annotations

import warnings
from contextlib import suppress

from torch import Tensor

from lightning_flatness.landscape.batched_loss import BatchedLoss
from lightning_flatness.landscape.engines.autograd import Autograd
from lightning_flatness.landscape.engines.base import Engine
from lightning_flatness.landscape.engines.finite_difference import FiniteDifference
from lightning_flatness.landscape.engines.gauss_newton import GaussNewton, NumericGaussNewton
from lightning_flatness.landscape.engines.second_derivatives import NotTwiceDifferentiableError, second_derivative_error
from lightning_flatness.landscape.options import EngineName

_CUSTOM_FUNCTION_TOLERANCE = 0.05


class Products:
    """Products with the Hessian and the Gauss-Newton matrix, by the engine that was asked for."""

    def __init__(self, asked: EngineName) -> None:
        self.asked: EngineName = asked
        self._engine: Engine = FiniteDifference() if asked == "finite_difference" else Autograd()
        self.engine: str = asked
        """The engine that made the last product; before the first one what was asked for."""

    def budget(self, graph_memory: float) -> float:
        """Return the bytes of graphs that a measurement may keep."""
        return {"kept": float("inf"), "rebuilt": 0.0}.get(self.asked, graph_memory)

    def fresh(self) -> Products:
        """Return the same choice for another loss of the module, which needs another step of finite differences."""
        fresh = Products(self.asked)
        fresh._engine = type(self._engine)()
        return fresh

    def keep_graphs(self, loss: BatchedLoss) -> None:
        """Build the graphs that the next products use, as far as there is room; the gradients are a by-product."""
        if isinstance(self._engine, Autograd):
            with suppress(NotTwiceDifferentiableError):  # the next product raises it again
                for index in loss.indices:
                    if index not in loss.point.summed and loss.point.graphs.may_fit((Autograd, index)):
                        self._engine.graph(loss, index)

    def hessian(self, loss: BatchedLoss, v: Tensor) -> Tensor:
        """Return ``H v``."""
        while True:
            try:
                product = self._engine.product(loss, v)
                if isinstance(self._engine, Autograd) and loss.operators.has_custom_functions:
                    _compare_with_differences(loss, v, product)
            except NotTwiceDifferentiableError as error:
                self._take_differences(error)
            else:
                self.engine = self._engine.name(loss)
                return product

    def gauss_newton(self, loss: BatchedLoss, v: Tensor) -> Tensor:
        """Return ``Jᵀ B J v``."""
        if not isinstance(self._engine, FiniteDifference):
            try:
                return GaussNewton().product(loss, v)
            except NotTwiceDifferentiableError as error:
                self._take_differences(error)
        return NumericGaussNewton().product(loss, v)

    def _take_differences(self, error: NotTwiceDifferentiableError) -> None:
        """Go over to finite differences, with a warning, unless exact products were asked for by name."""
        if self.asked in ("exact", "kept", "rebuilt"):
            raise error
        self._engine = FiniteDifference()
        self.engine = "finite_difference"
        warnings.warn(
            f"{error} Using central finite differences of the gradient instead; their estimated error is added to "
            "the reported one. Pass engine='finite_difference' to choose them without this warning.",
            stacklevel=4,
        )


def _compare_with_differences(loss: BatchedLoss, v: Tensor, product: Tensor) -> None:
    """Compare the first product, if the module uses ``torch.autograd.Function``; see :class:`Operators`."""
    operators = loss.operators
    if operators.is_verified:
        return
    operators.is_verified = True
    numeric = FiniteDifference().product(loss, v)
    error, operators.product_error = operators.product_error, 0.0
    if loss.norm(product - numeric) > max(_CUSTOM_FUNCTION_TOLERANCE, 5 * error) * loss.norm(numeric):
        operators.product_error = error
        raise second_derivative_error("a torch.autograd.Function whose backward is not differentiable.")

"""Which engine makes the products: the one that was asked for, unless it cannot, or its products are wrong.

``"auto"`` never times anything: engines round differently, and a choice by the clock would make two identical runs
differ. Autograd's products were the fastest, or nearly so, wherever they were measured
(``examples/benchmark_engines.py``), with the graph kept as long as there is memory for it; what linearising saves per
product does not pay for its set-up.
"""

from __future__ import annotations

import warnings
from contextlib import suppress

import torch
from torch import Tensor

from lightning_flatness.engines.autograd import Autograd, keep_graph
from lightning_flatness.engines.base import BatchedLoss, Engine, EngineName
from lightning_flatness.engines.finite_difference import FiniteDifference
from lightning_flatness.engines.forward import ForwardEngineError, ForwardOverReverse, Linearized
from lightning_flatness.engines.gauss_newton import GaussNewton, NumericGaussNewton
from lightning_flatness.second_derivatives import NotTwiceDifferentiableError, second_derivative_error

_CUSTOM_FUNCTION_TOLERANCE = 0.05
_ENGINES: dict[str, type[Engine]] = {
    "forward_over_reverse": ForwardOverReverse,
    "linearized": Linearized,
    "finite_difference": FiniteDifference,
}


class Products:
    """Makes products with the Hessian and the Gauss-Newton matrix.

    Args:
        engine: What was asked for.
    """

    def __init__(self, engine: EngineName) -> None:
        self.asked: EngineName = engine
        self._engine: Engine = _ENGINES.get(engine, Autograd)()
        self.engine: str = engine
        """The engine that made the last product; before the first one what was asked for."""

    def budget(self, graph_memory: float) -> float:
        """Return the bytes of graphs that a measurement may keep."""
        return {"kept": float("inf"), "rebuilt": 0.0}.get(self.asked, graph_memory)

    def fresh(self) -> Products:
        """Return the same choice for another loss of the module, which wants another step of finite differences."""
        fresh = Products(self.asked)
        fresh._engine = type(self._engine)()
        return fresh

    def keep_graphs(self, loss: BatchedLoss) -> None:
        """Build what the products to come can use, as far as there is room; the gradients are a by-product."""
        if isinstance(self._engine, Autograd) and loss.graphs is not None:
            with suppress(NotTwiceDifferentiableError):  # the products will tell
                for index in range(len(loss.batch_sizes)):
                    if index not in loss.graphs.summed:
                        keep_graph(loss, index)

    def hessian(self, loss: BatchedLoss, v: Tensor) -> Tensor:
        """Return ``H v``."""
        while True:
            try:
                product = self._verified(loss, v)
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
                self._take_differences(error)
        return NumericGaussNewton().product(loss, v)

    def _verified(self, loss: BatchedLoss, v: Tensor) -> Tensor:
        """Return a product by the engine, compared with another one's where there is reason for doubt."""
        if isinstance(self._engine, ForwardOverReverse | Linearized):
            return self._compared_with_autograd(loss, v)
        product = self._engine.product(loss, v)
        if isinstance(self._engine, Autograd) and loss.operators.has_custom_functions:
            _compare_with_differences(loss, v, product)
        return product

    def _compared_with_autograd(self, loss: BatchedLoss, v: Tensor) -> Tensor:
        """Compare the first product of a measurement."""
        key = (type(self._engine), "is verified")
        if loss.graphs is not None and loss.graphs.get(key):
            return self._engine.product(loss, v)
        expected = Autograd().product(loss, v)
        if isinstance(self._engine, Linearized):
            _compare(loss, ForwardOverReverse().product(loss, v), expected)
        product = self._engine.product(loss, v)
        _compare(loss, product, expected)
        if loss.graphs is not None:
            loss.graphs.discard(Autograd)
            loss.graphs.offer(key, True, 0)
        return product

    def _fall_back(self, error: NotTwiceDifferentiableError) -> None:
        """Choose the next best engine, and say so, unless the one that failed was asked for by name."""
        if not isinstance(self._engine, ForwardOverReverse | Linearized):
            self._take_differences(error)
            return
        self._engine = Autograd()
        warnings.warn(
            f"Expected products by engine={self.asked!r}, got: {error} Using engine='auto' instead.", stacklevel=5
        )

    def _take_differences(self, error: NotTwiceDifferentiableError) -> None:
        if self.asked in ("exact", "kept", "rebuilt"):
            raise error
        self._engine = FiniteDifference()
        self.engine = "finite_difference"
        warnings.warn(
            f"{error} Using central finite differences of the gradient instead; their estimated error is added to "
            "the reported one. Pass engine='finite_difference' to choose them without this warning.",
            stacklevel=6,
        )


def _compare(loss: BatchedLoss, product: Tensor, expected: Tensor) -> None:
    tolerance = max(torch.finfo(p.dtype).eps for p in loss.parameters) ** 0.5
    if not torch.linalg.vector_norm(product - expected) <= tolerance * torch.linalg.vector_norm(expected):
        raise ForwardEngineError("its product differs from the one that differentiating backward twice gives.")


def _compare_with_differences(loss: BatchedLoss, v: Tensor, product: Tensor) -> None:
    """Compare the first product, if the module uses ``torch.autograd.Function``; see :class:`Operators`."""
    if loss.operators.is_verified:
        return
    loss.operators.is_verified = True
    numeric = FiniteDifference().product(loss, v)
    error, loss.product_error = loss.product_error, 0.0
    difference = torch.linalg.vector_norm(product - numeric)
    if difference > max(_CUSTOM_FUNCTION_TOLERANCE, 5 * error) * torch.linalg.vector_norm(numeric):
        loss.product_error = error
        raise second_derivative_error("a torch.autograd.Function whose backward is not differentiable.")

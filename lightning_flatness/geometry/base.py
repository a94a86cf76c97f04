"""What a geometry is: a chart ``z -> w(z)`` around the current weights, frozen while something is measured.

A flatness measure is a property of ``z -> L(w(z))`` with ordinary Euclidean distance in ``z``. So a chart
has to carry three things across: a displacement (``z`` to weights), a gradient (weights to ``z``) and a
Hessian-vector product. Estimators see only ``z``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Chart(ABC):
    """Coordinates ``z`` of the weights around one point ``w0``, with ``z = 0`` at ``w0``.

    Attributes:
        num_coordinates: Length of ``z``.
    """

    num_coordinates: int

    @abstractmethod
    def displacement(self, z: Tensor) -> Tensor:
        """Return ``w(z) - w0``, the flat change of the weights that belongs to the coordinates ``z``."""

    @abstractmethod
    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return the gradient in ``z`` at ``z = 0`` of a function whose flat gradient in the weights is given."""

    @abstractmethod
    def hvp(self, weight_hvp: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """Return the product of the Hessian in ``z`` with ``v``, given the product of the Hessian in the weights."""


class Geometry(ABC):
    """A named family of charts, one for every module and every point in its weight space.

    Attributes:
        name: The word a user types, as in ``TopEigenvalues(geometry="layer")``.
    """

    name: str

    @abstractmethod
    def chart(self, module: nn.Module, parameters: Sequence[Tensor], dtype: torch.dtype) -> Chart:
        """Freeze the coordinates at the current values of ``parameters``.

        Args:
            module: The module whose parameters these are; tells e.g. which axis of a tensor is the output.
            parameters: The trainable tensors of ``module``, each once, in the order of flat vectors.
            dtype: The dtype of flat vectors.

        Returns:
            The chart around the current weights.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class LinearChart(Chart):
    """The chart ``w = w0 + S z`` with a diagonal ``S``; the Hessian in ``z`` is ``S H S``.

    Args:
        scale: The diagonal of ``S`` as a flat vector, or None for the identity.
        num_coordinates: Length of ``z``, which is the number of parameters.
    """

    def __init__(self, scale: Tensor | None, num_coordinates: int) -> None:
        self.scale = scale
        self.num_coordinates = num_coordinates

    def displacement(self, z: Tensor) -> Tensor:
        """Return ``S z``."""
        return z if self.scale is None else self.scale * z

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return ``S g``."""
        return gradient if self.scale is None else self.scale * gradient

    def hvp(self, weight_hvp: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """Return ``S H S v``."""
        return self.pull_back(weight_hvp(self.displacement(v)))


class LinearGeometry(Geometry):
    """A geometry with the chart ``w = w0 + S z``; a subclass says what the diagonal of ``S`` is, tensor by tensor.

    A block of zero norm gets scale 0: it cannot move, contributes nothing and is never a NaN.
    """

    @abstractmethod
    def scales(self, module: nn.Module, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        """Return one tensor per parameter, broadcastable to its shape; None stands for ones."""

    def chart(self, module: nn.Module, parameters: Sequence[Tensor], dtype: torch.dtype) -> LinearChart:
        """Freeze the scales at the current values of ``parameters``."""
        num_coordinates = sum(p.numel() for p in parameters)
        with torch.no_grad():
            scales = self.scales(module, parameters)
            if scales is None:
                return LinearChart(None, num_coordinates)
            flat = [s.to(dtype).expand_as(p).reshape(-1) for s, p in zip(scales, parameters, strict=True)]
            return LinearChart(torch.cat(flat), num_coordinates)

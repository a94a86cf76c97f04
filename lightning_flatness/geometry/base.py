"""What a geometry is: a chart ``z -> w(z)`` around the current weights, frozen while something is measured.

A flatness measure is a property of ``z -> L(w(z))`` with ordinary Euclidean distance in ``z``. So a chart
has to carry three things across: a displacement (``z`` to weights), a gradient (weights to ``z``) and a
Hessian-vector product. Estimators see only ``z``.

A chart need not be linear. Then the derivative of ``w(z)`` depends on where it is taken, so a gradient away from
``z = 0`` is pulled back by ``pull_back_at``, and the chart's own curvature adds the gradient of the loss to its
Hessian: ``Jᵀ H J + sum_k g_k d²w_k``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Chart(ABC):
    """Coordinates ``z`` of the weights around one point ``w0``, with ``z = 0`` at ``w0``.

    Attributes:
        num_coordinates: Length of ``z``.
        radius: The chart is smooth for ``‖z‖ < radius``; infinite where it has no pole.
    """

    num_coordinates: int
    radius: float = math.inf

    @abstractmethod
    def displacement(self, z: Tensor) -> Tensor:
        """Return ``w(z) - w0``, the flat change of the weights that belongs to the coordinates ``z``."""

    @abstractmethod
    def coordinates(self, displacement: Tensor) -> Tensor:
        """Return the ``z`` with ``w(z) - w0`` equal to a flat change of the weights: the inverse of ``displacement``.

        Raises:
            ValueError: If no coordinates lead there.
        """

    @abstractmethod
    def push_forward(self, v: Tensor) -> Tensor:
        """Return ``J v``, the velocity of the weights when ``z`` moves through 0 with the velocity ``v``."""

    @abstractmethod
    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return the gradient in ``z`` at ``z = 0`` of a function whose flat gradient in the weights is given."""

    @abstractmethod
    def pull_back_at(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient in ``z`` at any ``z`` of a function whose flat gradient at ``w(z)`` is given."""

    @abstractmethod
    def hvp(
        self, weight_hvp: Callable[[Tensor], Tensor], v: Tensor, *, gradient: Callable[[], Tensor] | None
    ) -> Tensor:
        """Return the product of the Hessian in ``z`` at ``z = 0`` with ``v``.

        Args:
            weight_hvp: The product of the Hessian in the weights with a flat vector.
            v: Vector of shape (num_coordinates,).
            gradient: Returns the flat gradient in the weights; called by nonlinear charts only, after ``weight_hvp``.
                None leaves the curvature of the chart out, as the Gauss-Newton matrix does.

        Returns:
            Vector of shape (num_coordinates,).
        """


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

    def for_optimizer(self, optimizer: Optimizer | Sequence[Optimizer] | None) -> Geometry:
        """Return the geometry to use where ``optimizer`` trains the module; the same for all but ``"optimizer"``.

        Args:
            optimizer: What trains the module, if that is known.

        Returns:
            The geometry.
        """
        return self

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

    def coordinates(self, displacement: Tensor) -> Tensor:
        """Return ``S^-1 displacement``.

        Raises:
            ValueError: If a weight is to change whose scale is zero: it cannot move in this geometry.
        """
        if self.scale is None:
            return displacement
        fixed = self.scale == 0
        if bool((fixed & (displacement != 0)).any()):
            raise ValueError(
                "Expected a change of weights that this geometry can make, got one that moves a weight (or a block of "
                "weights) of norm zero, whose scale is zero. Use the geometry 'euclidean'."
            )
        return displacement / self.scale.masked_fill(fixed, 1)

    def push_forward(self, v: Tensor) -> Tensor:
        """Return ``S v``."""
        return self.displacement(v)

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return ``S g``."""
        return gradient if self.scale is None else self.scale * gradient

    def pull_back_at(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Return ``S g``, wherever ``z`` is."""
        return self.pull_back(gradient)

    def hvp(
        self, weight_hvp: Callable[[Tensor], Tensor], v: Tensor, *, gradient: Callable[[], Tensor] | None
    ) -> Tensor:
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

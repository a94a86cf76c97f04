"""Base classes of geometries and charts. A chart ``z -> w(z)`` is frozen at the current weights.

A flatness measure is a property of ``z -> L(w(z))`` with ordinary Euclidean distance in ``z``. A chart therefore maps
displacements (``z`` to weights), gradients (weights to ``z``) and Hessian-vector products. Estimators see only ``z``.

A chart may be nonlinear. Its derivative then depends on ``z``: ``pull_back_at`` maps a gradient away from ``z = 0``,
and the Hessian in ``z`` gains a term from the curvature of the chart: ``Jᵀ H J + sum_k g_k d²w_k``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

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
        """Return ``w(z) - w0`` as a flat vector."""

    @abstractmethod
    def coordinates(self, displacement: Tensor) -> Tensor:
        """Return the ``z`` that produces a given flat change of the weights: the inverse of ``displacement``.

        Raises:
            ValueError: If no coordinates produce this change.
        """

    @abstractmethod
    def push_forward(self, v: Tensor) -> Tensor:
        """Return ``J v`` with the derivative ``J`` of ``w(z)`` at ``z = 0``."""

    @abstractmethod
    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return ``Jᵀ g``: the gradient in ``z`` at ``z = 0``, given the flat gradient in the weights."""

    @abstractmethod
    def pull_back_at(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient in ``z`` at any ``z``, given the flat gradient at ``w(z)``."""

    @abstractmethod
    def hvp(
        self, weight_hvp: Callable[[Tensor], Tensor], v: Tensor, *, gradient: Callable[[], Tensor] | None
    ) -> Tensor:
        """Return the product of the Hessian in ``z`` at ``z = 0`` with ``v``.

        Args:
            weight_hvp: The product of the Hessian in the weights with a flat vector.
            v: Vector of shape (num_coordinates,).
            gradient: Returns the flat gradient in the weights. Only nonlinear charts call it, after ``weight_hvp``.
                None omits the curvature of the chart, as the Gauss-Newton matrix does.

        Returns:
            Vector of shape (num_coordinates,).
        """


class UndefinedGeometryError(ValueError):
    """The geometry is not defined for this module; others are."""


@dataclass(frozen=True)
class FirstBatch:
    """The loss of a batch, for geometries that look at what the module computes.

    Attributes:
        loss_fn: ``loss_fn(module, batch)``.
        batch: The batch. It is not changed.
        num_samples: How many samples it holds.
        guard: Makes a context in which the loss may run with the module itself. None: a copy in evaluation mode.
    """

    loss_fn: Callable[[nn.Module, Any], Any]
    batch: Any
    num_samples: int
    guard: Callable[[], AbstractContextManager[None]] | None = None


class Geometry(ABC):
    """A named family of charts: one chart per module and point in weight space.

    Attributes:
        name: Its name, as in ``TopEigenvalues(geometry="layer")``.
        follows_loss: Whether it needs :meth:`for_loss`.
        needs_whole_weights: Whether several weights determine the scale of one, in a way that shards cannot.
    """

    name: str
    follows_loss: bool = False
    needs_whole_weights: bool = False

    @abstractmethod
    def chart(self, module: nn.Module, parameters: Sequence[Tensor], dtype: torch.dtype) -> Chart:
        """Freeze the coordinates at the current values of ``parameters``.

        Args:
            module: The module of the parameters. Its layers tell which axis of a tensor is the output.
            parameters: The trainable tensors of ``module``, each once, in the order of flat vectors.
            dtype: The dtype of flat vectors.

        Returns:
            The chart around the current weights.
        """

    def for_optimizer(self, optimizer: Optimizer | Sequence[Optimizer] | None) -> Geometry:
        """Return the geometry bound to the optimizer that trains the module. Only ``"optimizer"`` depends on it."""
        return self

    def for_loss(self, first: FirstBatch | None) -> Geometry:
        """Return the geometry bound to a loss. Only ``"path_norm"`` depends on it.

        Args:
            first: The loss on the first batch; None on a rank without batches.

        Returns:
            The geometry.
        """
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class SymmetricChart(Chart):
    """A chart ``w = w0 + S z`` with a symmetric ``S``, which :meth:`displacement` applies; its Hessian is ``S H S``."""

    def push_forward(self, v: Tensor) -> Tensor:
        """Return ``S v``."""
        return self.displacement(v)

    def pull_back(self, gradient: Tensor) -> Tensor:
        """Return ``S g``: ``S`` is symmetric."""
        return self.displacement(gradient)

    def pull_back_at(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Return ``S g`` at every ``z``."""
        return self.displacement(gradient)

    def hvp(
        self, weight_hvp: Callable[[Tensor], Tensor], v: Tensor, *, gradient: Callable[[], Tensor] | None
    ) -> Tensor:
        """Return ``S H S v``."""
        return self.displacement(weight_hvp(self.displacement(v)))


class LinearChart(SymmetricChart):
    """The chart ``w = w0 + S z`` with a diagonal ``S``.

    Args:
        scale: The diagonal of ``S`` as a flat vector, or None for the identity.
        num_coordinates: Length of ``z``: the number of parameters.
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
            ValueError: If a weight of scale zero would change: it cannot move in this geometry.
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


class LinearGeometry(Geometry):
    """A geometry with the chart ``w = w0 + S z``. A subclass defines the diagonal of ``S``, tensor by tensor.

    A block of zero norm has scale 0: it cannot move and contributes nothing.
    """

    @abstractmethod
    def scales(self, module: nn.Module, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        """Return one tensor per parameter, broadcastable to its shape; None stands for ones."""

    def multiplier(self, module: nn.Module, parameters: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], None] | None:
        """Return what multiplies tensors, one per parameter, by ``S`` in place; None if ``S`` is the identity.

        Args:
            module: The module of the parameters.
            parameters: Some of its trainable tensors.

        Returns:
            The function.
        """
        scales = self.scales(module, parameters)
        if scales is None:
            return None

        def multiply_(tensors: Sequence[Tensor]) -> None:
            for tensor, scale in zip(tensors, scales, strict=True):
                tensor.mul_(scale)

        return multiply_

    def chart(self, module: nn.Module, parameters: Sequence[Tensor], dtype: torch.dtype) -> Chart:
        """Freeze the scales at the current values of ``parameters``."""
        num_coordinates = sum(p.numel() for p in parameters)
        with torch.no_grad():
            scales = self.scales(module, parameters)
            if scales is None:
                return LinearChart(None, num_coordinates)
            flat = [s.to(dtype).expand_as(p).reshape(-1) for s, p in zip(scales, parameters, strict=True)]
            return LinearChart(torch.cat(flat), num_coordinates)

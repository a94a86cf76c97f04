"""Geometries that scale the weights by their norms: per tensor, per output unit, per entry, or not at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_flatness.geometry.base import LinearGeometry


def _norm(tensor: Tensor, dim: tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    """Return the Euclidean norm, accumulated in at least float32."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim, keepdim=keepdim, dtype=dtype)
    return norm


class Euclidean(LinearGeometry):
    """``w = w0 + z``: the ordinary distance between weights. Invariant under nothing.

    The geometry of SAM (arXiv 2010.01412) and of the plain lambda_max (arXiv 2206.10654).
    """

    name = "euclidean"

    def scales(self, module: nn.Module, parameters: Sequence[Tensor]) -> None:
        """Return None: all scales are one."""


class Layer(LinearGeometry):
    r"""``w_i = w0_i + ‖w0_i‖_F z_i``, one block per parameter tensor, biases too.

    Invariant under rescaling whole tensors. The geometry of scale-invariant flatness (arXiv 1902.02434): its
    Hessian is ``D^(1/2) H D^(1/2)`` with ``D = blockdiag(‖w_i‖_F² I)``.
    """

    name = "layer"

    def scales(self, module: nn.Module, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the Frobenius norm of each tensor."""
        return [_norm(p) for p in parameters]


class Filter(LinearGeometry):
    """As ``Layer``, one block per output unit: a row of a matrix, a filter of a convolution, an entry of a vector.

    Invariant under rescaling whole tensors, and single filters in front of a normalisation layer.
    The geometry of filter normalisation (arXiv 1712.09913).
    """

    name = "filter"

    def scales(self, module: nn.Module, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the norm of each output unit's weights."""
        groups = {
            id(m.weight): m.groups
            for m in module.modules()
            if isinstance(m, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        }
        return [self._unit_norms(p, groups.get(id(p))) for p in parameters]

    @staticmethod
    def _unit_norms(parameter: Tensor, transposed_groups: int | None) -> Tensor:
        if parameter.dim() < 2:
            return parameter.abs()
        if transposed_groups is None:
            return _norm(parameter, tuple(range(1, parameter.dim())), keepdim=True)
        # A transposed convolution stores (inputs, outputs / groups, ...): the output unit is (group, second axis).
        grouped = parameter.reshape(transposed_groups, -1, *parameter.shape[1:])
        norms = _norm(grouped, (1, *range(3, grouped.dim())), keepdim=True)
        return norms.expand_as(grouped).flatten(0, 1)


class Element(LinearGeometry):
    """``w_j = w0_j + |w0_j| z_j``: every weight moves in proportion to itself.

    Invariant under any positive rescaling of single weights, so of ReLU units too.
    The geometry of adaptive sharpness and ASAM (arXiv 2102.11600).
    """

    name = "element"

    def scales(self, module: nn.Module, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the absolute values."""
        return [p.abs() for p in parameters]

"""Geometry ``"attention"``: for factors that enter as ``G Hᵀ``, distances that no change of their basis changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_flatness.geometry.attention.finders import pairs_of
from lightning_flatness.geometry.attention.pairs import Pair, Part, Side, sides_of, square_roots
from lightning_flatness.geometry.base import Chart, LinearGeometry, SymmetricChart, UndefinedGeometryError
from lightning_flatness.geometry.linear import Element, Euclidean, Filter, Layer

_RESTS: dict[str, type[LinearGeometry]] = {g.name: g for g in (Euclidean, Layer, Filter, Element)}


class Roots:
    """The square roots of one factor's Gram matrices, and where the factor is in a list of parameters.

    Args:
        side: The factor.
        tensors: All its parameters by name, frozen ones too.
        places: Place of the trainable ones in the list, by name.
    """

    def __init__(self, side: Side, tensors: dict[str, Tensor], places: dict[str, int]) -> None:
        self._side = side
        self._parts = [(part, places[part.name]) for part in side.parts if part.name in places]
        ordered = sorted(side.parts, key=lambda part: (part.name, part.start))
        blocks = [self._view(part, tensors[part.name]) for part in ordered]
        self.root, self.inverse, self.has_full_rank = square_roots(blocks, side.in_planes)

    def _view(self, part: Part, tensor: Tensor) -> Tensor:
        return part.view(tensor, self._side.heads, self._side.in_planes)

    def multiply_(self, tensors: Sequence[Tensor], matrices: Tensor) -> None:
        """Multiply the factor in each of its tensors from the left, in place."""
        for part, place in self._parts:
            rows = self._view(part, tensors[place])
            rows.copy_(torch.einsum("...ij,...jsc->...isc", matrices.to(rows), rows))


class AttentionChart(SymmetricChart):
    """The chart ``w = w0 + S z``: ``S`` has blocks for the factors of pairs, a diagonal for the rest.

    Args:
        diagonal: The diagonal, 1 on the factors of pairs; a flat vector.
        roots: The blocks.
        shapes: Of the parameters, in the order of flat vectors.
    """

    def __init__(self, diagonal: Tensor, roots: list[Roots], shapes: list[torch.Size]) -> None:
        self.num_coordinates = len(diagonal)
        self._diagonal = diagonal
        self._roots = roots
        self._shapes = shapes

    def displacement(self, z: Tensor) -> Tensor:
        """Return ``S z``."""
        return self._multiplied(z * self._diagonal, inverse=False)

    def coordinates(self, displacement: Tensor) -> Tensor:
        """Return ``S^+ displacement``.

        Raises:
            ValueError: If no coordinates produce this change: a block has not full rank, or a scale is zero.
        """
        scale = self._diagonal
        z = self._multiplied(displacement / scale.masked_fill(scale == 0, torch.inf), inverse=True)
        missed = torch.linalg.vector_norm(self.displacement(z) - displacement)
        if float(missed) > 1e-4 * float(torch.linalg.vector_norm(displacement)):
            raise ValueError(
                "Expected a change of weights that this geometry can make, got one that moves weights of norm zero, or "
                "factors of attention out of the space that they span. Use the geometry 'euclidean'."
            )
        return z

    def _multiplied(self, vector: Tensor, *, inverse: bool) -> Tensor:
        pieces = torch.split(vector, [shape.numel() for shape in self._shapes])
        views = [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
        for roots in self._roots:
            roots.multiply_(views, roots.inverse if inverse else roots.root)
        return vector


class AttentionGeometry(LinearGeometry):
    r"""``dG = Z_G (GᵀG)^(1/2)``, ``dH = Z_H (HᵀH)^(1/2)`` for factors of a product ``G Hᵀ``; the rest as elsewhere.

    Attention computes the same function when the queries of a head are multiplied by any invertible ``A^-1`` and its
    keys by ``Aᵀ``, and so do values and output projection. The spectrum of the Hessian in this chart does not change
    under all of these, at any point (the invariant metric of arXiv 2505.05409). Biases are further rows of the factors.

    Pairs are found in ``nn.MultiheadAttention`` (so in torch's encoder and decoder layers) and in Hugging Face's GPT-2,
    BERT, ViT and Llama. Query heads that share a key head share its matrix. Rotary embeddings leave rotations and
    scalings of each plane of a head: there a plane has one number. Norms of queries and keys leave nothing and are
    refused. Where pairs share a parameter (queries tied to keys) they share the matrix, and the remaining changes of
    basis are the orthogonal ones. Frozen factors stand still, but count in ``GᵀG``.

    Costs one singular value decomposition per factor and chart, and a product with a d x d matrix per head and vector.

    Args:
        pairs: Pairs of other modules, e.g. ``Pair((Part("lora_A.weight"),), (Part("lora_B.weight", axis=1),))`` for
            LoRA. Given pairs replace those that would be found.
        rest: The geometry of all other weights: ``"layer"``, ``"filter"``, ``"element"`` or ``"euclidean"``.

    Raises:
        ValueError: If ``rest`` is none of these; in ``chart``, if there are no pairs, a pair does not fit its
            parameters, or the attention has no known changes of basis.

    Example:
        >>> from lightning_flatness import LossLandscape, TopEigenvalues
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> landscape = LossLandscape(layer, [torch.randn(4, 3, 8)], lambda m, x: m(x).square().mean())
        >>> metric = TopEigenvalues(geometry="attention")
        >>> metric.update(landscape)
    """

    name = "attention"
    needs_whole_weights = True

    def __init__(self, pairs: Sequence[Pair] | None = None, rest: str = "layer") -> None:
        if rest not in _RESTS:
            raise ValueError(f"Expected `rest` to be one of {sorted(_RESTS)}, got {rest!r}.")
        self.pairs = None if pairs is None else tuple(pairs)
        self.rest = rest

    def scales(self, module: nn.Module, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the diagonal part of ``S``: ones on the factors of pairs."""
        scales = _RESTS[self.rest]().scales(module, parameters)
        tensors = dict(module.named_parameters())
        diagonal = [p.new_ones(()) for p in parameters] if scales is None else scales
        inside = {part.name for side in self._sides(module) for part in side.parts}
        kept = {id(tensors[name]) for name in inside}
        return [d.new_ones(()) if id(p) in kept else d for d, p in zip(diagonal, parameters, strict=True)]

    def multiplier(self, module: nn.Module, parameters: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], None]:
        """Return what multiplies tensors, one per parameter, by ``S`` in place."""
        scales, roots = self.scales(module, parameters), self._roots(module, parameters)

        def multiply_(tensors: Sequence[Tensor]) -> None:
            for tensor, scale in zip(tensors, scales, strict=True):
                tensor.mul_(scale)
            for each in roots:
                each.multiply_(tensors, each.root)

        return multiply_

    def chart(self, module: nn.Module, parameters: Sequence[Tensor], dtype: torch.dtype) -> Chart:
        """Freeze the blocks at the current values of ``parameters``."""
        with torch.no_grad():
            scales = self.scales(module, parameters)
            flat = [s.to(dtype).expand_as(p).reshape(-1) for s, p in zip(scales, parameters, strict=True)]
            return AttentionChart(torch.cat(flat), self._roots(module, parameters), [p.shape for p in parameters])

    def _sides(self, module: nn.Module) -> list[Side]:
        tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        pairs = pairs_of(module) if self.pairs is None else self.pairs
        first = {id(tensor): name for name, tensor in module.named_parameters()}
        if self.pairs is not None:
            required = [parts[0].name for pair in pairs for parts in (pair.left, pair.right)]
            if missing := [name for name in required if name not in tensors]:
                raise ValueError(
                    f"Expected names of parameters in `pairs`, got {missing}. There are {sorted(tensors)}."
                )
        if not pairs:
            raise UndefinedGeometryError(
                f"Expected attention layers for the geometry 'attention', got {type(module).__name__} without any that "
                "is known. Declare them: AttentionGeometry(pairs=[Pair(...)]), or use the geometry 'layer'."
            )
        renamed = [
            replace(
                pair,
                left=tuple(_renamed(part, tensors, first) for part in pair.left),
                right=tuple(_renamed(part, tensors, first) for part in pair.right),
            )
            for pair in pairs
        ]
        return sides_of(renamed, lambda name: name in tensors)

    def _roots(self, module: nn.Module, parameters: Sequence[Tensor]) -> list[Roots]:
        tensors: dict[str, Tensor] = dict(module.named_parameters())
        names = _names(module)
        places = {names[id(p)]: i for i, p in enumerate(parameters)}
        roots = [Roots(side, tensors, places) for side in self._sides(module)]
        if not all(each.has_full_rank for each in roots):
            warnings.warn(
                "A factor of attention has linearly dependent rows or columns within a head. In the geometry "
                "'attention' its weights move only in the space that they span.",
                stacklevel=3,
            )
        return roots

    def __repr__(self) -> str:
        declared = "" if self.pairs is None else f"pairs={self.pairs!r}, "
        return f"AttentionGeometry({declared}rest={self.rest!r})"


def _names(module: nn.Module) -> dict[int, str]:
    return {id(p): name for name, p in module.named_parameters()}


def _renamed(part: Part, tensors: dict[str, Tensor], first: dict[int, str]) -> Part:
    """Return a part under the first name of its parameter: tied ones have several."""
    if part.name not in tensors:
        return part
    tensor = tensors[part.name]
    return replace(part, name=first[id(tensor)], stop=tensor.shape[part.axis] if part.stop is None else part.stop)

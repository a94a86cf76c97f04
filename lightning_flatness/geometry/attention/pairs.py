"""Pairs of factors that a network uses only as a product, and where their rows are in the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The rows of a factor that one parameter holds; ``d`` coordinates per head lie along one of its axes.

    Attributes:
        name: The parameter, as in ``module.get_parameter(name)``.
        axis: The axis of the heads' coordinates: 0 for what produces them (queries, keys, values, LoRA's ``A``, and
            every bias), 1 for what reads them (the output projection, LoRA's ``B``).
        start: Its first entry along the axis.
        stop: The entry behind its last; None for the end of the axis.
        shared: Heads in a row that have the same matrix: query heads per key head.
    """

    name: str
    axis: int = 0
    start: int = 0
    stop: int | None = None
    shared: int = 1

    def view(self, tensor: Tensor, num_heads: int, in_planes: bool) -> Tensor:
        """Return the entries of this part in a tensor like its parameter, as a view.

        Args:
            tensor: Of the shape of the parameter.
            num_heads: Number of matrices.
            in_planes: Whether coordinates ``i`` and ``i + d/2`` of a head make up a plane each.

        Returns:
            Shape (num_heads, d, shared, other axes), in planes (num_heads, d/2, 2, shared, other axes).

        Raises:
            ValueError: If the axis has no such number of heads.
        """
        stop = tensor.shape[self.axis] if self.stop is None else self.stop
        rows = tensor.movedim(self.axis, 0)[self.start : stop]
        size, rest = divmod(len(rows), num_heads * self.shared)
        if rest or not size or (in_planes and size % 2):
            raise ValueError(
                f"Expected axis {self.axis} of {self.name!r} to hold {num_heads * self.shared} heads of one size, got "
                f"{len(rows)} entries. Check `heads` and `shared` of the pair."
            )
        heads: Tensor = rows.view(len(rows), -1).unflatten(0, (num_heads, self.shared, size)).transpose(1, 2)
        return heads.unflatten(1, (2, size // 2)).transpose(1, 2) if in_planes else heads


@dataclass(frozen=True)
class Pair:
    """Two factors ``G`` and ``H`` that enter only as ``G Hᵀ``, head by head.

    Attributes:
        left: The parts of ``G``: weights, and biases as further rows.
        right: The parts of ``H``.
        heads: Number of matrices.
        in_planes: Rotary embeddings turn each plane of coordinates ``i`` and ``i + d/2``. Only rotations and scalings
            of a plane commute with that, so each plane has one number, its norm, in the place of a matrix.
    """

    left: tuple[Part, ...]
    right: tuple[Part, ...]
    heads: int = 1
    in_planes: bool = False


@dataclass(frozen=True)
class Side:
    """One factor of a pair, or of several pairs that share parameters.

    Attributes:
        parts: Its parts, each once.
        heads: Number of matrices.
        in_planes: See :class:`Pair`.
    """

    parts: frozenset[Part]
    heads: int
    in_planes: bool


def sides_of(pairs: Sequence[Pair], has_parameter: Callable[[str], bool]) -> list[Side]:
    """Return the factors of pairs. Those that share a part become one: only a common change of basis is left to them.

    Raises:
        ValueError: If pairs share a part and have different numbers of heads.
    """
    sides: list[Side] = []
    for pair in pairs:
        for parts in (pair.left, pair.right):
            new = Side(frozenset(p for p in parts if has_parameter(p.name)), pair.heads, pair.in_planes)
            for other in [s for s in sides if s.parts & new.parts]:
                if (other.heads, other.in_planes) != (new.heads, new.in_planes):
                    shared = sorted(p.name for p in other.parts & new.parts)
                    raise ValueError(
                        f"Expected pairs that share {shared} to have the same heads, got {other.heads} and "
                        f"{new.heads}. Declare pairs that agree."
                    )
                sides.remove(other)
                new = Side(new.parts | other.parts, new.heads, new.in_planes)
            sides.append(new)
    return sides


def square_roots(blocks: Sequence[Tensor], in_planes: bool) -> tuple[Tensor, Tensor, bool]:
    """Return the square roots of the Gram matrices ``sum B Bᵀ``, their pseudo-inverses, and if all have full rank.

    Args:
        blocks: Each of shape (heads, d, shared, other axes), in planes (heads, planes, 2, shared, other axes).
        in_planes: Whether to take a multiple of the identity of the same trace.

    Returns:
        Two tensors of shape (heads, d, d), in planes (heads, planes, 2, 2), in float64 (float32 where there is none);
        and a flag.
    """
    dtype = torch.float32 if blocks[0].device.type == "mps" else torch.float64
    rows = torch.cat([b.detach().to(dtype).flatten(-2) for b in blocks], dim=-1)
    if in_planes:
        norms = (rows.square().sum((-2, -1)) / 2).sqrt()[..., None, None]
        eye = torch.eye(2, dtype=dtype, device=rows.device)
        return norms * eye, torch.where(norms > 0, 1 / norms, 0) * eye, bool((norms > 0).all())
    vectors, values, _ = torch.linalg.svd(rows, full_matrices=False)
    precision = max(torch.finfo(b.dtype).eps for b in blocks)
    is_zero = values <= precision * max(rows.shape[1:]) * values.amax(dim=1, keepdim=True)
    values = values.masked_fill(is_zero, 0)
    inverse = torch.where(is_zero, 0, 1 / values)
    has_full_rank = values.shape[1] == rows.shape[1] and not bool(is_zero.any())
    root, pseudo_inverse = (vectors * v[:, None, :] @ vectors.mT for v in (values, inverse))
    return root, pseudo_inverse, has_full_rank

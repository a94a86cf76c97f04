"""Bound the chance that a Krylov space has missed an eigenvector.

Every eigenvector has a component of about ``size ** -0.5`` along a random start vector. If no Ritz value is near
``mu``, an eigenvector at ``mu`` had only a small component along the start: at most the Christoffel function of the
space at ``mu``. The probability of so small a component is known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHANCE_OF_A_MISS = 0.1
_CHANCE_THAT_TELLS = 0.5


LARGEST_HIDDEN_COMPONENT = 0.1
"""Of the known part of a start: an eigenvector with a larger eigenvalue has at most this component along it."""


def would_have_shown(
    rests: list[Tensor], direction: Tensor, remainder_norm: float, limit: float, size: int, *, is_random: bool
) -> bool:
    """Return whether an eigenvector with an eigenvalue above a limit can only be one that the start hardly has.

    A start from an earlier measurement can be an eigenvector already after two eigenvalues have changed places, with a
    small residual at the first product. Components of the known part of a start are not random: they count as large.

    Args:
        rests: The projection of the operator onto the Krylov space, once or with both signs.
        direction: Coordinates of the start in the space.
        remainder_norm: Norm of the remainder outside the space.
        limit: Eigenvalues above it matter.
        size: Dimension.
        is_random: Whether the start is a random vector.
    """
    hidden = max(largest_hidden_component(rest, direction, remainder_norm, limit) for rest in rests)
    return chance_of_less(hidden, size) <= _CHANCE_OF_A_MISS if is_random else hidden <= LARGEST_HIDDEN_COMPONENT


class Look:
    """A search for missed eigenvectors that starts from a random direction.

    Args:
        first: The first row of the basis that belongs to this search.
        max_basis: Largest number of rows of the basis.
        chance_before: The probability that all earlier searches have missed the same eigenvector.

    Attributes:
        direction: Coordinates of the random direction in the basis; restarts keep a part of it.
        chance: The smallest bound so far on the probability that this search has missed an eigenvector.
        is_restarted: Whether the basis was compressed since the start.
    """

    def __init__(self, first: int, max_basis: int, chance_before: float = 1.0) -> None:
        self.first = first
        self.direction = torch.zeros(max_basis, dtype=torch.float64, device="cpu")
        self.direction[first] = 1.0
        self.chance_before = chance_before
        self.chance = 1.0
        self.is_restarted = False

    @property
    def has_told_something(self) -> bool:
        """Whether this search has lowered the probability of a miss."""
        return self.chance <= _CHANCE_THAT_TELLS

    def is_enough(self, rests: list[Tensor], remainder_norm: float, limit: float, slack: float, size: int) -> bool:
        """Return whether an eigenvalue above a limit has been missed with a probability of one in ten at most.

        After a restart also: whether the largest Ritz value is accurate and below the limit.

        Args:
            rests: The projection onto the space of this search, once or with both signs.
            remainder_norm: Norm of the remainder outside the space.
            limit: Eigenvalues above it matter.
            slack: Required accuracy of the largest Ritz value.
            size: Dimension.
        """
        direction = self.direction[self.first : self.first + len(rests[0])]
        hidden = max(largest_hidden_component(rest, direction, remainder_norm, limit) for rest in rests)
        self.chance = min(self.chance, chance_of_less(hidden, size))
        if self.chance_before * self.chance <= _CHANCE_OF_A_MISS:
            return True
        return self.is_restarted and all(_is_known_below(rest, remainder_norm, limit, slack) for rest in rests)


def largest_hidden_component(projection: Tensor, first: Tensor, remainder_norm: float, mu: float) -> float:
    """Bound the component of an unseen eigenvector with eigenvalue ``mu`` or more along the first vector.

    If ``A Qᵀ = Qᵀ T + r e_mᵀ`` and ``A u = mu u``, then ``(mu - T) Q u = e_m <r, u>``: the component of ``u`` along
    ``r`` determines its projection onto the space, and both together have length one at most.

    Args:
        projection: T, shape (m, m).
        first: Coordinates of the first vector in the space, shape (m,).
        remainder_norm: The norm of r.
        mu: The eigenvalue. The bound holds for larger ones, too.

    Returns:
        A number from 0 to 1: 1 if a Ritz value has reached ``mu``; 0 if the space is invariant.

    Example:
        One product gives the mean and the spread of the operator at a vector. With mean 0 and spread 1, an eigenvalue
        of 3 has a weight of at most 1 / (1 + 3²) (Chebyshev's inequality).

        >>> largest_hidden_component(torch.zeros(1, 1), torch.ones(1), 1.0, mu=3.0) ** 2
        0.1...
    """
    shifted = mu * torch.eye(len(projection), dtype=projection.dtype, device="cpu") - projection
    distance = float(torch.linalg.eigvalsh(shifted)[0])
    if distance < 0 or (distance == 0 and remainder_norm > 0):
        return 1.0
    if remainder_norm == 0:
        return 0.0
    inside = remainder_norm * torch.linalg.inv(shifted)[:, -1]
    return float((first @ inside).abs() / (1 + inside @ inside).sqrt())


def chance_of_less(component: float, size: int) -> float:
    """Return a bound of the probability that a random unit vector has at most this component along a given direction.

    The component is nearly Gaussian with variance ``1 / size``.
    """
    return min(1.0, math.sqrt(2 / math.pi * size) * component)


def _is_known_below(projection: Tensor, remainder_norm: float, limit: float, slack: float) -> bool:
    values, vectors = torch.linalg.eigh(projection)
    residual = remainder_norm * float(vectors[-1, -1].abs())
    return residual <= slack and float(values[-1]) + residual < limit

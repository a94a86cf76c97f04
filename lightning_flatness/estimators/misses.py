"""What a Krylov space can have missed: how small a part an eigenvector must have had in the vector that it began with.

A space that was begun with a random vector shows every eigenvector in time, since each has a component of about
``size ** -0.5`` along it. The other way round: where no Ritz value has come near ``mu``, an eigenvector with the
eigenvalue ``mu`` has at most a certain component along the first vector (the Christoffel function of the space at
``mu``), and the chance that a random vector has so little of it is known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHANCE_OF_A_MISS = 0.1
_CHANCE_THAT_TELLS = 0.5


class Look:
    """A look at the rest of the space, beyond what was found, that begins with a random direction.

    Args:
        first: The row of the basis with which it begins.
        max_basis: Rows of the basis at most.
        chance_before: The chance that all looks before this one have missed the same eigenvector.

    Attributes:
        direction: The random direction in the basis, as far as restarts have kept it.
        chance: The chance that this look has missed it, the smallest bound so far.
        is_restarted: Whether the basis was compressed since.
    """

    def __init__(self, first: int, max_basis: int, chance_before: float = 1.0) -> None:
        self.first = first
        self.direction = torch.zeros(max_basis, dtype=torch.float64)
        self.direction[first] = 1.0
        self.chance_before = chance_before
        self.chance = 1.0
        self.is_restarted = False

    @property
    def has_told_something(self) -> bool:
        """Whether another look would add to this one."""
        return self.chance <= _CHANCE_THAT_TELLS

    def is_enough(self, rests: list[Tensor], remainder_norm: float, limit: float, slack: float, size: int) -> bool:
        """Return whether an eigenvalue beyond a limit would have been seen, all but certainly.

        Where restarts have lost what the direction had in it: whether the largest Ritz value is known, and smaller.

        Args:
            rests: The projection onto the space of this look, once or with both signs.
            remainder_norm: The norm of what sticks out of the space.
            limit: What an eigenvalue has to exceed to matter.
            slack: How exactly the largest Ritz value has to be known.
            size: Dimension.
        """
        direction = self.direction[self.first : self.first + len(rests[0])]
        hidden = max(largest_hidden_component(rest, direction, remainder_norm, limit) for rest in rests)
        self.chance = min(self.chance, chance_of_less(hidden, size))
        if self.chance_before * self.chance <= _CHANCE_OF_A_MISS:
            return True
        return self.is_restarted and all(_is_known_below(rest, remainder_norm, limit, slack) for rest in rests)


def largest_hidden_component(projection: Tensor, first: Tensor, remainder_norm: float, mu: float) -> float:
    """Return how much of an eigenvector with an eigenvalue of ``mu`` or more the first vector can have at most.

    If ``A Qᵀ = Qᵀ T + r e_mᵀ`` and ``A u = mu u``, then ``(mu - T) Q u = e_m <r, u>``: so the part of ``u`` in the
    space follows from its component along ``r``, and both together have length one at most.

    Args:
        projection: T, shape (m, m).
        first: The vector in question in the coordinates of the space, shape (m,).
        remainder_norm: The norm of r.
        mu: The eigenvalue; larger ones would have to hide with less.

    Returns:
        A number from 0 to 1: 1 if a Ritz value has come as far as ``mu``, so that nothing is hidden; 0 if the space is
        invariant, so that it shows all there is along the first vector.

    Example:
        One product with a vector says nothing of an operator but its mean and spread there: with mean 0 and spread 1,
        an eigenvalue of 3 has a weight of 1 / (1 + 3²) at most (Chebyshev's inequality).

        >>> largest_hidden_component(torch.zeros(1, 1), torch.ones(1), 1.0, mu=3.0) ** 2
        0.1...
    """
    shifted = mu * torch.eye(len(projection), dtype=projection.dtype) - projection
    distance = float(torch.linalg.eigvalsh(shifted)[0])
    if distance < 0 or (distance == 0 and remainder_norm > 0):
        return 1.0
    if remainder_norm == 0:
        return 0.0
    inside = remainder_norm * torch.linalg.inv(shifted)[:, -1]
    return float((first @ inside).abs() / (1 + inside @ inside).sqrt())


def chance_of_less(component: float, size: int) -> float:
    """Bound the chance that a random unit vector has no larger component than this along a given direction.

    Args:
        component: From 0 to 1.
        size: Dimension; the component is nearly Gaussian with a variance of one over that.
    """
    return min(1.0, math.sqrt(2 / math.pi * size) * component)


def _is_known_below(projection: Tensor, remainder_norm: float, limit: float, slack: float) -> bool:
    values, vectors = torch.linalg.eigh(projection)
    residual = remainder_norm * float(vectors[-1, -1].abs())
    return residual <= slack and float(values[-1]) + residual < limit

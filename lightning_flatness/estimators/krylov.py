"""One run of restarted Lanczos, behind :func:`lightning_flatness.estimators.lanczos`.

Full reorthogonalisation and an explicitly projected matrix, so that restarts, deflation and fresh random
directions need no case of their own; thick restarts keep the basis bounded. The basis stays on the operator's
device; only its coefficients, a column per product, come to the CPU.

One Krylov space contains one eigenvector of each eigenvalue, so copies of a multiple eigenvalue (a linear model
with several outputs has every eigenvalue several times) would be missed. Where more than one pair is wanted, a
few products with a fresh random vector, orthogonal to what was found, look for them before the result counts as
converged: as many as it takes for a copy to be missed with a chance of one in ten at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_flatness.estimators.basis import Basis, normalized
from lightning_flatness.estimators.misses import Look

Which = Literal["LA", "SA", "LM"]

_NUM_SPARE_VECTORS = 2
_SPARE_WEIGHT = 0.3
_NUM_CONFIRMING_PRODUCTS = 3
_SIZE_OF_A_MISS = 0.1
_NUM_HELD = 2
_MIN_ROOM = 4


@dataclass(frozen=True)
class EigenResult:
    """Extreme eigenvalues of a symmetric operator.

    Attributes:
        eigenvalues: Shape (k,), the most wanted first.
        residuals: Shape (k,), ``‖A y - theta y‖`` of each pair: an eigenvalue lies no farther than that from theta.
        eigenvectors: Shape (k, size), orthonormal rows.
        subspace: The eigenvectors and up to two next ones, to start a later run from, shape (k to k + 2, size).
        converged: Whether all residuals reached the tolerance.
        num_products: Products with the operator.
    """

    eigenvalues: Tensor
    residuals: Tensor
    eigenvectors: Tensor
    subspace: Tensor
    converged: bool
    num_products: int


class KrylovSolver:
    """State of one run: basis Q (rows), projection T = Q A Qᵀ, and what ``A Qᵀ - Qᵀ T`` is known to be.

    That remainder is one vector for the newest row of Q, plus one for every time that another direction was taken
    in its place. Of those, the coefficients in the basis are kept, a row of ``given_up`` each, and the last few
    vectors, to come back to.
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        size: int,
        k: int,
        which: Which,
        tol: float,
        max_basis: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.matvec = matvec
        self.size = size
        self.k = k
        self.which = which
        self.tol = tol
        self.eps = torch.finfo(dtype).eps
        self.max_basis = max_basis
        self.generator = torch.Generator().manual_seed(seed)
        self.basis = Basis(max_basis, size, dtype, device, first_block=k + _NUM_SPARE_VECTORS)
        self.projection = torch.zeros(max_basis, max_basis, dtype=torch.float64)
        self.given_up = torch.zeros(0, max_basis, dtype=torch.float64)
        self.held: list[Tensor | None] = []
        self.look = Look(0, max_basis)
        self.num_products = 0
        self.remainder = self.nothing = torch.empty(0)  # a vector only as long as it is needed: it may be large

    def begin(self, start: Tensor | None, noise: float) -> None:
        """Take a start vector, or a mixture of several, with some noise, or a random one as the first of the basis."""
        vector = self._start_vector(start, noise)
        self.basis.append(vector, torch.linalg.vector_norm(vector))

    def run(self, max_products: int) -> EigenResult:
        """Expand, project and restart until the wanted pairs have converged or the products are spent."""
        found: Tensor | None = None  # converged values; what follows is a look at the rest of the space
        while True:
            norm = self._expand()
            values, coefficients, residuals = self._ritz_pairs(norm)
            is_exhausted = self.num_products >= max_products and len(values) >= self.k
            is_last = is_exhausted or len(self.basis) == self.size
            if found is not None and self._is_better(values, found):
                found = None  # there was more: go on as if nothing had been found
            if found is None and self._are_converged(values, residuals):
                if self.k == 1 or is_last:
                    return self._result(values, coefficients, residuals, converged=True)
                found = values[: self.k]
                self.look.chance_before = 1.0
                self._look_elsewhere(norm, coefficients, values)
                continue
            if found is not None and (is_last or self._is_rest_settled(found, norm)):
                return self._result(values, coefficients, residuals, converged=True)
            if is_exhausted:
                return self._result(values, coefficients, residuals, converged=False)
            if found is None:
                norm = self._come_back(coefficients, norm)
            if len(self.basis) >= self._room and found is not None and self.look.has_told_something:
                self.look.chance_before *= self.look.chance
                self._look_elsewhere(norm, coefficients, values)
                continue
            if len(self.basis) >= self._room:
                num_kept = min(self.k + (self._room - self.k) // 2, self._room - 1)
                self._compress(coefficients[:, :num_kept], values[:num_kept])
            if self._is_negligible(norm):  # an invariant subspace
                self._append_random_direction()
            else:
                self.basis.append(self.remainder, norm)
            self.remainder = self.nothing

    def _expand(self) -> float:
        """Multiply the newest basis vector, project, keep what sticks out of the basis, and return its norm."""
        newest = len(self.basis) - 1
        product = self.matvec(self.basis[newest])
        self.num_products += 1
        column, self.remainder, norm = self.basis.orthogonalize(product)
        if not (torch.isfinite(column).all() and norm < float("inf")):
            raise RuntimeError(
                "Expected finite Hessian-vector products, got one that is not. Check the gradient of the loss at the "
                "current weights (e.g. a square root or a norm at zero), or measure in float64."
            )
        self.projection[newest, : newest + 1] = column
        self.projection[: newest + 1, newest] = column
        return 0.0 if len(self.basis) == self.size else norm

    def _ritz_pairs(self, norm: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values, coefficients (columns) and residual norms, the most wanted first."""
        n = len(self.basis)
        values, coefficients = torch.linalg.eigh(self.projection[:n, :n])
        key = {"LA": -values, "SA": values, "LM": -values.abs()}[self.which]
        order = torch.argsort(key, stable=True)
        values, coefficients = values[order], coefficients[:, order]
        residuals = (norm * coefficients[-1]).abs()
        if n < self.size:  # else nothing sticks out of the basis any more
            residuals += (self.given_up[:, :n] @ coefficients).abs().sum(dim=0)
        return values, coefficients, residuals

    def _tolerances(self, values: Tensor, wanted: Tensor) -> Tensor:
        """Return the residuals that are small enough; rounding forbids less than a little of the norm."""
        return torch.maximum(self.tol * wanted.abs(), 8 * self.eps * values.abs().max())

    def _are_converged(self, values: Tensor, residuals: Tensor) -> bool:
        wanted = values[: self.k]
        return len(wanted) == self.k and bool((residuals[: self.k] <= self._tolerances(values, wanted)).all())

    def _is_better(self, values: Tensor, found: Tensor) -> bool:
        gain = _wantedness(values[: self.k], self.which) - _wantedness(found, self.which)
        return bool((gain > self._tolerances(values, found)).any())

    def _is_rest_settled(self, found: Tensor, norm: float) -> bool:
        """Whether it is unlikely that an eigenvalue was missed that clearly is more wanted than the last one found."""
        rows = slice(self.look.first, len(self.basis))
        rest = self.projection[rows, rows]
        rests = {"LA": [rest], "SA": [-rest], "LM": [rest, -rest]}[self.which]  # the wanted ones are the largest
        last = _wantedness(found[-1], self.which)
        slack = float(_SIZE_OF_A_MISS * last.abs())
        limit = float(last + self._tolerances(found, last)) + slack
        return self.look.is_enough(rests, norm, limit, slack, self.size)

    def _is_negligible(self, norm: float) -> bool:
        n = len(self.basis)
        return norm <= 8 * self.eps * float(torch.linalg.matrix_norm(self.projection[:n, :n], ord="fro"))

    def _look_elsewhere(self, norm: float, coefficients: Tensor, values: Tensor) -> None:
        """Continue with a random direction instead of the remainder."""
        self._give_up(norm)
        if self._room - len(self.basis) < _NUM_CONFIRMING_PRODUCTS:
            self._compress(coefficients[:, : self.k], values[: self.k])
        self.look = Look(len(self.basis), self.max_basis, self.look.chance_before)
        self._append_random_direction()

    def _give_up(self, norm: float) -> None:
        """Note that the remainder of the newest row will not become the next basis vector."""
        row = torch.zeros(1, self.max_basis, dtype=torch.float64)
        row[0, len(self.basis) - 1] = norm
        self.given_up = torch.cat([self.given_up, row])
        self.held.append(self.remainder)
        self.remainder = self.nothing
        num_held = max(0, min(_NUM_HELD, self.max_basis - self.k - _MIN_ROOM))
        for i in range(len(self.held) - num_held):
            self.held[i] = None

    @property
    def _room(self) -> int:
        """Rows that the basis may have, now that vectors are held beside it."""
        return self.max_basis - sum(vector is not None for vector in self.held)

    def _come_back(self, coefficients: Tensor, norm: float) -> float:
        """Take a remainder that was given up in the place of the current one, if it matters more; return its norm."""
        n = len(self.basis)
        needs = (self.given_up[:, :n] @ coefficients[:, : self.k]).abs().amax(dim=1)
        needs *= torch.tensor([float(vector is not None) for vector in self.held], dtype=torch.float64)
        if len(needs) == 0 or needs.max() <= norm * coefficients[-1, : self.k].abs().max():
            return norm
        index = int(needs.argmax())
        remainder = self.held.pop(index)
        self.given_up = torch.cat([self.given_up[:index], self.given_up[index + 1 :]])
        assert remainder is not None
        self._give_up(norm)
        _, self.remainder, norm = self.basis.orthogonalize(remainder)
        return norm

    def _compress(self, coefficients: Tensor, values: Tensor) -> None:
        """Replace the basis by the Ritz vectors with these coefficients."""
        n, num_kept = coefficients.shape
        given_up = self.given_up[:, :n] @ coefficients
        direction = self.look.direction[:n] @ coefficients
        self.basis.rotate(coefficients)
        self.projection.zero_()
        self.projection[:num_kept, :num_kept] = torch.diag(values)
        self.given_up.zero_()
        self.given_up[:, :num_kept] = given_up
        self.look.direction.zero_()
        self.look.direction[:num_kept] = direction
        self.look.first, self.look.is_restarted = self.k, True

    def _start_vector(self, start: Tensor | None, noise: float) -> Tensor:
        random = self._random_vector()
        if start is None or not torch.isfinite(start).all() or not start.any():
            return random
        # The noise lets a direction in that has become wanted: from an eigenvector alone, a run would stay there.
        known = mixed(start.reshape(-1, self.size).to(random), self.k)
        sign = 1.0 if float(known @ random) >= 0 else -1.0  # or the two could cancel each other
        return known.add_(random, alpha=sign * noise / float(torch.linalg.vector_norm(random)))

    def _append_random_direction(self) -> None:
        """Add a random unit vector orthogonal to the basis."""
        _, vector, norm = self.basis.orthogonalize(self._random_vector())
        self.basis.append(vector, norm)

    def _random_vector(self) -> Tensor:
        vector = torch.randn(self.size, generator=self.generator, dtype=self.basis.dtype)
        return vector.to(self.basis.device)

    def _result(self, values: Tensor, coefficients: Tensor, residuals: Tensor, converged: bool) -> EigenResult:
        self.remainder = self.nothing
        self.held.clear()
        num_kept = min(self.k + _NUM_SPARE_VECTORS, len(values))
        self._compress(coefficients[:, :num_kept], values[:num_kept])
        values, residuals = values[: self.k], residuals[: self.k]
        subspace = self.basis.rows()
        return EigenResult(
            eigenvalues=values.to(self.basis.dtype).to(self.basis.device),
            residuals=residuals.to(self.basis.dtype).to(self.basis.device),
            eigenvectors=subspace[: self.k],
            subspace=subspace,
            converged=converged,
            num_products=self.num_products,
        )


def mixed(vectors: Tensor, k: int) -> Tensor:
    """Return a unit vector that has all of these in it: the first ``k`` with weight one, the spare ones with less.

    The spare ones know where a direction is that has become more wanted than those that were: from the old top vector
    alone, a run can converge to it after two eigenvalues have changed places.

    Args:
        vectors: Shape (any, size), or one vector.
        k: How many are wanted.
    """
    rows = vectors.reshape(-1, vectors.shape[-1])
    if len(rows) == 1:
        return normalized(rows[0])
    return normalized(rows[:k].sum(dim=0).add_(rows[k:].sum(dim=0), alpha=_SPARE_WEIGHT))


def _wantedness(values: Tensor, which: Which) -> Tensor:
    return {"LA": values, "SA": -values, "LM": values.abs()}[which]

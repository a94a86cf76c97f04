"""One run of restarted Lanczos, behind :func:`lightning_flatness.estimators.krylov.lanczos`.

Vectors are fully reorthogonalised and the operator is projected explicitly, so restarts, deflation and new random
directions need no special cases. Thick restarts bound the basis. The basis stays on the operator's device; only its
coefficients, one column per product, are copied to the CPU.

A Krylov space contains one eigenvector per eigenvalue and misses copies of a multiple eigenvalue (a linear model with
several outputs has every eigenvalue several times). For k > 1, products with a random vector orthogonal to the found
pairs search for them before the result counts as converged, until the probability of a miss is one in ten at most. For
k = 1 the run goes on until a larger eigenvalue would have shown, also if the start was an eigenvector already.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_flatness.estimators.krylov.basis import Basis, mixed
from lightning_flatness.estimators.krylov.misses import Look, would_have_shown
from lightning_flatness.estimators.operators import check_finite
from lightning_flatness.landscape.vectors import Vectors

Which = Literal["LA", "SA", "LM"]

_NUM_SPARE_VECTORS = 2
_NUM_CONFIRMING_PRODUCTS = 3
_SIZE_OF_A_MISS = 0.1
_SIZE_OF_A_SWAP = 0.05
_ROUNDING = 8
_ZERO = 1e-12  # an error of this share of the largest Ritz value is none
_NUM_HELD = 2
_MIN_ROOM = 4


@dataclass(frozen=True)
class EigenResult:
    """Extreme eigenvalues of a symmetric operator.

    Attributes:
        eigenvalues: Shape (k,), the most wanted first.
        residuals: Shape (k,), ``‖A y - theta y‖`` of each pair and the errors of the products, rounding included. Some
            eigenvalue lies within this distance of theta.
        eigenvectors: Shape (k, size), orthonormal rows.
        subspace: The eigenvectors and up to two more Ritz vectors, for a later start, shape (k to k + 2, size).
        converged: Whether all residuals are at most ``tol |theta|`` (of a theta of zero: ``tol`` times the largest), or
            1e-12 of the largest Ritz value: so zeros are known in float64, but not below the rounding of float32.
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

    The remainder has one vector for the newest row of Q, plus one for each row that was followed by a random direction
    instead. Of the latter, ``given_up`` keeps the coefficients, one row each, and ``held`` the last few vectors for a
    later return.
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        vectors: Vectors,
        k: int,
        which: Which,
        tol: float,
        max_basis: int,
        seed: int,
        product_error: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.product_error = product_error
        self.matvec = matvec
        self.vectors = vectors
        self.size = vectors.size
        self.k = k
        self.which = which
        self.tol = tol
        self.eps = torch.finfo(vectors.dtype).eps
        self.max_basis = max_basis
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.basis = Basis(max_basis, vectors, first_block=k + _NUM_SPARE_VECTORS)
        self.projection = torch.zeros(max_basis, max_basis, dtype=torch.float64, device="cpu")
        self.given_up = torch.zeros(0, max_basis, dtype=torch.float64, device="cpu")
        self.held: list[Tensor | None] = []
        self.look = Look(0, max_basis)
        self.is_start_random = True
        self.num_products = 0
        self.remainder = self.nothing = torch.empty(0, device="cpu")  # freed as soon as possible: it may be large

    def begin(self, start: Tensor | None, noise: float) -> None:
        """Set the first basis vector: the start vector (or a mixture of several) with noise, or a random one."""
        vector = self._start_vector(start, noise)
        self.basis.append(vector, self.vectors.norm(vector))

    def run(self, max_products: int) -> EigenResult:
        """Expand, project and restart until the wanted pairs have converged or the products are spent."""
        found, is_settled = None, False  # `found`: converged values; the run searches for missed ones
        while True:
            norm = self._expand()
            values, coefficients, residuals = self._ritz_pairs(norm)
            is_exhausted = self.num_products >= max_products and len(values) >= self.k
            is_last = is_exhausted or len(self.basis) == self.size
            if found is not None and self._is_better(values, found):
                found = None  # a more wanted value has appeared
            if found is None and self._are_converged(values, residuals):
                if is_last or is_settled or (self.k == 1 and self._is_most_wanted(values, norm)):
                    return self._result(values, coefficients, residuals, converged=True)
                if self.k > 1:
                    found = values[: self.k]
                    self.look.chance_before = 1.0
                    self._look_elsewhere(norm, coefficients, values)
                    continue
            if found is not None and (is_last or self._is_rest_settled(found, norm)):
                if is_last or self._are_converged(values, residuals):
                    return self._result(values, coefficients, residuals, converged=True)
                found, is_settled = None, True  # the search has changed the pairs
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
        """Multiply the newest basis vector, project, keep the remainder outside the basis, and return its norm."""
        newest = len(self.basis) - 1
        product = self.matvec(self.basis[newest])
        self.num_products += 1
        column, self.remainder, norm = self.basis.orthogonalize(product)
        check_finite(column, norm)
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
        if n < self.size:  # else the remainder is zero
            residuals += (self.given_up[:, :n] @ coefficients).abs().sum(dim=0)
        return values, coefficients, residuals

    def _tolerances(self, values: Tensor, wanted: Tensor) -> Tensor:
        """Return the tolerated residuals, no smaller than the errors of products allow."""
        noise, asked = self._noise(values), self.tol * wanted.abs()
        unreachable = torch.maximum(asked, _ROUNDING * self.eps * values.abs().max())
        return torch.where(asked - noise >= noise / 4, asked - noise, unreachable)

    def _noise(self, values: Tensor) -> Tensor:
        """Return the error of a product: rounding, and what the caller says."""
        return (_ROUNDING * self.eps + self.product_error()) * values.abs().max()

    def _are_converged(self, values: Tensor, residuals: Tensor) -> bool:
        wanted = values[: self.k]
        return len(wanted) == self.k and bool((residuals[: self.k] <= self._tolerances(values, wanted)).all())

    def _is_better(self, values: Tensor, found: Tensor) -> bool:
        gain = _wantedness(values[: self.k], self.which) - _wantedness(found, self.which)
        return bool((gain > self._tolerances(values, found)).any())

    def _is_most_wanted(self, values: Tensor, norm: float) -> bool:
        """Whether a clearly more wanted eigenvalue than the first would have shown by now."""
        first = _wantedness(values[0], self.which)
        limit = float(first + self._tolerances(values, first) + _SIZE_OF_A_SWAP * first.abs())
        start = self.look.direction[: len(self.basis)]
        return would_have_shown(self._signed(0), start, norm, limit, self.size, is_random=self.is_start_random)

    def _is_rest_settled(self, found: Tensor, norm: float) -> bool:
        """Whether a clearly more wanted eigenvalue than the last one found is unlikely."""
        last = _wantedness(found[-1], self.which)
        slack = float(_SIZE_OF_A_MISS * last.abs())
        limit = float(last + self._tolerances(found, last)) + slack
        return self.look.is_enough(self._signed(self.look.first), norm, limit, slack, self.size)

    def _signed(self, first: int) -> list[Tensor]:
        """Return the projection from a row on, once or with both signs: the wanted eigenvalues are the largest."""
        rest = self.projection[first : len(self.basis), first : len(self.basis)]
        return {"LA": [rest], "SA": [-rest], "LM": [rest, -rest]}[self.which]

    def _is_negligible(self, norm: float) -> bool:
        n = len(self.basis)
        return norm <= 8 * self.eps * float(torch.linalg.matrix_norm(self.projection[:n, :n], ord="fro"))

    def _look_elsewhere(self, norm: float, coefficients: Tensor, values: Tensor) -> None:
        """Continue with a random direction in place of the remainder."""
        self._give_up(norm)
        if self._room - len(self.basis) < _NUM_CONFIRMING_PRODUCTS:
            self._compress(coefficients[:, : self.k], values[: self.k])
        self.look = Look(len(self.basis), self.max_basis, self.look.chance_before)
        self._append_random_direction()

    def _give_up(self, norm: float) -> None:
        """Record that the remainder of the newest row does not become the next basis vector."""
        row = torch.zeros(1, self.max_basis, dtype=torch.float64, device="cpu")
        row[0, len(self.basis) - 1] = norm
        self.given_up = torch.cat([self.given_up, row])
        self.held.append(self.remainder)
        self.remainder = self.nothing
        num_held = max(0, min(_NUM_HELD, self.max_basis - self.k - _MIN_ROOM))
        for i in range(len(self.held) - num_held):
            self.held[i] = None

    @property
    def _room(self) -> int:
        """Largest number of rows of the basis beside the held vectors."""
        return self.max_basis - sum(vector is not None for vector in self.held)

    def _come_back(self, coefficients: Tensor, norm: float) -> float:
        """Return to an earlier remainder if it contributes more to the residuals; return the norm in use."""
        n = len(self.basis)
        needs = (self.given_up[:, :n] @ coefficients[:, : self.k]).abs().amax(dim=1)
        needs *= torch.tensor([float(vector is not None) for vector in self.held], dtype=torch.float64, device="cpu")
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
        random = self.vectors.gaussian(self.generator)
        if start is None or not 0 < float(self.vectors.norm(start.reshape(-1))) < math.inf:
            return random
        self.is_start_random = False
        # From an exact eigenvector a run would stay there; the noise has a component along newly wanted directions.
        known = mixed(start.to(random), self.k, self.vectors)
        sign = 1.0 if float(self.vectors.dot(known, random)) >= 0 else -1.0  # so that the two cannot cancel
        return known.add_(random, alpha=sign * noise / float(self.vectors.norm(random)))

    def _append_random_direction(self) -> None:
        """Add a random unit vector orthogonal to the basis."""
        _, vector, norm = self.basis.orthogonalize(self.vectors.gaussian(self.generator))
        self.basis.append(vector, norm)

    def _result(self, values: Tensor, coefficients: Tensor, residuals: Tensor, converged: bool) -> EigenResult:
        self.remainder = self.nothing
        self.held.clear()
        noise = self._noise(values)
        num_kept = min(self.k + _NUM_SPARE_VECTORS, len(values))
        self._compress(coefficients[:, :num_kept], values[:num_kept])
        zero, values, errors = _ZERO * float(values.abs().max()), values[: self.k], residuals[: self.k] + noise
        scales = torch.where(values.abs() <= errors, values.abs().max(), values.abs())
        subspace = self.basis.rows()
        return EigenResult(
            eigenvalues=values.to(self.basis.dtype).to(self.basis.device),
            residuals=errors.to(self.basis.dtype).to(self.basis.device),
            eigenvectors=subspace[: self.k],
            subspace=subspace,
            converged=converged and bool((errors <= (self.tol * scales).clamp(min=zero)).all()),
            num_products=self.num_products,
        )


def _wantedness(values: Tensor, which: Which) -> Tensor:
    return {"LA": values, "SA": -values, "LM": values.abs()}[which]

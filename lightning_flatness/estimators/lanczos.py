"""Lanczos: a few extreme eigenvalues of a symmetric operator, with their residuals.

Full reorthogonalisation and an explicitly projected matrix, so that restarts, deflation and fresh random
directions need no case of their own; thick restarts keep the basis bounded. The basis stays on the operator's
device; only its coefficients, a column per product, come to the CPU.

One Krylov space contains one eigenvector of each eigenvalue, so copies of a multiple eigenvalue (a linear model
with several outputs has every eigenvalue several times) would be missed. Where more than one pair is wanted, a
few products with a fresh random vector, orthogonal to what was found, look for them before the result counts as
converged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Which = Literal["LA", "SA", "LM"]

_NUM_SPARE_VECTORS = 2
_SPARE_WEIGHT = 0.3
_WARM_START_NOISE = 0.1
_NUM_CONFIRMING_PRODUCTS = 3
_CONFIRMING_TOLERANCE = 0.1
_BASIS_BYTES = 2**28
_BLOCK = 4


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


def lanczos(
    matvec: Callable[[Tensor], Tensor],
    size: int,
    *,
    k: int = 1,
    which: Which = "LA",
    tol: float = 1e-3,
    max_products: int = 300,
    max_basis: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> EigenResult:
    """Return ``k`` extreme eigenpairs of a symmetric operator by restarted Lanczos.

    A pair counts as converged when ``‖A y - theta y‖ <= tol |theta|`` (or rounding forbids more). The error of the
    eigenvalue itself is of the order of the residual's square over the gap to the rest of the spectrum.

    Args:
        matvec: Product of the operator with a vector of shape (size,).
        size: Dimension.
        k: Number of pairs.
        which: ``"LA"``: largest; ``"SA"``: smallest (most negative); ``"LM"``: of largest modulus.
        tol: Relative residual at which to stop.
        max_products: Products after which to stop in any case.
        max_basis: Vectors to keep at most. Default: 256 MiB of them, no fewer than k + 8, no more than 256.
        start: Vectors to start from, shape (size,) or (any, size): ``subspace`` of a previous result.
        seed: Seed of the random start.
        dtype: Of the vectors.
        device: Of the vectors.

    Returns:
        Values, residuals and vectors; ``converged`` is False if ``max_products`` came first.

    Raises:
        ValueError: If ``k``, ``which``, ``tol``, ``max_products`` or ``max_basis`` is out of range.
        RuntimeError: If a product is not finite.

    Example:
        >>> diagonal = torch.tensor([1.0, 5.0, -7.0, 2.0])
        >>> lanczos(lambda v: diagonal * v, 4, k=2, tol=1e-6).eigenvalues.round(decimals=4)
        tensor([5., 2.])
    """
    _check_arguments(size, k, which, tol, max_products, max_basis)
    if max_basis is None:
        max_basis = min(256, max(k + 8, _BASIS_BYTES // (size * dtype.itemsize)))
    solver = _Solver(matvec, size, k, which, tol, min(max_basis, size), seed, dtype, torch.device(device))
    return solver.run(start, max_products)


class _Solver:
    """State of one run: basis Q (rows), projection T = Q A Qᵀ, and what ``A Qᵀ - Qᵀ T`` is known to be.

    That remainder is one vector for the newest row of Q, plus one for every time that a fresh direction was taken
    in its place. Of those, the coefficients in the basis are kept, a row of ``given_up`` each, but not the vectors.
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
        self.basis = _Basis(size, dtype, device)
        self.projection = torch.zeros(max_basis, max_basis, dtype=torch.float64)
        self.given_up = torch.zeros(0, max_basis, dtype=torch.float64)
        self.num_products = 0

    def run(self, start: Tensor | None, max_products: int) -> EigenResult:
        self.basis.append(self._start_vector(start))
        found: Tensor | None = None  # converged values; what follows is a look at the rest of the space
        while True:
            last, norm = self._expand()
            values, coefficients, residuals = self._ritz_pairs(norm)
            complete = len(self.basis) == self.size
            exhausted = self.num_products >= max_products and len(values) >= self.k
            if found is not None and self._is_better(values, found):
                found = None  # there was more: go on as if nothing had been found
            if found is None and self._are_converged(values, residuals):
                if self.k > 1 and not complete and not exhausted:
                    found = values[: self.k]
                    self._give_up(norm)
                    self._compress(coefficients[:, : self.k], found)
                    self.basis.append(self._random_direction())
                    continue
                return self._result(values, coefficients, residuals, converged=True)
            if found is not None and (complete or exhausted or self._is_rest_settled(values, residuals)):
                return self._result(values, coefficients, residuals, converged=True)
            if exhausted:
                return self._result(values, coefficients, residuals, converged=False)
            if len(self.basis) == self.max_basis:
                num_kept = min(self.k + (self.max_basis - self.k) // 2, self.max_basis - 1)
                self._compress(coefficients[:, :num_kept], values[:num_kept])
            if self._is_negligible(norm):  # an invariant subspace
                self.basis.append(self._random_direction())
            else:
                self.basis.append(last / norm)

    def _expand(self) -> tuple[Tensor, float]:
        """Multiply the newest basis vector, project, and return what sticks out of the basis, and its norm."""
        newest = len(self.basis) - 1
        product = self.matvec(self.basis[newest])
        self.num_products += 1
        column, remainder = self.basis.orthogonalize(product)
        norm = float(torch.linalg.vector_norm(remainder))
        if not (torch.isfinite(column).all() and norm < float("inf")):
            raise RuntimeError(
                "Expected finite Hessian-vector products, got one that is not. Check the gradient of the loss at the "
                "current weights (e.g. a square root or a norm at zero), or measure in float64."
            )
        self.projection[newest, : newest + 1] = column
        self.projection[: newest + 1, newest] = column
        return remainder, 0.0 if len(self.basis) == self.size else norm

    def _ritz_pairs(self, norm: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values, coefficients (columns) and residual norms, the most wanted first."""
        n = len(self.basis)
        values, coefficients = torch.linalg.eigh(self.projection[:n, :n])
        key = {"LA": -values, "SA": values, "LM": -values.abs()}[self.which]
        order = torch.argsort(key, stable=True)
        values, coefficients = values[order], coefficients[:, order]
        given_up = (self.given_up[:, :n] @ coefficients).abs().sum(dim=0)
        return values, coefficients, (norm * coefficients[-1]).abs() + given_up

    def _tolerances(self, values: Tensor, wanted: Tensor) -> Tensor:
        """Return the residuals that are small enough; rounding forbids less than a little of the norm."""
        return torch.maximum(self.tol * wanted.abs(), 8 * self.eps * values.abs().max())

    def _are_converged(self, values: Tensor, residuals: Tensor) -> bool:
        wanted = values[: self.k]
        return len(wanted) == self.k and bool((residuals[: self.k] <= self._tolerances(values, wanted)).all())

    def _is_better(self, values: Tensor, found: Tensor) -> bool:
        gain = _wantedness(values[: self.k], self.which) - _wantedness(found, self.which)
        return bool((gain > self._tolerances(values, found)).any())

    def _is_rest_settled(self, values: Tensor, residuals: Tensor) -> bool:
        """Whether the best pair beyond the wanted ones has converged, or clearly is worse than they are."""
        if len(values) <= self.k + _NUM_CONFIRMING_PRODUCTS - 1:
            return False
        rest, residual = values[self.k], residuals[self.k]
        is_worse = _wantedness(rest, self.which) + residual < _wantedness(values[self.k - 1], self.which)
        is_rough = residual > _CONFIRMING_TOLERANCE * rest.abs()
        return bool((is_worse and not is_rough) or residual <= self._tolerances(values, rest))

    def _is_negligible(self, norm: float) -> bool:
        n = len(self.basis)
        return norm <= 8 * self.eps * float(torch.linalg.matrix_norm(self.projection[:n, :n], ord="fro"))

    def _give_up(self, norm: float) -> None:
        """Note that the remainder of the newest row will not become a basis vector."""
        row = torch.zeros(1, self.max_basis, dtype=torch.float64)
        row[0, len(self.basis) - 1] = norm
        self.given_up = torch.cat([self.given_up, row])

    def _compress(self, coefficients: Tensor, values: Tensor) -> None:
        """Replace the basis by the Ritz vectors with these coefficients."""
        n, num_kept = coefficients.shape
        given_up = self.given_up[:, :n] @ coefficients
        self.basis.rotate(coefficients)
        self.projection.zero_()
        self.projection[:num_kept, :num_kept] = torch.diag(values)
        self.given_up.zero_()
        self.given_up[:, :num_kept] = given_up

    def _start_vector(self, start: Tensor | None) -> Tensor:
        noise = _normalized(self._random_vector())
        if start is None or not torch.isfinite(start).all() or not start.any():
            return noise
        # The spare vectors and the noise let a direction in that has become more wanted than those that were: from
        # the old top vector alone, a run can converge to it after two eigenvalues have changed places.
        rows = start.reshape(-1, self.size).to(noise)
        vector = rows[: self.k].sum(dim=0) + _SPARE_WEIGHT * rows[self.k :].sum(dim=0)
        return _normalized(_normalized(vector) + _WARM_START_NOISE * noise)

    def _random_direction(self) -> Tensor:
        """Return a random unit vector orthogonal to the basis."""
        _, vector = self.basis.orthogonalize(self._random_vector())
        return _normalized(vector)

    def _random_vector(self) -> Tensor:
        vector = torch.randn(self.size, generator=self.generator, dtype=self.basis.dtype)
        return vector.to(self.basis.device)

    def _result(self, values: Tensor, coefficients: Tensor, residuals: Tensor, converged: bool) -> EigenResult:
        num_kept = min(self.k + _NUM_SPARE_VECTORS, len(values))
        self._compress(coefficients[:, :num_kept], values[:num_kept])
        values, residuals = values[: self.k], residuals[: self.k]
        subspace = torch.stack([self.basis[i] for i in range(num_kept)])
        return EigenResult(
            eigenvalues=values.to(self.basis.dtype).to(self.basis.device),
            residuals=residuals.to(self.basis.dtype).to(self.basis.device),
            eigenvectors=subspace[: self.k],
            subspace=subspace,
            converged=converged,
            num_products=self.num_products,
        )


class _Basis:
    """Orthonormal rows, stored in blocks so that memory grows with use and products are matrix products."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size = size
        self.dtype = dtype
        self.device = device
        self._blocks: list[Tensor] = []
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Tensor:
        return self._blocks[index // _BLOCK][index % _BLOCK]

    def append(self, vector: Tensor) -> None:
        if self._num_rows == len(self._blocks) * _BLOCK:
            self._blocks.append(torch.empty(_BLOCK, self.size, dtype=self.dtype, device=self.device))
        self._num_rows += 1
        self[self._num_rows - 1].copy_(vector)

    def _filled(self) -> list[Tensor]:
        return [block[: self._num_rows - i * _BLOCK] for i, block in enumerate(self._blocks) if i * _BLOCK < len(self)]

    def orthogonalize(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients of a vector in the basis, and what is left of it; twice is enough."""
        remainder, total = vector, torch.zeros(len(self), dtype=torch.float64)
        for _ in range(2):
            coefficients = [block @ remainder for block in self._filled()]
            for block, c in zip(self._filled(), coefficients, strict=True):
                remainder = torch.addmv(remainder, block.T, c, alpha=-1)
            total += torch.cat(coefficients).cpu().double()
        return total, remainder

    def rotate(self, coefficients: Tensor) -> None:
        """Replace the rows by the combinations that the columns of ``coefficients`` name, a strip at a time."""
        mixing = coefficients.T.to(self.dtype).to(self.device)
        width = max(1, 2**22 // self._num_rows)
        for first in range(0, self.size, width):
            strip = torch.cat([block[:, first : first + width] for block in self._filled()])
            for row, values in enumerate(mixing @ strip):
                self[row][first : first + width] = values
        self._num_rows = coefficients.shape[1]
        del self._blocks[-(-self._num_rows // _BLOCK) :]


def _normalized(vector: Tensor) -> Tensor:
    unit: Tensor = vector / torch.linalg.vector_norm(vector)
    return unit


def _wantedness(values: Tensor, which: Which) -> Tensor:
    return {"LA": values, "SA": -values, "LM": values.abs()}[which]


def _check_arguments(size: int, k: int, which: str, tol: float, max_products: int, max_basis: int | None) -> None:
    if which not in ("LA", "SA", "LM"):
        raise ValueError(f"Expected `which` to be 'LA', 'SA' or 'LM', got {which!r}.")
    if not 1 <= k <= size:
        raise ValueError(
            f"Expected `k` to be between 1 and the number of coordinates, {size}, got {k}. Ask for fewer eigenvalues."
        )
    if not tol >= 0:
        raise ValueError(f"Expected `tol` to be >= 0, got {tol}.")
    if max_products < 1:
        raise ValueError(f"Expected `max_products` to be >= 1, got {max_products}.")
    if max_basis is not None and max_basis < min(k + 2, size):
        raise ValueError(f"Expected `max_basis` to be >= k + 2 = {k + 2}, got {max_basis}.")

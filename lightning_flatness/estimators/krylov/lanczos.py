"""Lanczos: a few extreme eigenvalues of a symmetric operator, with their residuals."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_flatness.estimators.krylov.solver import EigenResult, KrylovSolver, Which
from lightning_flatness.landscape.vectors import Vectors

TOLERANCE = 1e-2
"""Relative residual of eigenvalues: the default of metrics, of the monitor and of comparisons.

Chosen by ``examples/benchmarks/tolerance.py``.
"""

_BASIS_BYTES = 2**28


def lanczos(
    matvec: Callable[[Tensor], Tensor],
    size: int,
    *,
    k: int = 1,
    which: Which = "LA",
    tol: float = TOLERANCE,
    max_products: int = 300,
    max_basis: int | None = None,
    start: Tensor | None = None,
    start_noise: float = 0.03,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    product_error: Callable[[], float] = lambda: 0.0,
    vectors: Vectors | None = None,
) -> EigenResult:
    """Return ``k`` extreme eigenpairs of a symmetric operator by restarted Lanczos.

    A pair counts as converged when ``‖A y - theta y‖``, errors of the products included, is at most ``tol |theta|``.
    Where those errors forbid that, the run ends without convergence. The error of the eigenvalue itself is of the order
    of the residual's square over the gap to the rest of the spectrum.

    A small residual shows that theta is near *an* eigenvalue. For k = 1 the run goes on until an eigenvalue that is 5 %
    more wanted would have shown, unless its eigenvector has a tenth of the length of ``start`` at most; from a random
    start it is missed in one of ten runs at most. For k > 1, random restarts search for missed eigenvalues, copies of
    multiple ones among them, until one that is 10 % more wanted than the last pair is missed in one of ten runs at
    most, or until ``max_products``.

    Args:
        matvec: Product of the operator with a vector of shape (size,). Its result is overwritten.
        size: Dimension.
        k: Number of pairs.
        which: ``"LA"``: largest; ``"SA"``: smallest (most negative); ``"LM"``: of largest modulus.
        tol: Relative residual at which to stop.
        max_products: Largest number of products.
        max_basis: Largest number of vectors to keep. Default: 256 MiB of them, but at least k + 8 and 2 k + 2.
        start: Vectors to start from, shape (size,) or (any, size): ``subspace`` of a previous result.
        start_noise: Length of the random vector added to the direction of ``start``, so that directions without a
            component in ``start`` can be found.
        seed: Seed of the random vectors.
        dtype: Of the vectors.
        device: Of the vectors.
        product_error: Returns the error of the products so far, rounding of ``dtype`` aside, relative to the norm of
            the operator.
        vectors: Where vectors are, if not whole in this process: ``size`` is then of all ranks, and the shapes of
            vectors are those of this rank's entries. All ranks have to call this together.

    Returns:
        Values, residuals and vectors; ``converged`` is False if ``max_products`` or rounding came first.

    Raises:
        ValueError: If ``k``, ``which``, ``tol``, ``max_products`` or ``max_basis`` is out of range.
        RuntimeError: If a product is not finite.

    Example:
        >>> diagonal = torch.tensor([1.0, 5.0, -7.0, 2.0])
        >>> lanczos(lambda v: diagonal * v, 4, k=2, tol=1e-6).eigenvalues.round(decimals=4)
        tensor([5., 2.])
    """
    _check_arguments(size, k, which, tol, max_products, max_basis)
    vectors = Vectors(size, dtype, torch.device(device)) if vectors is None else vectors
    if max_basis is None:
        num_fitting = _BASIS_BYTES // (vectors.largest_local_size * vectors.dtype.itemsize)
        max_basis = min(max(256, 2 * k + 2), max(k + 8, 2 * k + 2, num_fitting))
    solver = KrylovSolver(matvec, vectors, k, which, tol, min(max_basis, size), seed, product_error)
    solver.begin(start, start_noise)
    del start  # frees its memory if nothing else refers to it
    return solver.run(max_products)


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

"""Eigenvalues of the Hessian as metrics."""

from __future__ import annotations

from torch import Tensor

from lightning_flatness.estimators import EigenResult, Operator, Which, top_eigenvalues
from lightning_flatness.estimators.krylov import mixed
from lightning_flatness.estimators.operators import check_operator
from lightning_flatness.geometry import Geometry, resolve_geometry
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.metrics.base import FlatnessMetric


class TopEigenvalues(FlatnessMetric):
    r"""The largest eigenvalues of the Hessian of the loss at the current weights; the first is lambda_max.

    Eigenvalues ``theta_1 >= ... >= theta_k`` of the second derivative of ``z -> L(w(z))`` at ``z = 0``, by Lanczos.
    In the Euclidean geometry this is the Hessian itself, and ``theta_1`` the lambda_max of arXiv 2206.10654; units are
    loss per weight squared. In ``"layer"``, ``"filter"`` and ``"element"`` the values are per *relative* change of the
    weights and stay put when layers, filters or single weights are rescaled without changing the function.

    A measurement costs one gradient and two per Hessian-vector product: 10 to 20 products for k = 1 from a random
    start, half of that when an earlier ``update`` and the gradient provide the start. Memory: the basis, a few tens of
    vectors at most.

    Args:
        k: Number of eigenvalues.
        geometry: ``"euclidean"``, ``"layer"``, ``"filter"``, ``"element"``, or a ``Geometry``.
        which: ``"LA"``: largest; ``"SA"``: most negative; ``"LM"``: of largest modulus.
        tol: Relative residual ``‖H y - theta y‖ / |theta|`` to reach. The relative error of the eigenvalue is mostly
            far smaller, of the order of its square.
        max_products: Hessian-vector products to stop at in any case; ``converged`` is then False.
        max_basis: Vectors of the size of the weights to keep at most.
        seed: Seed of the random start.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix, which needs an :class:`OutputLoss`.
        shared_start: Start from the sharpest directions that another metric has found in another geometry, in the same
            measurement. Saves products; the value then depends on that metric, within its residual.

    Raises:
        ValueError: If an argument is out of range. ``k`` is checked against the number of parameters in ``update``.

    Example:
        >>> import torch
        >>> from lightning_flatness import LossLandscape, TopEigenvalues
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [torch.tensor([[1.0, 0.0], [0.0, 3.0]])]
        >>> landscape = LossLandscape(module, batches, lambda module, x: module(x).square().mean())
        >>> metric = TopEigenvalues(k=2)
        >>> metric.update(landscape)
        >>> metric.compute().round(decimals=3)  # of 2 · mean x xᵀ = diag(1, 9)
        tensor([9., 1.])
    """

    def __init__(
        self,
        k: int = 1,
        geometry: str | Geometry = "euclidean",
        which: Which = "LA",
        tol: float = 1e-3,
        max_products: int = 300,
        max_basis: int | None = None,
        seed: int = 0,
        operator: Operator = "hessian",
        shared_start: bool = False,
    ) -> None:
        check_operator(operator)
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"Expected `k` to be an integer >= 1, got {k!r}.")
        if which not in ("LA", "SA", "LM"):
            raise ValueError(f"Expected `which` to be 'LA', 'SA' or 'LM', got {which!r}.")
        if not tol >= 0:
            raise ValueError(f"Expected `tol` to be >= 0, got {tol}.")
        super().__init__(shape=(k,))
        self.k = k
        self.geometry = resolve_geometry(geometry)
        self.which: Which = which
        self.tol = tol
        self.max_products = max_products
        self.max_basis = max_basis
        self.seed = seed
        self.operator: Operator = operator
        self.shared_start = shared_start
        self.distinguish(k, self.geometry, which, tol, max_products, max_basis, seed, operator, shared_start)
        self._previous: Tensor | None = None

    def reset(self) -> None:
        """Forget the latest value, and its eigenvectors as a start of the next measurement."""
        super().reset()
        self._previous = None

    def measure(self, landscape: LossLandscape) -> None:
        """Find the eigenvalues, starting from the eigenvectors of the previous measurement."""
        result = self._solve(landscape)
        self.store(result.eigenvalues, result.residuals, converged=result.converged, num_products=result.num_products)

    def _solve(self, landscape: LossLandscape) -> EigenResult:
        result = top_eigenvalues(
            landscape,
            self.geometry,
            operator=self.operator,
            k=self.k,
            which=self.which,
            tol=self.tol,
            max_products=self.max_products,
            max_basis=self.max_basis,
            start=self._previous,
            shared_start=self.shared_start,
            seed=self.seed,
        )
        self._previous = mixed(result.subspace, self.k)  # all that a start takes from them, in the memory of one
        return result


class SpectralNorm(TopEigenvalues):
    """The largest modulus of an eigenvalue of the Hessian in a geometry, a scalar: what named sharpness measures share.

    Args:
        geometry: The coordinates.
        tol: Relative residual to reach.
        max_products: Hessian-vector products to stop at in any case.
        max_basis: Vectors of the size of the weights to keep at most.
        seed: Seed of the random start.
        shared_start: See :class:`TopEigenvalues`.
    """

    def __init__(
        self,
        geometry: str | Geometry,
        tol: float,
        max_products: int,
        max_basis: int | None,
        seed: int,
        shared_start: bool = False,
    ) -> None:
        super().__init__(
            k=1,
            geometry=geometry,
            which="LM",
            tol=tol,
            max_products=max_products,
            max_basis=max_basis,
            seed=seed,
            shared_start=shared_start,
        )
        self.add_state("value", self.value.squeeze(0), dist_reduce_fx=self._reductions["value"])
        self.add_state("error", self.error.squeeze(0), dist_reduce_fx=self._reductions["error"])

    def measure(self, landscape: LossLandscape) -> None:
        """Find the eigenvalue of largest modulus and keep its modulus."""
        result = self._solve(landscape)
        self.store(
            result.eigenvalues[0].abs(),
            result.residuals[0],
            converged=result.converged,
            num_products=result.num_products,
        )


class InvariantSharpness(SpectralNorm):
    r"""The rescaling-invariant sharpness of arXiv 1902.02434: the spectral norm of the Riemannian Hessian.

    With the metric ``<u, v>_w = sum_i <u_i, v_i> / ‖w_i‖_F²`` over the parameter tensors ``w_i``, this is

        max |eigenvalue| of D^(1/2) H D^(1/2),   D = blockdiag(‖w_i‖_F² I),

    the curvature of the loss per relative change of a layer. Rescaling the layers by factors with product one (and
    the biases by the running products) does not change a ReLU network, and does not change this number. Dimension:
    that of the loss. Costs as :class:`TopEigenvalues` with ``k=1``.

    Args:
        tol: Relative residual to reach.
        max_products: Hessian-vector products to stop at in any case.
        max_basis: Vectors of the size of the weights to keep at most.
        seed: Seed of the random start.
        shared_start: See :class:`TopEigenvalues`; with lambda_max measured before, fewer products do.

    Example:
        >>> import torch
        >>> from lightning_flatness import InvariantSharpness, LossLandscape
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> module.weight.data = torch.tensor([[3.0, 4.0]])
        >>> batches = [torch.tensor([[1.0, 0.0], [0.0, 3.0]])]
        >>> metric = InvariantSharpness()
        >>> metric.update(LossLandscape(module, batches, lambda module, x: module(x).square().mean()))
        >>> metric.compute()  # ‖w‖² · lambda_max = 25 · 9
        tensor(225.0000)
    """

    def __init__(
        self,
        tol: float = 1e-3,
        max_products: int = 300,
        max_basis: int | None = None,
        seed: int = 0,
        shared_start: bool = False,
    ) -> None:
        super().__init__("layer", tol, max_products, max_basis, seed, shared_start)

"""PSI-flatness: sharpness and balance of a ReLU network in terms of its paths, as metrics."""

from __future__ import annotations

from typing import Literal

from lightning_flatness.estimators import TOLERANCE, Estimate, UndefinedMeasureError, basis_path_balance
from lightning_flatness.geometry import PathGeometry, PathNormGeometry, UndefinedGeometryError
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.metrics.base import FlatnessMetric
from lightning_flatness.metrics.eigenvalues import SpectralNorm


class PSISharpness(SpectralNorm):
    r"""The spectral norm of the Hessian of the loss in terms of the paths of a ReLU network, at the current weights.

    It is a curvature of the loss that is the same for networks that differ by a positive rescaling or a permutation of
    units (PSI-flatness of arXiv 1903.02237; our definitions in its spirit).

    With ``geometry="path_norm"``, the recommended one, every weight is measured by the paths that lead through it (see
    :class:`PathNormGeometry`): ``max |eigenvalue|`` of ``K^(-1/2) H K^(-1/2)`` with ``K = diag(kappa)``. It needs no
    choice of a basis, and is defined for every network of positively homogeneous units. Basis paths
    did not order 32 MLPs and CNNs better by their generalisation gap (difference of Kendall's tau -0.05, 95 % interval
    -0.25 to 0.10); no verdict favours either, and ``"element"`` orders them (``examples/studies/which_measure.py``).

    With ``geometry="path"`` it is ``max |eigenvalue|`` of ``d²L(w(v)) / dv²``, with ``v`` the values of the basis paths
    of a chain (see :class:`PathGeometry`). Units: loss per squared path value. Paths are products of as many weights as
    there are layers, so the number is best looked at on a log scale, and the units whose skeleton path is smallest
    dominate it.

    Costs as :class:`TopEigenvalues` with ``k=1``, and one gradient more per measurement; the chart of basis paths holds
    eight vectors of the size of the weights.

    In ``FlatnessMonitor(metrics={"psi_sharpness": PSISharpness()})`` the value is ``flatness/psi_sharpness`` and its
    error ``flatness_errors/psi_sharpness_residual``.

    Args:
        submodule: Name of the part of the module that is the chain, for ``"path"`` only. Default: the module's
            ``forward``.
        tol: Relative Ritz residual to reach.
        max_products: Hessian-vector products to stop at in any case; ``converged`` is then False.
        max_basis: Vectors of the size of the weights to keep at most.
        seed: Seed of the random start.
        geometry: ``"path_norm"`` or ``"path"``. Default: ``"path"`` where ``submodule`` names a chain, else
            ``"path_norm"``.

    Raises:
        TypeError: If ``submodule`` is neither a name nor None.
        ValueError: If an argument is out of range; in ``update``, if the module is not a chain, or not positively
            homogeneous.

    Example:
        Two weights in a row, ``L = (w2 w1 x - y)²``, depend on one path, ``v = w1 w2``: ``d²L/dv² = 2 x²``.

        >>> import torch
        >>> from lightning_flatness import LossLandscape, PSISharpness
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
        >>> batches = [torch.tensor([[3.0]])]
        >>> metric = PSISharpness(geometry="path")
        >>> metric.update(LossLandscape(net, batches, lambda net, x: (net(x) - 1).square().mean()))
        >>> metric.compute().round()
        tensor(18.)
    """

    def __init__(
        self,
        submodule: str | None = None,
        tol: float = TOLERANCE,
        max_products: int = 300,
        max_basis: int | None = None,
        seed: int = 0,
        geometry: Literal["path", "path_norm"] | None = None,
    ) -> None:
        chosen = geometry or ("path_norm" if submodule is None else "path")
        if chosen not in ("path", "path_norm"):
            raise ValueError(f"Expected `geometry` to be 'path' or 'path_norm', got {geometry!r}.")
        if chosen == "path_norm" and submodule is not None:
            raise ValueError(
                f"Expected `submodule` for the geometry 'path' only, got {submodule!r} with 'path_norm', which finds "
                "the network by itself. Leave one of them out."
            )
        super().__init__(
            PathNormGeometry() if chosen == "path_norm" else PathGeometry(submodule),
            tol=tol,
            max_products=max_products,
            max_basis=max_basis,
            seed=seed,
        )
        self.submodule = submodule

    def estimate(self, landscape: LossLandscape) -> Estimate:
        """Find the eigenvalue."""
        try:
            return super().estimate(landscape)
        except UndefinedGeometryError as error:
            raise UndefinedMeasureError(str(error)) from error


class BasisPathBalance(FlatnessMetric):
    r"""The balance of a ReLU network at its current weights: the largest basis path over the smallest one.

        max_e |v_e| / min_e |v_e|

    over all basis paths ``e`` (see :class:`PathGeometry`); it bounds the generalisation error in arXiv 1903.02237.
    Small is balanced and flat; one is the least. The minimum is an order statistic of near-zero weights: it says how
    close to zero the nearest weight happens to be, and differs by decades between seeds. ``quantile=q`` returns the
    ratio of the quantiles ``1 - q`` and ``q`` of the moduli instead, which is ours and not the paper's. The ratio spans
    many decades: ``log10=True`` returns its decimal logarithm. A bias that is zero, as some initialisations leave it,
    makes the ratio of the extremes infinite. Invariant under every positive rescaling of units and every permutation.
    Costs no evaluation of the loss; the error is zero.

    In ``FlatnessMonitor(metrics={"log10_balance": BasisPathBalance(log10=True)})`` the keys are
    ``flatness/log10_balance`` and ``flatness_errors/log10_balance_residual``.

    Args:
        submodule: Name of the part of the module that is the chain. Default: the module's ``forward``.
        log10: Whether to return the decimal logarithm.
        ignore_zeros: Whether to leave out paths whose value is exactly zero (pruned weights, zero biases).
        quantile: Share of the paths to leave out at each end, from 0 (the paper's ratio) to below 0.5; e.g. 0.1.

    Raises:
        TypeError: If ``submodule`` is neither a name nor None.
        ValueError: In ``update``, if the module is not a chain.

    Example:
        >>> import torch
        >>> from lightning_flatness import BasisPathBalance, LossLandscape
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 2, bias=False))
        >>> net[0].weight.data, net[1].weight.data = torch.tensor([[2.0]]), torch.tensor([[3.0], [-300.0]])
        >>> metric = BasisPathBalance(log10=True)
        >>> metric.update(LossLandscape(net, [torch.ones(1, 1)], lambda net, x: net(x).mean()))
        >>> metric.compute()  # paths 6 and -600
        tensor(2.)
    """

    estimator = staticmethod(basis_path_balance)

    def __init__(
        self,
        submodule: str | None = None,
        log10: bool = False,
        ignore_zeros: bool = False,
        quantile: float = 0.0,
    ) -> None:
        super().__init__(geometry=PathGeometry(submodule), log10=log10, ignore_zeros=ignore_zeros, quantile=quantile)
        self.submodule = submodule

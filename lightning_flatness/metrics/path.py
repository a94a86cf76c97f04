"""PSI-flatness: sharpness and balance of a ReLU network in the values of its basis paths, as metrics."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flatness.geometry import PathChart, PathGeometry
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.metrics.base import FlatnessMetric
from lightning_flatness.metrics.eigenvalues import SpectralNorm


class PSISharpness(SpectralNorm):
    r"""The spectral norm of the Hessian of the loss in the values of basis paths, at the current weights.

    With ``v`` the values of the basis paths of a ReLU chain (see :class:`PathGeometry`) this is

        max |eigenvalue| of d²L(w(v)) / dv²,

    the curvature of the loss in the space where networks that differ by a rescaling of units are one point
    (PSI-flatness of arXiv 1903.02237; our definition in its spirit). Units: loss per squared path value. Paths are
    products of as many weights as there are layers, so the number is large and best looked at on a log scale, and it
    is dominated by the units whose skeleton path is smallest. Invariant under every positive rescaling of units.

    Costs as :class:`TopEigenvalues` with ``k=1``, and one gradient more per measurement; the chart holds seven vectors
    of the size of the weights.

    In ``FlatnessMonitor(metrics={"psi_sharpness": PSISharpness()})`` the keys are ``flatness/psi_sharpness`` and
    ``flatness/psi_sharpness_residual``.

    Args:
        submodule: Name of the part of the module that is the chain. Default: the module's ``forward``.
        tol: Relative Ritz residual to reach.
        max_products: Hessian-vector products to stop at in any case; ``converged`` is then False.
        max_basis: Vectors of the size of the weights to keep at most.
        seed: Seed of the random start.

    Raises:
        TypeError: If ``submodule`` is neither a name nor None.
        ValueError: If an argument is out of range; in ``update``, if the module is not a chain.

    Example:
        Two weights in a row, ``L = (w2 w1 x - y)²``, depend on one path, ``v = w1 w2``: ``d²L/dv² = 2 x²``.

        >>> import torch
        >>> from lightning_flatness import LossLandscape, PSISharpness
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
        >>> batches = [torch.tensor([[3.0]])]
        >>> metric = PSISharpness()
        >>> metric.update(LossLandscape(net, batches, lambda net, x: (net(x) - 1).square().mean()))
        >>> metric.compute().round()
        tensor(18.)
    """

    def __init__(
        self,
        submodule: str | None = None,
        tol: float = 1e-3,
        max_products: int = 300,
        max_basis: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(PathGeometry(submodule), tol, max_products, max_basis, seed)


class BasisPathBalance(FlatnessMetric):
    r"""The balance of a ReLU network at its current weights: the largest basis path over the smallest one.

        max_e |v_e| / min_e |v_e|

    over all basis paths ``e`` (see :class:`PathGeometry`); it bounds the generalisation error in arXiv 1903.02237.
    Small is balanced and flat; one is the least. It spans many decades: ``log10=True`` returns its decimal logarithm,
    which is the thing to plot. A bias that is zero, as some initialisations leave it, makes it infinite. Invariant
    under every positive rescaling of units. Costs no evaluation of the loss; the error is zero.

    In ``FlatnessMonitor(metrics={"log10_balance": BasisPathBalance(log10=True)})`` the keys are
    ``flatness/log10_balance`` and ``flatness/log10_balance_residual``.

    Args:
        submodule: Name of the part of the module that is the chain. Default: the module's ``forward``.
        log10: Whether to return the decimal logarithm.
        ignore_zeros: Whether to leave out paths whose value is exactly zero (pruned weights, zero biases).

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

    def __init__(self, submodule: str | None = None, log10: bool = False, ignore_zeros: bool = False) -> None:
        super().__init__()
        self.geometry = PathGeometry(submodule)
        self.log10 = log10
        self.ignore_zeros = ignore_zeros
        self.distinguish(self.geometry, log10, ignore_zeros)

    def measure(self, landscape: LossLandscape) -> None:
        """Compare the paths at the current weights."""
        chart = landscape.chart(self.geometry)
        assert isinstance(chart, PathChart)
        balance = basis_path_balance(chart.values, ignore_zeros=self.ignore_zeros)
        value = (balance.log10() if self.log10 else balance).to(landscape.dtype)
        self.store(value, torch.zeros_like(value), converged=True, num_products=0)


def basis_path_balance(values: Tensor, *, ignore_zeros: bool = False) -> Tensor:
    """Return the largest modulus of the values of basis paths over the smallest one.

    Args:
        values: Shape (number of paths,).
        ignore_zeros: Whether to leave out values that are exactly zero.

    Returns:
        A scalar in float64 on the CPU, 1 or more; infinite if a value is zero.

    Example:
        >>> basis_path_balance(torch.tensor([-8.0, 2.0, 0.0]), ignore_zeros=True)
        tensor(4., dtype=torch.float64)
    """
    moduli = values.abs()
    if ignore_zeros:
        moduli = moduli[moduli > 0]
    return moduli.amax().cpu().double() / moduli.amin().cpu().double()

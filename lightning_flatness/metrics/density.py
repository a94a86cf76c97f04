"""The spectral density of the Hessian as a metric, and its picture."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lightning_flatness.estimators import Operator, spectral_density
from lightning_flatness.estimators.density import LEAST, NUM_MOMENTS
from lightning_flatness.geometry import Geometry
from lightning_flatness.metrics.base import Curve, FlatnessMetric, arguments

_FLOOR = 1e-7
"""The lowest density drawn, relative to the peak."""


class SpectralDensity(FlatnessMetric):
    r"""The density of all eigenvalues of the Hessian of the loss at the current weights.

    Estimates ``rho(x) = 1/n sum_i N(x; lambda_i, sigma²)`` over a grid by stochastic Lanczos quadrature
    (arXiv 1901.10159): the average over ``num_runs`` random vectors of the quadratures that ``num_steps`` Lanczos steps
    from each give. The density integrates to one; it is per coordinate ``z`` of the geometry, and has its invariances.
    The errors are the standard errors over the runs, without the error of the smoothing.

    ``compute()`` returns the density over :attr:`grid`. Beside it there are the moments ``tr(H^p)/n`` and the share of
    negative eigenvalues; in the ``FlatnessMonitor`` those are the curves, and the density is an image.

    A measurement costs one gradient and two per product, 652 by default; ``gradient_evaluations`` says how many it was.
    Memory: ``num_steps`` vectors of the size of the weights. If there are no more coordinates than
    ``num_runs · num_steps``, the spectrum is exact and ``num_runs`` is reported as 0.

    Args:
        geometry: ``"euclidean"``, ``"layer"``, ``"filter"``, ``"element"``, … or a ``Geometry``.
        operator: ``"hessian"``, or ``"ggn"`` for the Gauss-Newton matrix, which needs an :class:`OutputLoss`.
        num_runs: Independent random vectors, 2 at least; their scatter is the error.
        num_steps: Lanczos steps from each, 3 at least.
        num_points: Points of the grid, which reaches from below the smallest to above the largest eigenvalue found.
        width: Standard deviation sigma of the smoothing, relative to the range of the spectrum.
        tol: Standard error of the density, integrated over the grid, at which it counts as converged.
        seed: Seed of the random vectors.

    Attributes:
        grid: Where the density is given, shape (num_points,), in units of eigenvalues.
        moments: ``tr(H^p)/n`` for p = 1 … 4, of the eigenvalues themselves.
        moment_errors: Their standard errors over the random vectors; ``converged`` is about the density, not them.
        moment_standard_errors: Those of the first two for the whole training set.
        negative_share: Share of the eigenvalues below zero (beyond rounding).
        negative_share_error: Its standard error, and what so many steps leave open about eigenvalues around zero. Read
            the share as the interval from it less to it plus this: by itself it can be several times too large.
        num_runs_used: Random vectors behind the values; 0 where they are exact.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from lightning_flatness import LossLandscape, SpectralDensity
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> batches = [torch.tensor([[1.0, 0.0], [0.0, 3.0]])]
        >>> metric = SpectralDensity()
        >>> metric.update(LossLandscape(module, batches, lambda module, x: module(x).square().mean()))
        >>> metric.moments[:2]  # of the eigenvalues 1 and 9
        tensor([ 5., 41.])
        >>> metric.compute().shape
        torch.Size([256])
    """

    error_name = "numerical_error"
    effort = "num_runs"
    estimator = staticmethod(spectral_density)
    least = LEAST

    grid: Tensor
    moments: Tensor
    moment_errors: Tensor
    moment_standard_errors: Tensor
    negative_share: Tensor
    negative_share_error: Tensor
    num_runs_used: Tensor
    num_steps: int

    def __init__(
        self,
        geometry: str | Geometry = "euclidean",
        operator: Operator = "hessian",
        num_runs: int = 10,
        num_steps: int = 30,
        num_points: int = 256,
        width: float = 0.01,
        tol: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(shape=(num_points,), **arguments(locals()))
        self._add_states(grid=[torch.nan] * num_points, negative_share=torch.nan, negative_share_error=torch.nan)
        self._add_states(moments=[torch.nan] * NUM_MOMENTS, moment_errors=[torch.nan] * NUM_MOMENTS, num_runs_used=0)
        self._add_states(moment_standard_errors=[torch.nan] * 2)

    def store(self, result: Any, dtype: torch.dtype) -> None:
        """Keep the density, the moments and the share of negative eigenvalues."""
        super().store(result, dtype)
        moments = ("moments", "moment_errors", "moment_standard_errors")
        for name in ("grid", *moments, "negative_share", "negative_share_error"):
            setattr(self, name, getattr(result, name).to(dtype).to(self.device))
        self.num_runs_used = torch.tensor(result.num_runs, device=self.device)

    def curves(self, name: str) -> list[Curve]:
        """Return the share of negative eigenvalues and the first two moments: mean and mean square."""
        values = [self.negative_share, *self.moments[:2]]
        errors = [self.negative_share_error, *self.moment_errors[:2]]
        standard_errors = [torch.full_like(self.negative_share, torch.nan), *self.moment_standard_errors]
        names = [f"{name}_{what}" for what in ("negative_share", "mean", "mean_square")]
        numbers = torch.stack([torch.stack(row).cpu() for row in (values, errors, standard_errors)], dim=1).tolist()
        return [Curve(curve, *point) for curve, point in zip(names, numbers, strict=True)]

    def headline(self, name: str) -> None:
        """Return None: the density is a picture."""

    def figure(self) -> Figure:
        """Return a picture of the latest density, on a logarithmic axis, with its standard error.

        Returns:
            A figure of matplotlib, made without pyplot.
        """
        figure: Figure = self.plot()[0]
        return figure

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the density.

        Args:
            val: A density over the grid of the latest measurement. Default: that of the latest measurement.
            ax: A matplotlib axis to draw into. Default: one of a new figure.

        Returns:
            The figure and the axis.
        """
        if ax is None:
            figure = Figure(figsize=(5, 3.2), layout="constrained")
            FigureCanvasAgg(figure)
            ax = figure.subplots()
        self._draw(ax, self.value if val is None else val)
        return ax.get_figure(), ax

    def _draw(self, ax: Any, density: Tensor) -> None:
        grid, values = self.grid.double().cpu(), density.detach().double().cpu()
        errors = self.error.double().cpu()
        ax.set(xlabel="eigenvalue", ylabel="density")
        if not torch.isfinite(grid).all():
            ax.set_title("not measured yet")
            return
        floor = _FLOOR * float(values.max())
        ax.fill_between(grid, (values - errors).clamp_min(floor), (values + errors).clamp_min(floor), alpha=0.3, lw=0)
        ax.plot(grid, values.clamp_min(floor), lw=1)
        ax.axvline(0, color="0.7", lw=0.8, zorder=0)
        ax.set_yscale("log")
        ax.set_ylim(bottom=floor)
        runs = int(self.num_runs_used)
        ax.set_title(f"{runs} runs of {self.num_steps} steps" if runs else "exact spectrum", fontsize="small")

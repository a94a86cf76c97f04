"""Worst-case and average-case sharpness as metrics."""

from __future__ import annotations

from lightning_flatness.estimators import BallNorm, average_case_sharpness, worst_case_sharpness
from lightning_flatness.geometry import Geometry
from lightning_flatness.metrics.base import FlatnessMetric, arguments


class WorstCaseSharpness(FlatnessMetric):
    r"""The largest rise of the loss in a ball around the current weights.

        max over ‖z‖ <= rho of  L(w(z)) - L(w),

    in the l2 or the l-infinity norm of the coordinates ``z`` of a geometry: ``"euclidean"`` is the sharpness that SAM
    minimises (arXiv 2010.01412), ``"element"`` the adaptive sharpness (arXiv 2102.11600), which rescaling ReLU units
    does not change. With ``num_samples=m`` it is m-sharpness (arXiv 2206.06232): the average over sub-batches of m
    samples of each one's own worst case. Units: those of the loss. Never negative: staying put is allowed.

    Projected gradient ascent from the centre, from random points and, without sub-batches, from both ends of the first
    three eigenvectors of the Hessian; the best three go on. On a quadratic loss the value is the maximum, else a lower
    bound: on trained networks at least 0.98 of the best of 24 restarts in every case of ``tests/estimators``.
    ``error`` is what a further ascent from the point that was found gains at most, to first order,
    ``rho ‖g‖ - <g, z>`` (l2). It says that the ascent has ended there, as ``converged`` does, and nothing about other
    peaks: the logs call it ``first_order_gap``.

    A measurement costs mostly 60 to 115 gradients, 150 at most by default: a quarter of ``num_steps`` from each of
    ``num_restarts + 7`` starts, the rest from three of them, and up to 40 products for the eigenvectors (see
    :class:`TopEigenvalues`). With sub-batches: at most ``num_steps · (num_restarts + 1)``, without products. Memory:
    about 20 vectors of the size of the weights, and the basis of the eigenvectors before.

    Args:
        rho: Radius of the ball in units of ``z``: a length in weight space, or a relative change.
        geometry: ``"euclidean"``, ``"layer"``, ``"filter"``, ``"element"``, … or a ``Geometry``.
        norm: ``"l2"``, or ``"linf"`` for the largest entry of ``z``.
        num_steps: Gradients to spend from a start at most.
        num_restarts: Random starts beside the others.
        num_samples: Size m of the sub-batches. Default: all samples at once.
        normalize_logits: Divide the logits by their standard deviation over the classes, as arXiv 2302.07011 does, so
            that scaling the last layer changes nothing; needs an :class:`OutputLoss`. (The code of that paper divides
            by their norm, which is the square root of the number of classes times that.)
        tol: First-order gap, relative to the value, at which the ascent counts as converged.
        seed: Seed of the random starts.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from lightning_flatness import LossLandscape, WorstCaseSharpness
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> module.weight.data.zero_()
        tensor([[0., 0.]])
        >>> batches = [torch.tensor([[1.0, 0.0], [0.0, 3.0]])]
        >>> metric = WorstCaseSharpness(rho=2.0)
        >>> metric.update(LossLandscape(module, batches, lambda module, x: module(x).square().mean()))
        >>> metric.compute().round(decimals=3)  # lambda_max rho² / 2
        tensor(18.)
    """

    error_name = "first_order_gap"
    effort = "num_steps"
    estimator = staticmethod(worst_case_sharpness)

    def __init__(
        self,
        rho: float = 0.05,
        geometry: str | Geometry = "euclidean",
        norm: BallNorm = "l2",
        num_steps: int = 20,
        num_restarts: int = 1,
        num_samples: int | None = None,
        normalize_logits: bool = False,
        tol: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(**arguments(locals()))


class AverageCaseSharpness(FlatnessMetric):
    r"""The mean rise of the loss when Gaussian noise is added to the current weights.

        mean of  L(w(z)) - L(w)  over  z ~ N(0, rho²/n I),

    with ``n`` coordinates ``z``, so that ``‖z‖`` is about ``rho``, the radius of :class:`WorstCaseSharpness`. On a
    quadratic loss it is ``rho² tr(H)/(2n)``. It has the invariances of the geometry; units: those of the loss. (arXiv
    2302.07011 has the same measure without the division by n: its radius is ``rho / sqrt(n)``.)

    Draws come in pairs ``z``, ``-z``, which cancels the slope. A measurement costs two thirds of a gradient per pair,
    and six for the standard error: 40 by default. Memory: three vectors of the size of the weights.

    Args:
        rho: Root mean square length of the noise in units of ``z``.
        geometry: ``"euclidean"``, ``"layer"``, ``"filter"``, ``"element"``, … or a ``Geometry``.
        num_draws: Independent pairs to draw, 2 at least; their scatter is the error.
        normalize_logits: As in :class:`WorstCaseSharpness`.
        tol: Standard error, relative to the value, at which the value counts as converged.
        seed: Seed of the noise.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from lightning_flatness import AverageCaseSharpness, LossLandscape
        >>> module = torch.nn.Linear(1, 1, bias=False)
        >>> metric = AverageCaseSharpness(rho=1.0, num_draws=1000)
        >>> metric.update(LossLandscape(module, [torch.ones(1, 1)], lambda module, x: module(x).square().mean()))
        >>> bool((metric.compute() - 1).abs() < 4 * metric.error)  # tr(H)/(2n) = 1
        True
    """

    error_name = "numerical_error"
    effort = "num_draws"
    estimator = staticmethod(average_case_sharpness)

    def __init__(
        self,
        rho: float = 0.05,
        geometry: str | Geometry = "euclidean",
        num_draws: int = 50,
        normalize_logits: bool = False,
        tol: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(**arguments(locals()))

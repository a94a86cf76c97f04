"""Results at one point in weight space, kept so that nothing is evaluated twice there."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightning_flatness.geometry import Chart, Geometry
from lightning_flatness.landscape.engines.graphs import GraphStore


@dataclass
class Point:
    """Results at the weights of one measurement, or at displaced weights within it.

    Attributes:
        graphs: Gradient graphs kept between Hessian-vector products.
        gradient: The gradient of the loss over all samples of all ranks.
        gradient_sum: Weighted sum of the gradients of single batches, by-products of Hessian-vector products.
        summed: The batches that ``gradient_sum`` holds.
        charts: One for each geometry.
        sharp_covectors: Sharpest directions found in one geometry, for the next; see ``estimators.krylov.starts``.
        num_differences: Products made by finite differences.
        loss: The loss over all samples of all ranks, as a number; see ``landscape.sampling``.
        sample_losses: The losses of this rank's samples.
    """

    graphs: GraphStore = field(default_factory=lambda: GraphStore(0.0))
    gradient: Tensor | None = None
    gradient_sum: Tensor | None = None
    summed: set[int] = field(default_factory=set)
    charts: dict[str | Geometry, Chart] = field(default_factory=dict)
    sharp_covectors: Tensor | None = None
    num_differences: int = 0
    loss: float | None = None
    sample_losses: Tensor | None = None

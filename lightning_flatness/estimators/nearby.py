"""What the worst and the average case near the weights share."""

from __future__ import annotations

import torch

from lightning_flatness.geometry import Chart, Geometry
from lightning_flatness.landscape import LossLandscape


def weight_rounding(landscape: LossLandscape) -> float:
    """Return by how much the rounding of weights of low precision (bfloat16, say) moves the loss, roughly.

    Weights that are kept in the dtype of vectors are moved by full steps; others only from one value to the next.
    """
    coarse = [torch.finfo(p.dtype).eps for p in landscape.parameters if p.dtype != landscape.dtype]
    return max(coarse) * abs(float(landscape.loss())) if coarse else 0.0


def check_radius(chart: Chart, reach: float, geometry: str | Geometry) -> None:
    """Raise an error unless a ball stays where the chart is defined.

    Raises:
        ValueError: If it does not.
    """
    if reach >= chart.radius:
        raise ValueError(
            f"Expected a `rho` whose ball stays within ‖z‖ < {chart.radius:.4g}, where the chart of the geometry "
            f"{geometry!r} ends at the current weights, got one that reaches {reach:.4g}. Choose a smaller radius."
        )

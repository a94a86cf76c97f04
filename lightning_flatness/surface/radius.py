"""How far to look: a radius that the weights of the moment fix, and not their loss."""

from __future__ import annotations

import torch

from lightning_flatness.geometry import Geometry, resolve_geometry
from lightning_flatness.landscape import LossLandscape


def relative_radius(landscape: LossLandscape, geometry: str | Geometry, share: float) -> float | None:
    """Return the length, in a geometry, of a change of all weights by a share of themselves.

    In geometry ``"filter"`` it is ``share · sqrt(number of filters)``, at which a random direction changes filters by
    about that share of their norm: ``share=1`` is the square of arXiv 1712.09913. Pictures of two moments of a run, or
    of two runs, look equally far.

    Args:
        landscape: The loss at the weights.
        geometry: The coordinates.
        share: The relative change of the weights.

    Returns:
        The radius, at most that of the chart; None where the geometry cannot make this change, or nothing can move.
    """
    with landscape.measurement(), torch.no_grad():
        chart = landscape.chart(resolve_geometry(geometry))
        weights = torch.cat([p.detach().reshape(-1) for p in landscape.parameters]).to(landscape.dtype)
        try:
            length = float(torch.linalg.vector_norm(chart.coordinates(share * weights)))
        except ValueError:
            return None
    radius = min(length, chart.radius)
    return radius if 0 < radius < float("inf") else None

"""Where to start looking for the sharpest directions: from what is known about them already, for free.

Three things are. The eigenvectors of an earlier measurement; they turn within an epoch. The gradient, which lies in the
space of the few sharpest directions almost entirely (arXiv 1812.04754). And the sharpest directions that another
geometry has shown at the same weights: if ``H`` were ``c cᵀ``, the top eigenvector would be ``S c`` in every chart
``w = w0 + S z``, so that the covector ``c`` is what carries over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flatness.estimators.basis import normalized
from lightning_flatness.estimators.krylov import Which, mixed
from lightning_flatness.estimators.operators import Operator
from lightning_flatness.geometry import Chart
from lightning_flatness.geometry.base import LinearChart
from lightning_flatness.landscape import LossLandscape

_GRADIENT_SHARE = 0.1
_NOISE = 0.03
_NOISE_BESIDE_THE_GRADIENT = 1.0


def usable(start: Tensor | None, chart: Chart) -> Tensor | None:
    """Return the eigenvectors of an earlier measurement, if they are in these coordinates and finite."""
    if start is None or start.shape[-1] != chart.num_coordinates or not torch.isfinite(start).all():
        return None
    return start


def start_vector(
    landscape: LossLandscape,
    chart: Chart,
    previous: Tensor | None,
    *,
    operator: Operator,
    k: int,
    which: Which,
    shared: bool,
) -> Tensor | None:
    """Return a vector that lies close to the ``k`` most wanted eigenvectors, as far as they can be known.

    Costs one gradient at most: nothing where the graphs are kept, which have to be built for the products anyway.

    Args:
        landscape: The loss, inside one of its measurements.
        chart: The coordinates.
        previous: Eigenvectors of an earlier measurement, shape (any, num_coordinates).
        operator: The curvature.
        k: How many eigenvectors are wanted.
        which: Which ones.
        shared: Whether to use what another geometry has shown in this measurement.

    Returns:
        A vector of shape (num_coordinates,), or None if nothing is known.
    """
    if which == "SA":
        return None if previous is None else mixed(previous, k)
    known = landscape.sharp_covectors if shared else None
    if known is not None:
        here = mixed(torch.stack([chart.pull_back(c) for c in known]), k)
        if len(known) < k and previous is not None:
            here = _added(here, previous if previous.dim() == 1 else mixed(previous, k))
        return here if operator == "ggn" else _added(here, chart.pull_back(landscape.gradient()), _GRADIENT_SHARE)
    if operator == "ggn" or (previous is not None and k > 1):
        return None if previous is None else mixed(previous, k)
    gradient = chart.pull_back(landscape.gradient(keep_graphs=True))
    return gradient if previous is None else _added(mixed(previous, k), gradient)


def start_noise(landscape: LossLandscape, previous: Tensor | None, *, shared: bool) -> float:
    """Return the length of the random vector that is added to the direction of :func:`start_vector`.

    As much as the vector itself where only the gradient is known, which need not have a part in every eigenvector.
    """
    knows_directions = previous is not None or (shared and landscape.sharp_covectors is not None)
    return _NOISE if knows_directions else _NOISE_BESIDE_THE_GRADIENT


def remember_covectors(landscape: LossLandscape, chart: Chart, eigenvectors: Tensor) -> None:
    """Leave the sharpest directions for the next geometry, unless as many are known already.

    Args:
        landscape: The loss, inside one of its measurements.
        chart: The coordinates of the eigenvectors; if they are not linear, nothing is left.
        eigenvectors: Shape (k, num_coordinates).
    """
    known = landscape.sharp_covectors
    if not isinstance(chart, LinearChart) or (known is not None and len(known) >= len(eigenvectors)):
        return
    scale = chart.scale
    landscape.sharp_covectors = (
        eigenvectors if scale is None else eigenvectors / scale.masked_fill(scale == 0, torch.inf)
    )


def _added(vector: Tensor, other: Tensor, share: float = 1.0) -> Tensor:
    """Return the sum of two directions, of which the second has no sign of its own."""
    if not (vector.any() and other.any()):
        return vector if vector.any() else other
    sign = 1.0 if float(vector @ other) >= 0 else -1.0
    return normalized(vector) + sign * share * normalized(other)

"""Start vectors for the sharpest directions, from information that costs nothing.

Known in advance: the eigenvectors of the previous measurement, which turn within an epoch; the gradient, which lies
almost entirely in the space of the few sharpest directions (arXiv 1812.04754); and the sharpest directions found in
another geometry at the same weights. If ``H`` were ``c cᵀ``, the top eigenvector would be ``S c`` in every chart
``w = w0 + S z``, so the covector ``c`` carries over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_flatness.estimators.krylov.basis import mixed
from lightning_flatness.estimators.krylov.solver import Which
from lightning_flatness.estimators.operators import Operator
from lightning_flatness.geometry import Chart
from lightning_flatness.geometry.base import LinearChart
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.landscape.vectors import Vectors

_GRADIENT_SHARE = 0.1
_NOISE = 0.03
_NOISE_BESIDE_THE_GRADIENT = 1.0


def usable(start: Tensor | None, vectors: Vectors) -> Tensor | None:
    """Return the eigenvectors of an earlier measurement if they have these coordinates and are finite, else None."""
    fits = start is not None and start.shape[-1] == vectors.local_size and bool(torch.isfinite(start).all())
    return start if vectors.agreed(fits) else None


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
    """Return a vector close to the ``k`` most wanted eigenvectors.

    Costs one gradient at most, and nothing if graphs are kept: the products need the same graphs.

    Args:
        landscape: The loss, inside one of its measurements.
        chart: The coordinates.
        previous: Eigenvectors of an earlier measurement, shape (any, num_coordinates).
        operator: The curvature.
        k: Number of wanted eigenvectors.
        which: Which ones: ``"LA"``, ``"SA"`` or ``"LM"``.
        shared: Whether to use the directions found in another geometry in this measurement.

    Returns:
        A vector of shape (num_coordinates,), or None if nothing is known.
    """
    vectors = landscape.vectors_in(chart)
    if which == "SA":
        return None if previous is None else mixed(previous, k, vectors)
    known = landscape.batched_loss.point.sharp_covectors if shared else None
    if known is not None:
        here = mixed(torch.stack([chart.pull_back(c) for c in known]), k, vectors)
        if len(known) < k and previous is not None:
            here = _added(here, previous if previous.dim() == 1 else mixed(previous, k, vectors), vectors)
        if operator == "ggn":
            return here
        return _added(here, chart.pull_back(landscape.gradient()), vectors, _GRADIENT_SHARE)
    if operator == "ggn" or (previous is not None and k > 1):
        return None if previous is None else mixed(previous, k, vectors)
    gradient = chart.pull_back(landscape.gradient(keep_graphs=True))
    return gradient if previous is None else _added(mixed(previous, k, vectors), gradient, vectors)


def start_noise(landscape: LossLandscape, previous: Tensor | None, *, shared: bool) -> float:
    """Return the length of the random vector added to the direction of :func:`start_vector`.

    It is as long as the vector itself if only the gradient is known, which may have no component along an eigenvector.
    """
    knows_directions = previous is not None or (shared and landscape.batched_loss.point.sharp_covectors is not None)
    return _NOISE if knows_directions else _NOISE_BESIDE_THE_GRADIENT


def start_in_block(
    landscape: LossLandscape, chart: Chart, previous: Tensor | None, block: slice, *, operator: Operator, which: Which
) -> tuple[Tensor | None, float]:
    """Return the start for the eigenvector of a diagonal block, and the length of the random vector to add to it.

    Args:
        landscape: The loss, inside one of its measurements.
        chart: The coordinates.
        previous: Eigenvectors of blocks of an earlier measurement, behind each other.
        block: The coordinates of the block.
        operator: The curvature.
        which: Which eigenvector is wanted.

    Returns:
        Start and noise as of :func:`start_vector` and :func:`start_noise`, for one eigenvector.
    """
    known = None if previous is None else previous[block]
    noise = _NOISE_BESIDE_THE_GRADIENT if known is None else _NOISE
    if which == "SA" or operator == "ggn":
        return known, noise
    gradient = chart.pull_back(landscape.gradient(keep_graphs=True))[block]
    vectors = Vectors(len(gradient), landscape.dtype, landscape.device)
    return gradient if known is None else _added(known, gradient, vectors), noise


def remember_covectors(landscape: LossLandscape, chart: Chart, eigenvectors: Tensor) -> None:
    """Store the sharpest directions of a linear chart for the next geometry, unless as many are stored already."""
    known = landscape.batched_loss.point.sharp_covectors
    if not isinstance(chart, LinearChart) or (known is not None and len(known) >= len(eigenvectors)):
        return
    scale = chart.scale
    landscape.batched_loss.point.sharp_covectors = (
        eigenvectors if scale is None else eigenvectors / scale.masked_fill(scale == 0, torch.inf)
    )


def _added(vector: Tensor, other: Tensor, vectors: Vectors, share: float = 1.0) -> Tensor:
    """Return the sum of two directions. The sign of the second is arbitrary."""
    has_length, other_has = (vectors.norms([vector, other]) > 0).tolist()
    if not (has_length and other_has):
        return vector if has_length else other
    sign = 1.0 if float(vectors.dot(vector, other)) >= 0 else -1.0
    return vectors.normalized(vector) + sign * share * vectors.normalized(other)

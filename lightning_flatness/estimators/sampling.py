"""Standard errors for the whole set that the samples were drawn from, of measures that are means over samples.

To first order in what the samples miss, every measure here is one: an eigenvalue is the mean of ``vᵀ H_n v`` at its
eigenvector, a trace that of ``tr H_n``, a maximum that of the losses at the place of the maximum. Second derivatives
are differences of the losses of single samples along a curve, ``(L_n(t) - 2 L_n(0) + L_n(-t)) / t²``; along random
directions exact, by forward mode where that is right, else for groups of samples by two backward passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lightning_flatness.estimators.operators import Operator, gaussian, rademacher
from lightning_flatness.geometry import Chart
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.landscape.engines.finite_difference import length_scale
from lightning_flatness.landscape.sampling import LEAST_GROUPS, SampleLosses

NUM_PROBES = 8
"""Random directions from which the scatter of traces between samples is estimated."""

_RISE = 1e-2
_RISE_IN_EPS = 1e3
_LONGEST = 0.1
"""Differences reach until the loss rises by a hundredth, or by what rounding asks for; a tenth of a tensor at most."""


def eigenvalue_standard_errors(
    landscape: LossLandscape, chart: Chart, values: Tensor, vectors: Iterable[Tensor]
) -> Tensor:
    """Return the standard errors of eigenvalues of the Hessian, by first-order perturbation: of ``vᵀ H_n v``.

    Costs two thirds of a gradient each, and two thirds once.

    Args:
        landscape: The loss, inside one of its measurements.
        chart: The coordinates.
        values: The eigenvalues, shape (k,).
        vectors: Their unit eigenvectors, k of shape (num_coordinates,).

    Returns:
        Shape (k,); not a number where it is not known.
    """
    known = known_in_advance(landscape)
    if known is None:
        losses = SampleLosses(landscape)
        pairs = zip(values.tolist(), vectors, strict=True)
        errors = [_of_curvature(landscape, losses, chart.displacement, [v], value) for value, v in pairs]
    else:
        errors = [known] * len(values)
    return torch.tensor(errors, dtype=landscape.dtype, device=landscape.device)


def trace_standard_error(
    landscape: LossLandscape,
    displacement: Callable[[Tensor], Tensor],
    size: int,
    value: float,
    operator: Operator,
    seed: int,
) -> float:
    """Return the standard error that the samples give to a trace, from random directions: of ``tr H_n``.

    Costs 13 gradients; 25 to 29 where groups of samples stand for samples, with BatchNorm or squared error, say.

    Args:
        landscape: The loss, inside one of its measurements.
        displacement: The change of the weights that belongs to coordinates, shape (size,).
        size: Number of coordinates.
        value: The trace.
        operator: Which one's; only the Hessian's error is known.
        seed: Of the directions.

    Returns:
        The error; not a number where it is not known.
    """
    known = math.nan if operator != "hessian" else known_in_advance(landscape)
    if known is not None:
        return known
    generator = torch.Generator(device="cpu").manual_seed(seed + 1)
    directions = [rademacher(size, generator, landscape.dtype, landscape.device) for _ in range(NUM_PROBES)]
    return _of_curvature(landscape, SampleLosses(landscape), displacement, directions, value)


def average_rise_standard_error(landscape: LossLandscape, chart: Chart, rho: float, seed: int) -> float:
    """Return the standard error that the samples give to the mean rise of the loss under noise of length ``rho``.

    Costs six gradients.

    Args:
        landscape: The loss, inside one of its measurements.
        chart: The coordinates.
        rho: Root mean square length of the noise.
        seed: Of the noise.
    """
    known = known_in_advance(landscape)
    if known is not None:
        return known
    losses = SampleLosses(landscape)
    generator = torch.Generator(device="cpu").manual_seed(seed + 1)
    rises = []
    for _ in range(NUM_PROBES):
        z = gaussian(chart.num_coordinates, generator, landscape.dtype, landscape.device)
        z *= rho / math.sqrt(chart.num_coordinates)
        sides = [losses.at(chart.displacement(side)) for side in (z, -z)]
        rises.append((sides[0] + sides[1]) / 2 - losses.at_weights)
    return losses.standard_error(torch.stack(rises))


def rise_standard_error(landscape: LossLandscape, displacement: Tensor) -> float:
    """Return the standard error that the samples give to the rise of the loss between two points.

    That of a maximum, too: to first order its place does not matter. Costs one gradient.

    Args:
        landscape: The loss, inside one of its measurements.
        displacement: From the weights to the other point.
    """
    known = known_in_advance(landscape)
    if known is not None:
        return known
    losses = SampleLosses(landscape)
    return losses.standard_error((losses.at(displacement) - losses.at_weights).unsqueeze(0))


def crossing_standard_error(landscape: LossLandscape, displacement: Tensor, loss: float, slope: float) -> float:
    """Return the standard error that the samples give to where the loss comes back to its value, as it does there.

    To first order that place moves by the change of the rise over its derivative. Costs two thirds of a gradient.

    Args:
        landscape: The loss, inside one of its measurements.
        displacement: From the weights to that place.
        loss: The loss at the weights.
        slope: The derivative of the loss there, in the units of the answer.
    """
    known = known_in_advance(landscape)
    if known is not None:
        return known
    losses = SampleLosses(landscape, loss)
    return losses.standard_error(((losses.at(displacement) - losses.at_weights) / slope).unsqueeze(0))


def quotient_standard_errors(landscape: LossLandscape, v: Tensor, bend: float, slope: float) -> tuple[float, float]:
    """Return the standard errors that the samples give to ``vᵀ H v`` and to ``vᵀ H v / (vᵀ g)``.

    Both derivatives of the losses of samples are central differences along ``v``. Costs four thirds of a gradient.

    Args:
        landscape: The loss, inside one of its measurements.
        v: A unit vector.
        bend: ``vᵀ H v``.
        slope: ``vᵀ g``.
    """
    known = known_in_advance(landscape)
    if known is not None:
        return known, known
    if any(p.dtype != landscape.dtype for p in landscape.parameters) or bend == 0 or slope == 0:
        return math.nan, math.nan
    losses = SampleLosses(landscape)
    rise = max(_RISE * abs(losses.value), _RISE_IN_EPS * torch.finfo(landscape.dtype).eps * losses.typical)
    longest = _LONGEST * length_scale(landscape.batched_loss, v)
    step = min(math.sqrt(2 * rise / abs(bend)), longest)
    sides = [losses.at(sign * step * v) for sign in (1, -1)]
    bends = (sides[0] - 2 * losses.at_weights + sides[1]) / step**2
    quotients = (bends - bend / slope * (sides[0] - sides[1]) / (2 * step)) / slope
    return losses.standard_error(bends.unsqueeze(0)), losses.standard_error(quotients.unsqueeze(0))


def of_parts(landscape: LossLandscape, values: Sequence[float]) -> float:
    """Return the standard error of the mean of a measure over disjoint parts of the samples.

    Args:
        landscape: The loss.
        values: The measure on each part.
    """
    known = known_in_advance(landscape)
    if known is not None or len(values) < LEAST_GROUPS:
        return math.nan if known is None else known
    deviation = float(torch.tensor(values, dtype=torch.float64, device="cpu").std())
    return deviation / math.sqrt(len(values)) * math.sqrt(landscape.samples.unseen_share)


def moment_standard_errors(
    landscape: LossLandscape, chart: Chart, matvec: Callable[[Tensor], Tensor], moments: Tensor, seed: int
) -> Tensor:
    """Return the standard errors that the samples give to the moments ``tr H/n`` and ``tr H²/n`` of the spectrum.

    To first order the second changes by ``2 tr(H H_n)/n``. Its second order is positive and not in the error: on few
    samples a spectrum is wider. Costs 35 gradients.

    Args:
        landscape: The loss, inside one of its measurements.
        chart: The coordinates.
        matvec: Product with the Hessian in them.
        moments: Their values.
        seed: Of the random directions.

    Returns:
        Shape (2,), in float64 on the CPU; not numbers where they are not known.
    """
    known = known_in_advance(landscape)
    if known is not None:
        return torch.full((2,), known, dtype=torch.float64, device="cpu")
    size, losses = chart.num_coordinates, SampleLosses(landscape)
    generator = torch.Generator(device="cpu").manual_seed(seed + 1)
    bends, changes = [], []
    mean, square = float(moments[0]) * size, float(moments[1]) * size
    for _ in range(NUM_PROBES):
        v = rademacher(size, generator, landscape.dtype, landscape.device)
        product = matvec(v)
        ratio = float(torch.linalg.vector_norm(v) / torch.linalg.vector_norm(product).clamp_min(1e-30))
        bends.append(_bends(landscape, losses, chart.displacement, v, mean, exact=True))
        sides = [
            _bends(landscape, losses, chart.displacement, v + sign * ratio * product, ratio * square, exact=True)
            for sign in (1, -1)
        ]
        changes.append((sides[0] - sides[1]) / (2 * ratio))  # 2 vᵀ H_n H v
    errors = [losses.standard_error(torch.stack(estimates)) / size for estimates in (bends, changes)]
    return torch.tensor(errors, dtype=torch.float64, device="cpu")


def known_in_advance(landscape: LossLandscape) -> float | None:
    """Return an error that takes no evaluation: none if all samples are seen, not a number if there are too few."""
    if landscape.samples.unseen_share == 0:
        return 0.0
    return math.nan if landscape.num_samples < LEAST_GROUPS else None


def _of_curvature(
    landscape: LossLandscape,
    losses: SampleLosses,
    displacement: Callable[[Tensor], Tensor],
    directions: Sequence[Tensor],
    expected: float,
) -> float:
    """Return the standard error of the mean over samples of the second derivative along directions.

    Args:
        landscape: The loss, inside one of its measurements.
        losses: Of its samples.
        displacement: The change of the weights that belongs to coordinates.
        directions: In coordinates; all of them estimate the same.
        expected: About what the second derivatives are.
    """
    if any(p.dtype != landscape.dtype for p in landscape.parameters) or expected == 0 or not math.isfinite(expected):
        return math.nan  # rounded weights move the loss more than small steps do
    exact = len(directions) > 1  # along random directions there are many kinks of ReLU units, which differences see
    bends = [_bends(landscape, losses, displacement, v, expected, exact=exact) for v in directions]
    return losses.standard_error(torch.stack(bends))


def _bends(
    landscape: LossLandscape,
    losses: SampleLosses,
    displacement: Callable[[Tensor], Tensor],
    v: Tensor,
    expected: float,
    *,
    exact: bool,
) -> Tensor:
    """Return the second derivatives of the losses of samples along a direction."""
    eps = torch.finfo(landscape.dtype).eps
    rise = max(_RISE * abs(losses.value), _RISE_IN_EPS * eps * losses.typical)
    step = math.sqrt(2 * rise / abs(expected))
    change = displacement(step * v)
    if landscape.batched_loss.norm(change) == 0:
        return torch.zeros_like(losses.at_weights)
    longest = _LONGEST * length_scale(landscape.batched_loss, change)
    if longest < 1:
        step *= longest
        change = displacement(step * v)
    back = displacement(-step * v)
    found = losses.second_derivatives((change - back) / (2 * step), (change + back) / step**2) if exact else None
    return (losses.at(change) - 2 * losses.at_weights + losses.at(back)) / step**2 if found is None else found

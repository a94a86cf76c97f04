"""Sharpness along the update that the optimizer has just made: critical and directional sharpness.

Both are about the weights before the update, where it was made. For a quadratic loss they agree.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lightning_flatness.estimators.arguments import check_arguments
from lightning_flatness.estimators.line_search import Crossing, first_crossing
from lightning_flatness.estimators.operators import check_finite
from lightning_flatness.estimators.result import Estimate, scalar_estimate
from lightning_flatness.estimators.sampling import crossing_standard_error, quotient_standard_errors
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.landscape.update import MissingUpdateError

_ROUNDING = 4
"""Rounding of a difference of losses, in units of the machine precision times the loss."""

_CLIMBS = (
    "is not a number. Along the last update the loss of these samples does not fall: no learning rate is critical."
)
_ROUNDED = (
    "is not exact. Along the last update the loss of these samples falls by little more than rounding: see its error."
)
_NO_RATE = "is not a number. The optimizer has no learning rate `lr` above zero, which this number is about."


def critical_sharpness(
    landscape: LossLandscape, *, tol: float = 1 / 16, max_passes: int = 32, start: Tensor | None = None
) -> Estimate:
    """Return ``2 / eta_c``, where eta_c is the smallest learning rate with which the last update raises the loss.

    Arguments, cost and errors as of :class:`lightning_flatness.CriticalSharpness`; ``start`` is an earlier eta_c.

    Raises:
        MissingUpdateError: If no optimizer step is known.
    """
    check_arguments({"tol": tol, "max_passes": max_passes})
    with landscape.measurement(on_shards=True):
        change, rate = last_update(landscape, "CriticalSharpness")
        if not rate > 0:
            return replace(scalar_estimate(landscape, math.nan, math.nan, converged=True), remark=_NO_RATE)

        def loss(step: float) -> float:  # where the update would have led with `step` times the learning rate
            with landscape.displaced(change, 1 - step):
                return float(landscape.loss(allow_non_finite=step > 0))

        here = loss(0.0)
        eps = max(torch.finfo(p.dtype).eps for p in landscape.parameters)
        rounding = _ROUNDING * eps * abs(here)
        earlier = None if start is None else float(start) / rate
        crossing = first_crossing(lambda step: loss(step) - here, tol, max_passes - 1, earlier, rounding)
        estimate = _of_crossing(landscape, crossing, rate, rounding, tol)
        if not (math.isfinite(estimate.value) and crossing.is_bracketed and math.isfinite(crossing.slope)):
            return estimate
        with landscape.displaced(change):
            relative = crossing_standard_error(
                landscape, -crossing.at * change, here, slope=crossing.slope * crossing.at
            )
    return replace(estimate, standard_error=estimate.value * relative)


def directional_sharpness(landscape: LossLandscape, *, tol: float = 0.1) -> Estimate:
    """Return ``uᵀ H u / (uᵀ g)`` and ``uᵀ H u / (uᵀ u)`` of the last update ``u``, shape (2,).

    Arguments, cost and errors as of :class:`lightning_flatness.DirectionalSharpness`.

    Raises:
        MissingUpdateError: If no optimizer step is known.
    """
    check_arguments({"tol": tol})
    with landscape.measurement(on_shards=True):
        change, rate = last_update(landscape, "DirectionalSharpness")
        vectors = landscape.batched_loss.vectors
        length = float(vectors.norm(change))
        v = change / length
        with landscape.displaced(change):
            product, gradient = landscape.hvp(v), landscape.gradient()
            size = vectors.norm(product)
            check_finite(size)
            bend, slope = float(vectors.dot(v, product)), float(vectors.dot(v, gradient))
            rounding = 16 * torch.finfo(landscape.dtype).eps
            bend_error = (rounding + landscape.product_error) * float(size)
            slope_error = rounding * float(vectors.norm(gradient))
            climbs = not slope > slope_error
            errors = quotient_standard_errors(landscape, v, bend, math.nan if climbs else slope)
    # u = change / rate, so that per unit of it the update is length / rate long.
    ratio = math.nan if climbs or not rate > 0 else length / rate
    value = error = math.nan
    if math.isfinite(ratio):
        value = bend / slope * ratio
        error = (bend_error / slope + abs(bend) * slope_error / slope**2) * ratio
    numbers = [[value, bend], [error, bend_error], [errors[1] * ratio, errors[0]]]
    found = torch.tensor(numbers, dtype=landscape.dtype, device=landscape.device)
    remark = "" if math.isfinite(ratio) else _CLIMBS if rate > 0 else _NO_RATE
    converged = bool(remark) or error <= tol * abs(value)
    return Estimate(found[0], found[1], converged, 1, standard_error=found[2], remark=remark)


def last_update(landscape: LossLandscape, purpose: str) -> tuple[Tensor, float]:
    """Return the weights before the last optimizer step minus those after it, a flat vector, and its learning rate.

    Args:
        landscape: The loss, inside one of its measurements.
        purpose: The name of the measure.

    Raises:
        MissingUpdateError: If there was no step, or it changed nothing.
    """
    step = landscape.update
    loss = landscape.batched_loss
    change = None if step is None else loss.change_of(step)
    if step is None or change is None or float(loss.vectors.norm(change)) == 0:
        got = "none" if step is None else "one that changed no weight"
        raise MissingUpdateError(
            f"Expected an optimizer step before {purpose}, whose update it is about, got {got}. Make the step inside "
            "`with OptimizerStep(optimizer) as update:` and pass LossLandscape(..., update=update), or "
            "tracker.measure(step, update); the FlatnessMonitor watches steps itself."
        )
    return change.to(landscape.device, landscape.dtype), step.learning_rate


def _of_crossing(landscape: LossLandscape, crossing: Crossing, rate: float, rounding: float, tol: float) -> Estimate:
    """Return twice the inverse of a bracketed learning rate; its error reaches to both ends."""
    if crossing.is_bracketed:
        fall = crossing.slope * crossing.at
        relative = rounding / fall if fall > 0 else math.inf
        value = 2 / (crossing.at * rate)
        error = max(2 / (crossing.low * rate) - value, value - 2 / (crossing.high * rate)) + relative * value
        if relative < 0.5:
            found = scalar_estimate(landscape, value, error, converged=crossing.width <= tol and relative <= tol)
            return found if relative <= tol else replace(found, remark=_ROUNDED)
    elif crossing.low > 0:  # it rises nowhere: all that is known is that the value is below 2 / low
        half = 1 / (crossing.low * rate)
        return scalar_estimate(landscape, half, half, converged=False)
    return replace(scalar_estimate(landscape, math.nan, math.nan, converged=True), remark=_CLIMBS)

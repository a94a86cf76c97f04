"""Against what curves are drawn: steps, gradients, or another curve such as the training loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lightning_flatness.compare.comparison import Comparison
from lightning_flatness.compare.reading import Curve, Run
from lightning_flatness.compare.tags import NothingToCompareError, error_of, unknown_curve

Array = npt.NDArray[np.float64]


class Points(NamedTuple):
    """Points of a curve: where, values, and their standard errors, NaN where there is none."""

    across: Array
    values: Array
    errors: Array


def check_axis(comparison: Comparison, x: str) -> None:
    """Check that curves can be drawn against something.

    Args:
        comparison: The runs.
        x: ``"step"``, ``"gradients"``, ``"train_loss"`` (whatever the curve is called), or a tag.

    Raises:
        NothingToCompareError: If no run has such a curve.
    """
    runs = [run for setting in comparison.settings for run in setting.runs]
    tag = _tag(comparison, x)
    if x not in ("step", "gradients") and not any(tag in run.curves for run in runs):
        raise NothingToCompareError(unknown_curve("x", x, runs))


def is_monotone(x: str) -> bool:
    """Return whether curves of several runs can be averaged over an axis: a loss comes back to where it was."""
    return x in ("step", "gradients")


def points(comparison: Comparison, run: Run, tag: str, x: str) -> Points | None:
    """Return the finite points of a curve of a run, against an axis.

    Gradients are those of training, in batches: one per step, two with SAM.

    Args:
        comparison: Knows which curve is the training loss.
        run: The run.
        tag: The curve.
        x: See :func:`check_axis`.

    Returns:
        The points in the order of the steps; None if there is none.
    """
    curve = run.curves.get(tag)
    if curve is None:
        return None
    if x == "step":
        across = curve.steps.astype(np.float64)
    elif x == "gradients":
        across = curve.steps.astype(np.float64) * (2 if _takes_two_gradients(run) else 1)
    else:
        other = run.curves.get(_tag(comparison, x))
        across = np.full(len(curve), np.nan) if other is None else _at(other, curve.steps)
    keep = np.isfinite(curve.values) & np.isfinite(across)
    return Points(across[keep], curve.values[keep], _errors(run, tag, curve)[keep]) if keep.any() else None


def mean_and_band(curves: Sequence[Points]) -> tuple[Array, Array, Array, Array]:
    """Return the mean of curves, and a band that holds all of them with their standard errors.

    Args:
        curves: Ascending in the first coordinate.

    Returns:
        Places of any of them, mean, lower and upper end of the band, each of shape (n,).
    """
    places, values = on_common_axis([(c.across, c.values) for c in curves])
    ends = [
        on_common_axis([(c.across, c.values + sign * np.nan_to_num(c.errors)) for c in curves])[1] for sign in (-1, 1)
    ]
    return places, np.nanmean(values, axis=0), np.nanmin(ends[0], axis=0), np.nanmax(ends[1], axis=0)


def on_common_axis(curves: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Interpolate curves at all places of any of them; NaN before the first and after the last point of each.

    Args:
        curves: Coordinates, the first ascending.

    Returns:
        Shapes (n,) and (curves, n).
    """
    places = np.unique(np.concatenate([across for across, _ in curves]))
    values = [np.interp(places, across, up, left=np.nan, right=np.nan) for across, up in curves]
    covered = np.isfinite(values).any(axis=0)
    return places[covered], np.stack(values)[:, covered]


def _errors(run: Run, tag: str, curve: Curve) -> Array:
    """Return the standard errors of the points of a curve, NaN where there is none."""
    error = error_of(run, tag, "standard_error")
    known = {} if error is None else dict(zip(error.steps.tolist(), error.values.tolist(), strict=True))
    return np.array([known.get(step, np.nan) for step in curve.steps.tolist()])


def _tag(comparison: Comparison, x: str) -> str:
    return comparison.loss_tag or x if x == "train_loss" else x


def _takes_two_gradients(run: Run) -> bool:
    if "sam/loss_rise" in run.curves:
        return True
    rho = run.hyperparameters.get("sam_rho", 0.0)
    takes_one = "sam/perturbation_norm" in run.curves or "sam_ascent" in run.hyperparameters
    return isinstance(rho, float | int) and rho > 0 and not takes_one


def _at(curve: Curve, steps: npt.NDArray[np.int64]) -> Array:
    # In the logarithm if it is positive. The last value holds for one interval more: a loss is logged under the number
    # of the batch, flatness under the number of steps behind the weights.
    keep = np.isfinite(curve.values)
    at, values = curve.steps[keep].astype(np.float64), curve.values[keep]
    if not len(at):
        return np.full(len(steps), np.nan)
    is_positive = bool((values > 0).all())
    found = np.interp(steps, at, np.log(values) if is_positive else values)
    interval = max(1.0, float(np.diff(at).max(initial=1.0)))
    found[(steps < at[0]) | (steps > at[-1] + interval)] = np.nan
    return np.exp(found) if is_positive else found

"""The moment of a run at which its curves are looked at: its end, its best, or a training loss."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from lightning_flatness.compare.reading import Curve, Run

_HIGHER_IS_BETTER = re.compile(
    r"(?:^|[^a-z])(?:acc|accuracy|auc|auroc|auprc|ap|map|f1|f1_?score|precision|recall|r2|r2_?score|iou|miou|dice|bleu"
    r"|rouge\w*|psnr|ssim|top_?[15])(?:$|[^a-z])|accuracy",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Reading:
    """One number of one run.

    Args:
        value: The number; None if the curve does not exist, has no finite point, or does not cover the moment.
        step: The step it was logged at, or between the points of which it was interpolated; None with no value.
        residual: Its error in its own units, from the curve ``…_residual``; None if there is none.
    """

    value: float | None = None
    step: float | None = None
    residual: float | None = None

    @property
    def relative_residual(self) -> float | None:
        """The residual over the size of the value; None where nothing is known about it."""
        if self.value is None or self.residual is None:
            return None
        return self.residual / abs(self.value) if self.value else math.inf if self.residual else 0.0


def higher_is_better(tag: str) -> bool:
    """Whether a curve is one of those of which the largest value is the best.

    Args:
        tag: Its name.

    Returns:
        True for accuracies, areas under curves, F1 and the like; of all else, flatness and losses, the smallest is.

    Example:
        >>> higher_is_better("val/acc"), higher_is_better("flatness/lambda_max"), higher_is_better("test_loss")
        (True, False, False)
    """
    return bool(_HIGHER_IS_BETTER.search(tag))


def parse_moment(text: str) -> float | None:
    """Return the training loss that ``"loss=0.01"`` names; None for ``"last"`` and ``"best"``.

    Args:
        text: One of the three.

    Returns:
        The loss, or None.

    Raises:
        ValueError: If it is none of them, or the loss is not a finite number.
    """
    if text in ("last", "best"):
        return None
    name, _, number = text.partition("=")
    try:
        loss = float(number) if name == "loss" else math.nan
    except ValueError:
        loss = math.nan
    if not math.isfinite(loss):
        raise ValueError(f"Expected `at` to be 'last', 'best' or a training loss such as 'loss=0.01', got {text!r}.")
    return loss


def read_at(run: Run, tag: str, moment: str, step: float | None = None) -> Reading:
    """Read a curve at a moment.

    Args:
        run: The run.
        tag: The curve.
        moment: ``"last"``: the last point. ``"best"``: the point with the best value of this curve, see
            :func:`higher_is_better`; of ``flatness/`` curves not the point before training. Otherwise: at ``step``.
        step: Where; between two points interpolated, in the logarithm if both are positive.

    Returns:
        The value with its residual.
    """
    curve = run.curves.get(tag)
    if curve is None:
        return Reading()
    if moment == "last":
        index = len(curve) - 1
    elif moment == "best":
        index = _best(curve, tag)
    else:
        assert step is not None
        return Reading(_interpolated(curve, step), step, _interpolated(run.curves.get(f"{tag}_residual"), step))
    value, at = float(curve.values[index]), int(curve.steps[index])
    residual = _interpolated(run.curves.get(f"{tag}_residual"), at)
    return Reading(value, at, residual) if math.isfinite(value) else Reading(step=at)


def _best(curve: Curve, tag: str) -> int:
    values = -curve.values if higher_is_better(tag) else curve.values.copy()
    values[~np.isfinite(values)] = np.inf
    if len(values) > 1 and curve.steps[0] == 0 and tag.startswith("flatness/"):
        values[0] = np.inf  # networks are flat before they have learnt anything
    return int(np.argmin(values))


def step_of_loss(curve: Curve, loss: float) -> float | None:
    """Return the step at which a training loss is first reached.

    Args:
        curve: The training loss.
        loss: Which.

    Returns:
        Between the last point above it and the first at or below it, interpolated in the logarithm of the loss (in the
        loss itself where that is not positive); the first point if that is below already; None if the loss is never
        reached.
    """
    reached = np.flatnonzero(curve.values <= loss + 1e-6 * abs(loss))  # event files hold float32
    if not len(reached):
        return None
    after = int(reached[0])
    before = after - 1
    while before >= 0 and not math.isfinite(curve.values[before]):
        before -= 1
    if before < 0:
        return float(curve.steps[after])
    high, low = float(curve.values[before]), float(curve.values[after])
    if low > 0 and loss > 0:
        high, low, loss = math.log(high), math.log(low), math.log(loss)
    share = min((high - loss) / (high - low), 1.0)
    return float(curve.steps[before] + share * (curve.steps[after] - curve.steps[before]))


def _interpolated(curve: Curve | None, step: float) -> float | None:
    """Return the value between the points around a step; None outside the points and where they are not finite."""
    if curve is None or not curve.steps[0] <= step <= curve.steps[-1]:
        return None
    after = int(np.searchsorted(curve.steps, step))
    high = float(curve.values[after])
    if curve.steps[after] == step:
        return high if math.isfinite(high) else None
    low = float(curve.values[after - 1])
    share = float((step - curve.steps[after - 1]) / (curve.steps[after] - curve.steps[after - 1]))
    if low > 0 and high > 0:
        value = math.exp((1 - share) * math.log(low) + share * math.log(high))
    else:
        value = (1 - share) * low + share * high
    return value if math.isfinite(value) else None

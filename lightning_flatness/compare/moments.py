"""The moment at which curves are compared: the end of a run, its best value, or a training loss."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from lightning_flatness.compare.reading import Curve, Run
from lightning_flatness.compare.tags import error_of

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
        residual: Its error in its own units, from the curve ``flatness_errors/…_residual``; None if there is none.
    """

    value: float | None = None
    step: float | None = None
    residual: float | None = None

    @property
    def relative_residual(self) -> float | None:
        """The residual over the absolute value; None if there is no residual."""
        if self.value is None or self.residual is None:
            return None
        return self.residual / abs(self.value) if self.value else math.inf if self.residual else 0.0


def higher_is_better(tag: str) -> bool:
    """Return whether the largest value of a curve is the best: of accuracies, areas under curves, F1 and the like.

    Example:
        >>> higher_is_better("val/acc"), higher_is_better("flatness/lambda_max"), higher_is_better("test_loss")
        (True, False, False)
    """
    return bool(_HIGHER_IS_BETTER.search(tag))


def parse_moment(text: str) -> float | None:
    """Return the training loss that ``"loss=0.01"`` names; None for ``"last"`` and ``"best"``.

    Raises:
        ValueError: If it is none of the three, or the loss is not a finite number.
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


def read_at(run: Run, tag: str, moment: str, step: float | None = None, loss_tag: str | None = None) -> Reading:
    """Return the value of a curve at a moment, with its residual.

    Args:
        run: The run.
        tag: The curve.
        moment: ``"last"``: the last point. ``"best"``: the point with the best value of this curve, see
            :func:`higher_is_better`; of ``flatness/`` curves the point nearest to the lowest training loss, for the
            flattest network is the one that has learnt least. Otherwise: at ``step``.
        step: Where; between two points interpolated, in the logarithm if both are positive.
        loss_tag: The training loss.
    """
    curve = run.curves.get(tag)
    if curve is None:
        return Reading()
    if moment == "last":
        index = len(curve) - 1
    elif moment == "best":
        index = _trained(curve, run.curves.get(loss_tag or "")) if tag.startswith("flatness/") else _best(curve, tag)
    else:
        assert step is not None
        return Reading(_interpolated(curve, step), step, _interpolated(error_of(run, tag, "residual"), step))
    value, at = float(curve.values[index]), int(curve.steps[index])
    residual = _interpolated(error_of(run, tag, "residual"), at)
    return Reading(value, at, residual) if math.isfinite(value) else Reading(step=at)


def _best(curve: Curve, tag: str) -> int:
    values = -curve.values if higher_is_better(tag) else curve.values.copy()
    values[~np.isfinite(values)] = np.inf
    return int(np.argmin(values))


def _trained(curve: Curve, loss: Curve | None) -> int:
    """Return the index of the point nearest to the lowest training loss; of the last one without a loss."""
    if loss is None or not np.isfinite(loss.values).any():
        return len(curve) - 1
    lowest = loss.steps[np.nanargmin(np.where(np.isfinite(loss.values), loss.values, np.nan))]
    distances = np.abs(curve.steps - lowest)[::-1]
    return len(curve) - 1 - int(np.argmin(distances))  # of two the later one


def step_of_loss(curve: Curve, loss: float) -> float | None:
    """Return the step at which a training loss is first reached; None if it never is.

    Between the last point above it and the first at or below it, the step is interpolated in the logarithm of the loss
    (in the loss itself where that is not positive). If the first point is below, that is the step.
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

"""From numbers to verdicts: an effect with its 95 % interval, and which side of the claim that lies on.

Every verdict is one of three words. "holds here": the whole interval is where the claim says; "does not": the whole
interval is on the other side; "undecided": neither. Intervals are 95 % each, not corrected for how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

Verdict = Literal["holds here", "does not", "undecided"]
Direction = Literal["above", "below", "apart", "within"]


@dataclass(frozen=True)
class Effect:
    """An estimated effect with its 95 % interval.

    Attributes:
        estimate: The estimate.
        low: Lower end.
        high: Upper end.
        num: How many pairs (or models) it comes from.
        unit: ``"x"`` for a ratio, of which 1 is no effect; else 0 is, and this is printed: ``""`` or ``" %"``.
    """

    estimate: float
    low: float
    high: float
    num: int
    unit: str = ""


@dataclass(frozen=True)
class Claim:
    """What a paper says, and where an effect has to lie for it to hold.

    Attributes:
        text: The claim in words.
        direction: ``"above"`` or ``"below"`` no effect; ``"apart"``: on either side of it; ``"within"``: no farther
            from it than a margin.
        margin: How far from no effect still counts as none, chosen before looking; of a ratio: a ratio. With one, an
            effect ``"above"`` or ``"below"`` that is certainly no larger "does not" hold.
    """

    text: str
    direction: Direction
    margin: float = math.nan


Judged = tuple[Claim, str, Effect]
"""A claim, where it is looked at, and the effect there."""


def judge(effect: Effect, direction: Direction, margin: float = math.nan) -> Verdict:
    """Return whether a claim holds, given an effect.

    Args:
        effect: With its interval. Without numbers (nan) nothing is decided.
        direction: Where the claim says that the effect is; see :class:`Claim`.
        margin: Needed for ``"apart"`` and ``"within"``; see :class:`Claim`.

    Returns:
        The verdict.

    Raises:
        ValueError: If the direction needs a margin, and there is none.
    """
    low, high = effect.low, effect.high
    if effect.unit == "x":
        low, high = (math.log(v) if v != 0 else -math.inf for v in (low, high))
        margin = math.log(margin)
    near = -margin < low and high < margin
    if direction in ("above", "below"):
        inside, outside = (low > 0, high < 0) if direction == "above" else (high < 0, low > 0)
        inside, outside = inside and not near, outside or near
    elif margin > 0:
        apart, far = low > 0 or high < 0, low > margin or high < -margin
        inside, outside = (apart and not near, near) if direction == "apart" else (near, far)
    else:
        raise ValueError(f"Expected a margin for a claim of {direction!r}, got {margin}. Choose one before looking.")
    return "holds here" if inside else "does not" if outside else "undecided"


def seeds_to_decide(effect: Effect, direction: Direction, margin: float = math.nan, *, most: int = 1000) -> int | None:
    """Return how many seeds would decide, if mean and scatter over seeds stayed as they are.

    Args:
        effect: A mean with its t interval, from :func:`difference` or :func:`ratio`.
        direction: See :class:`Claim`.
        margin: See :class:`Claim`.
        most: Where to stop.

    Returns:
        The number of seeds in all; None if there is none up to ``most``, or the scatter is not known.
    """
    if effect.num < 2 or not math.isfinite(effect.high - effect.low):
        return None
    is_ratio = effect.unit == "x"
    mean, high = (math.log(v) if is_ratio else v for v in (effect.estimate, effect.high))
    deviation = (high - mean) * math.sqrt(effect.num) / stats.t.ppf(0.975, effect.num - 1)
    for num in range(effect.num, most + 1):
        half = deviation * stats.t.ppf(0.975, num - 1) / math.sqrt(num)
        low, high = (math.exp(v) if is_ratio else v for v in (mean - half, mean + half))
        if judge(Effect(effect.estimate, low, high, num, effect.unit), direction, margin) != "undecided":
            return num
    return None


def models_to_decide(effect: Effect, direction: Literal["above", "below"], *, most: int = 1000) -> int | None:
    """Return how many models would decide, if the estimate stayed as it is and its interval shrank with their root.

    Args:
        effect: With an interval from a bootstrap, such as a rank correlation.
        direction: See :class:`Claim`.
        most: Where to stop.

    Returns:
        The number of models in all, about; None if it is above ``most``, or there is no interval.
    """
    if judge(effect, direction) != "undecided":
        return effect.num
    to_zero = effect.estimate - effect.low if effect.estimate > 0 else effect.high - effect.estimate
    if not math.isfinite(to_zero) or effect.num * to_zero**2 >= most * effect.estimate**2:
        return None
    return math.floor(effect.num * (to_zero / effect.estimate) ** 2) + 1


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict on a claim that needs every one of its parts."""
    if "does not" in verdicts:
        return "does not"
    return "holds here" if verdicts and set(verdicts) == {"holds here"} else "undecided"


def not_all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict on the claim that something is not so everywhere."""
    if "does not" in verdicts:
        return "holds here"
    return "does not" if verdicts and set(verdicts) == {"holds here"} else "undecided"


def difference(a: dict[int, float], b: dict[int, float], unit: str = "") -> Effect:
    """Return the mean of ``a - b`` over the seeds that both have, with a t interval."""
    return mean_effect([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())], unit)


def ratio(a: dict[int, float], b: dict[int, float]) -> Effect:
    """Return the geometric mean of ``a / b`` over the seeds that both have, with a t interval of the logarithms."""
    logs = mean_effect([math.log(a[seed] / b[seed]) for seed in sorted(a.keys() & b.keys())])
    estimate, low, high = (math.exp(min(v, 700.0)) for v in (logs.estimate, logs.low, logs.high))
    return Effect(estimate, low, high, logs.num, unit="x")


def mean_effect(values: Sequence[float], unit: str = "") -> Effect:
    """Return the mean of independent values with a t interval; of fewer than two the interval is everything."""
    num = len(values)
    mean = float(np.mean(values)) if num else math.nan
    half = math.inf
    if num > 1:
        half = float(stats.t.ppf(0.975, num - 1) * np.std(values, ddof=1) / math.sqrt(num))
    return Effect(mean, mean - half, mean + half, num, unit=unit)

"""The first point of a ray at which a function rises above its start: bracketed by doubling and bisection.

Where the function is smooth, its rise over the distance is nearly a straight line, exactly one for a quadratic. The
root of that line says where to look next, so that mostly four values are enough; bisection takes over where it does
not help.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

_LARGEST, _SMALLEST = 2.0**24, 2.0**-24
_LARGEST_FACTOR = 16.0
"""Nothing is known beyond the last value: a prediction is not followed farther than by this factor."""


@dataclass
class Crossing:
    """Where a function first rises above its start, between two points of a ray.

    Attributes:
        low: The largest point below ``high`` at which it has not risen; 0 if it rises at every point looked at.
        high: The smallest point at which it has; infinite if it rises at none.
        rises: Its rises by the points looked at.
    """

    low: float = 0.0
    high: float = math.inf
    rises: dict[float, float] = field(default_factory=dict)

    @property
    def is_bracketed(self) -> bool:
        """Whether it is known on both sides."""
        return self.low > 0 and math.isfinite(self.high)

    @property
    def width(self) -> float:
        """Distance of both sides relative to their mean."""
        return 2 * (self.high - self.low) / (self.high + self.low) if math.isfinite(self.high) else math.inf

    @property
    def root(self) -> float | None:
        """Where the rise over the distance would vanish, were it linear; None if that is not where it can be."""
        points = sorted(self.rises)
        near = [self.low, self.high] if self.is_bracketed else points[-2:] if math.isinf(self.high) else points[:2]
        if len(near) < 2:
            return None
        a, b = near
        slopes = self.rises[a] / a, self.rises[b] / b
        if not all(map(math.isfinite, slopes)) or slopes[0] == slopes[1]:
            return None
        root = a - slopes[0] * (b - a) / (slopes[1] - slopes[0])
        return root if self.low < root < self.high else None

    @property
    def climbs(self) -> bool:
        """Whether the function rises from the start on: so two straight lines through its slopes say, much alike.

        Lines farther out than 1 say nothing: there the function may have bent the other way.
        """
        if self.low > 0 or len(self.rises) < 3:
            return False
        a, b, c = sorted(self.rises)[:3]
        if c > 1:
            return False
        nearer, farther = self._slope_at_start(a, b), self._slope_at_start(b, c)
        return 0 < farther < 2 * nearer < math.inf

    def _slope_at_start(self, a: float, b: float) -> float:
        slopes = self.rises[a] / a, self.rises[b] / b
        return slopes[0] - (slopes[1] - slopes[0]) / (b - a) * a

    @property
    def slope(self) -> float:
        """The derivative of the rise at the root, both sides being known."""
        by_distance = (self.rises[self.high] / self.high - self.rises[self.low] / self.low) / (self.high - self.low)
        return by_distance * self.at

    @property
    def at(self) -> float:
        """Where it most likely is, both sides being known."""
        return self.root or math.sqrt(self.low * self.high)

    def add(self, point: float, rise: float) -> None:
        """Take note of a value; one that is not a number counts as a rise."""
        self.rises[point] = rise = math.inf if math.isnan(rise) else rise
        self.high = min(self.high, point) if rise > 0 else self.high
        self.low = max((s for s, r in self.rises.items() if r <= 0 and s < self.high), default=0.0)


def first_crossing(
    rise: Callable[[float], float], tol: float, max_values: int, start: float | None = None, rounding: float = 0.0
) -> Crossing:
    """Return where a function first rises above its start, as far as doubling and halving can see.

    Args:
        rise: How far the function is above its start, at a distance > 0.
        tol: Width of the bracket, relative to its middle, to stop at.
        max_values: Values to stop at in any case.
        start: Where it has been before; default: 1 is looked at first.
        rounding: Of the values: where the function has risen by less, nothing is to be seen nearer to the start.

    Example:
        >>> crossing = first_crossing(lambda s: s * s - 3 * s, tol=1 / 16, max_values=20)
        >>> crossing.low < 3 < crossing.high, round(crossing.at, 6), len(crossing.rises)
        (True, 3.0, 4)
    """
    crossing, margin, widths = Crossing(), 0.45 * tol, list[float]()
    point: float | None = 1.0 if start is None else start * (1 + margin)
    while point is not None and len(crossing.rises) < max_values:
        crossing.add(point, rise(point))
        widths.append(crossing.width)
        if start is not None and len(widths) == 1:
            point = start * (1 - margin) if crossing.low == 0 else 1.5 * point
        else:
            is_slow = len(widths) > 2 and not widths[-1] < widths[-3] / 2
            point = _following(crossing, tol, margin, is_slow=is_slow)
        if crossing.climbs or (crossing.low == 0 and crossing.rises[crossing.high] <= rounding):
            break
    return crossing


def _following(crossing: Crossing, tol: float, margin: float, *, is_slow: bool) -> float | None:
    """Return where to look next; None if the bracket is narrow enough, or there is nothing to be seen."""
    low, high, root = crossing.low, crossing.high, crossing.root
    if math.isinf(high):
        farther = 2 * low if root is None else min(root * (1 + margin), _LARGEST_FACTOR * low)
        return max(farther, low * (2 if is_slow else 1 + tol)) if low < _LARGEST else None
    if low == 0:
        nearer = min(high / 2, 1.0) if root is None else max(root * (1 - margin), high / _LARGEST_FACTOR)
        return min(nearer, high * (0.5 if is_slow else 1 - tol)) if high > _SMALLEST else None
    if crossing.width <= tol:
        return None
    middle = math.sqrt(low * high)
    if root is None or is_slow:
        return middle
    closer = root * (1 + margin) if high / root > root / low else root * (1 - margin)
    return closer if low < closer < high else middle

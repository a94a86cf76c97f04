"""Kendall's tau within groups and across them, with intervals from a bootstrap over settings, for many measures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from verdicts import Effect

NUM_RESAMPLES = 4000


def taus(x: np.ndarray, y: np.ndarray, clusters: Sequence[str], groups: Sequence[str] | None = None) -> np.ndarray:
    """Return Kendall's tau-b of all models, and then of resamples in which whole settings are drawn.

    Seeds of one setting resemble each other: drawing models one by one would count them as independent, and make
    intervals too short. A model that is drawn c times counts as c models that are tied with each other: so tau is made
    of quadratic forms in the counts, and all resamples are done at once.

    Args:
        x: A number per model.
        y: Another one.
        clusters: The setting of each model.
        groups: Pairs of models of different groups do not count. Default: all count.

    Returns:
        An array of ``1 + NUM_RESAMPLES`` values; 0 where there is no order.
    """
    counts = np.vstack([np.ones(len(x)), resampled_counts(clusters)])
    counted = np.ones((len(x), len(x)))
    if groups is not None:
        counted = np.equal.outer(np.array(groups), np.array(groups)).astype(float)
    order_x, order_y = (np.sign(np.subtract.outer(v, v)) * counted for v in (x, y))

    def pairs(matrix: np.ndarray) -> np.ndarray:
        total: np.ndarray = np.sum(counts @ matrix * counts, axis=1)
        return total

    num_pairs = np.sqrt(pairs(order_x**2) * pairs(order_y**2))
    agreeing = pairs(order_x * order_y)
    found: np.ndarray = np.divide(agreeing, num_pairs, out=np.zeros_like(agreeing), where=num_pairs > 0)
    return found


def resampled_counts(clusters: Sequence[str], seed: int = 0) -> np.ndarray:
    """Return how often each model is drawn in each resample, shape (resamples, models)."""
    names = list(dict.fromkeys(clusters))
    draws = np.random.default_rng(seed).integers(len(names), size=(NUM_RESAMPLES, len(names)))
    counts = np.zeros((NUM_RESAMPLES, len(names)))
    np.add.at(counts, (np.arange(NUM_RESAMPLES)[:, None], draws), 1.0)
    return counts[:, [names.index(name) for name in clusters]]


def effect(values: np.ndarray, num: int, num_clusters: int) -> Effect:
    """Return the first of the values with the percentile interval of the others; fewer than two settings: none."""
    if num < 2:
        return Effect(math.nan, -math.inf, math.inf, num)
    if num_clusters < 2:
        return Effect(float(values[0]), -math.inf, math.inf, num)
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Effect(float(values[0]), float(low), float(high), num)

"""Named sets of metrics, for ``FlatnessMonitor(metrics="default")`` and ``FlatnessMonitor(metrics="all")``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

from lightning_flatness.estimators import TOLERANCE
from lightning_flatness.metrics.base import FlatnessMetric
from lightning_flatness.metrics.batch import BatchSharpness
from lightning_flatness.metrics.critical import CriticalSharpness, DirectionalSharpness
from lightning_flatness.metrics.density import SpectralDensity
from lightning_flatness.metrics.eigenvalues import InvariantSharpness, TopEigenvalues
from lightning_flatness.metrics.gradient_noise import FisherTrace, GradientNoise, NoiseCurvatureRatio
from lightning_flatness.metrics.layerwise import MinimumSharpness, RelativeFlatness
from lightning_flatness.metrics.path import PSISharpness
from lightning_flatness.metrics.sharpness import AverageCaseSharpness, WorstCaseSharpness
from lightning_flatness.metrics.trace import HessianTrace

Preset = Literal["default", "all"]

TYPICAL_COSTS: dict[str, tuple[int, int, int]] = {
    "lambda_max": (22, 16, 10),
    "invariant_sharpness": (22, 14, 10),
    "lambda_min": (42, 34, 46),
    "hessian_trace": (110, 110, 110),
    "spectral_density": (652, 652, 652),
    "worst_case_sharpness": (117, 77, 82),
    "adaptive_sharpness": (98, 76, 68),
    "average_case_sharpness": (40, 40, 40),
    "relative_flatness": (110, 110, 110),
    "minimum_sharpness": (207, 207, 207),
    "psi_sharpness": (28, 14, 10),
    "gradient_noise": (2, 2, 2),
    "fisher_trace": (2, 2, 2),
    "noise_curvature_ratio": (112, 112, 112),
    "batch_sharpness": (4, 4, 4),
    "critical_sharpness": (0, 3, 2),
    "directional_sharpness": (0, 4, 4),
}
"""Gradients of the loss per measurement, before training, after one epoch and after five.

Measured by ``examples/benchmarks/costs_of_measures.py``. The one source of the tables here and in the README.
"""


def preset_metrics(
    preset: Preset = "default", *, top_k: int = 1, tol: float = TOLERANCE, seed: int = 0
) -> dict[str, FlatnessMetric]:
    """Return the metrics of a named set, by the names under which the monitor logs them.

    The cost of one measurement is in gradients of the loss on all samples. It was measured on the convolutional network
    of ``examples/digits.py`` (13,706 weights, 512 samples) before training, after one epoch and after five, each metric
    alone. Together they share the gradient.

    ============================ =========== =====================================================
    name                         gradients   metric
    ============================ =========== =====================================================
    lambda_max                   22, 16, 10  ``TopEigenvalues(k=top_k)``
    invariant_sharpness          22, 14, 10  ``InvariantSharpness()``
    lambda_min                   42, 34, 46  ``TopEigenvalues(which="SA")``
    hessian_trace                110         ``HessianTrace()``
    spectral_density             652         ``SpectralDensity()``
    worst_case_sharpness         117, 77, 82 ``WorstCaseSharpness(rho=0.05)``
    adaptive_sharpness           98, 76, 68  ``WorstCaseSharpness(rho=0.5, geometry="element")``
    average_case_sharpness       40          ``AverageCaseSharpness(rho=0.05)``
    relative_flatness            110         ``RelativeFlatness()``, of the last linear layer
    minimum_sharpness            207         ``MinimumSharpness()``
    psi_sharpness                28, 14, 10  ``PSISharpness()``
    gradient_noise               2           ``GradientNoise()``
    fisher_trace                 2           ``FisherTrace()``
    noise_curvature_ratio        112         ``NoiseCurvatureRatio()``
    batch_sharpness              4           ``BatchSharpness()``
    critical_sharpness           0, 3, 2     ``CriticalSharpness()``
    directional_sharpness        0, 4, 4     ``DirectionalSharpness()``
    ============================ =========== =====================================================

    ``"default"`` has the first two, ``"all"`` all of them, about 1,600 gradients: use that at checkpoints or every n-th
    epoch. Eigenvalues cost less if an earlier measurement provides the start.

    Args:
        preset: ``"default"`` or ``"all"``.
        top_k: How many eigenvalues ``lambda_max`` has.
        tol: Relative Ritz residual at which the eigenvalues stop.
        seed: Seed of all metrics.

    Returns:
        New metrics by name.

    Raises:
        ValueError: If there is no set of that name.

    Example:
        >>> list(preset_metrics())
        ['lambda_max', 'invariant_sharpness']
    """
    if preset not in get_args(Preset):
        raise ValueError(f"Expected `metrics` to be 'default', 'all' or a dict of names and metrics, got {preset!r}.")
    metrics: dict[str, FlatnessMetric] = {
        "lambda_max": TopEigenvalues(k=top_k, tol=tol, seed=seed),
        "invariant_sharpness": InvariantSharpness(tol=tol, seed=seed, shared_start=True),
    }
    if preset == "all":
        metrics |= {
            "lambda_min": TopEigenvalues(which="SA", tol=tol, seed=seed),
            "hessian_trace": HessianTrace(seed=seed),
            "spectral_density": SpectralDensity(seed=seed),
            "worst_case_sharpness": WorstCaseSharpness(rho=0.05, seed=seed),
            "adaptive_sharpness": WorstCaseSharpness(rho=0.5, geometry="element", seed=seed),
            "average_case_sharpness": AverageCaseSharpness(rho=0.05, seed=seed),
            "relative_flatness": RelativeFlatness(seed=seed),
            "minimum_sharpness": MinimumSharpness(seed=seed),
            "psi_sharpness": PSISharpness(tol=tol, seed=seed),
            "gradient_noise": GradientNoise(),
            "fisher_trace": FisherTrace(),
            "noise_curvature_ratio": NoiseCurvatureRatio(seed=seed),
            "batch_sharpness": BatchSharpness(),
            "critical_sharpness": CriticalSharpness(),
            "directional_sharpness": DirectionalSharpness(),
        }
    return metrics


def typical_gradients(metrics: Iterable[FlatnessMetric]) -> float:
    """Return what one measurement is expected to take after an epoch, in gradients of the loss on all samples.

    The typical cost of each class, times the eigenvalues, products, runs or draws that it has more than in the presets.

    Args:
        metrics: What is measured.

    Returns:
        The gradients. A class that is not in the table counts as lambda_max.

    Example:
        >>> typical_gradients([HessianTrace(num_products=96)]) / typical_gradients([HessianTrace()])
        2.0
    """
    known: dict[tuple[type, object], tuple[int, FlatnessMetric]] = {}
    for name, metric in preset_metrics("all").items():
        known.setdefault(_kind(metric), (TYPICAL_COSTS[name][1], metric))
    default = known[_kind(TopEigenvalues())]
    found = [(metric, *known.get(_kind(metric), default)) for metric in metrics]
    return sum(cost * _effort(metric, typical) for metric, cost, typical in found)


def _kind(metric: FlatnessMetric) -> tuple[type, object]:
    return type(metric), metric.settings.get("which") == "SA"


def _effort(metric: FlatnessMetric, typical: FlatnessMetric) -> float:
    own, usual = metric.settings, typical.settings
    counts = ("k", "num_products", "num_runs", "num_steps", "num_restarts", "num_draws")
    ratios = [own[name] / usual[name] for name in counts if name in own and own[name] != usual.get(name, own[name])]
    return math.prod(ratios) if ratios else 1

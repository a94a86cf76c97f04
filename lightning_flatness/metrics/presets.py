"""Named sets of metrics, for ``FlatnessMonitor(metrics="default")`` and ``FlatnessMonitor(metrics="all")``."""

from __future__ import annotations

from typing import Literal, get_args

from lightning_flatness.metrics.base import FlatnessMetric
from lightning_flatness.metrics.density import SpectralDensity
from lightning_flatness.metrics.eigenvalues import InvariantSharpness, TopEigenvalues
from lightning_flatness.metrics.gradient_noise import GradientNoise, NoiseCurvatureRatio
from lightning_flatness.metrics.layerwise import MinimumSharpness, RelativeFlatness
from lightning_flatness.metrics.sharpness import AverageCaseSharpness, WorstCaseSharpness
from lightning_flatness.metrics.trace import HessianTrace

Preset = Literal["default", "all"]


def preset_metrics(
    preset: Preset = "default", *, top_k: int = 1, tol: float = 1e-2, seed: int = 0
) -> dict[str, FlatnessMetric]:
    """Return the metrics of a named set, by the names under which the monitor logs them.

    Cost of one measurement in gradients of the loss on all samples, measured on the convolutional network of
    ``examples/digits.py`` (15,578 weights, 512 samples) before training and after one and five epochs:

    ============================ =========== =====================================================
    name                         gradients   metric
    ============================ =========== =====================================================
    lambda_max                   COST        ``TopEigenvalues(k=top_k)``
    invariant_sharpness          COST        ``InvariantSharpness()``
    lambda_min                   COST        ``TopEigenvalues(which="SA")``
    hessian_trace                COST        ``HessianTrace()``
    spectral_density             COST        ``SpectralDensity()``
    worst_case_sharpness         COST        ``WorstCaseSharpness(rho=0.05)``
    adaptive_sharpness           COST        ``WorstCaseSharpness(rho=0.5, geometry="element")``
    average_case_sharpness       COST        ``AverageCaseSharpness(rho=0.05)``
    relative_flatness            COST        ``RelativeFlatness()``, of the last linear layer
    minimum_sharpness            COST        ``MinimumSharpness()``
    gradient_noise               COST        ``GradientNoise()``
    noise_curvature_ratio        COST        ``NoiseCurvatureRatio()``
    ============================ =========== =====================================================

    ``"default"`` has the first two, ``"all"`` all of them.

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
        "invariant_sharpness": InvariantSharpness(tol=tol, seed=seed),
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
            "gradient_noise": GradientNoise(),
            "noise_curvature_ratio": NoiseCurvatureRatio(seed=seed),
        }
    return metrics

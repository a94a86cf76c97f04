"""Estimators: pure functions of a landscape and a geometry that return a number with its error."""

from lightning_flatness.estimators.density import DensityResult, spectral_density
from lightning_flatness.estimators.eigenvalues import top_eigenvalues
from lightning_flatness.estimators.krylov import EigenResult, Which
from lightning_flatness.estimators.lanczos import lanczos
from lightning_flatness.estimators.minimum import MinimumSharpnessResult, minimum_sharpness
from lightning_flatness.estimators.noise import GradientNoiseResult, gradient_noise, noise_curvature_ratio
from lightning_flatness.estimators.operators import Operator
from lightning_flatness.estimators.relative import relative_flatness
from lightning_flatness.estimators.sharpness import (
    BallNorm,
    SharpnessResult,
    average_case_sharpness,
    worst_case_sharpness,
)
from lightning_flatness.estimators.trace import TraceMethod, TraceResult, hessian_trace, stochastic_trace
from lightning_flatness.estimators.undefined import UndefinedMeasureError

__all__ = [
    "BallNorm",
    "DensityResult",
    "EigenResult",
    "GradientNoiseResult",
    "MinimumSharpnessResult",
    "Operator",
    "SharpnessResult",
    "TraceMethod",
    "TraceResult",
    "UndefinedMeasureError",
    "Which",
    "average_case_sharpness",
    "gradient_noise",
    "hessian_trace",
    "lanczos",
    "minimum_sharpness",
    "noise_curvature_ratio",
    "relative_flatness",
    "spectral_density",
    "stochastic_trace",
    "top_eigenvalues",
    "worst_case_sharpness",
]

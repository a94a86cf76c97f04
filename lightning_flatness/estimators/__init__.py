"""Estimators: pure functions of a landscape and a geometry that return a number with its error."""

from lightning_flatness.estimators.arguments import BallNorm, TraceMethod
from lightning_flatness.estimators.average_case import average_case_sharpness
from lightning_flatness.estimators.balance import basis_path_balance
from lightning_flatness.estimators.batch import batch_sharpness
from lightning_flatness.estimators.critical import critical_sharpness, directional_sharpness
from lightning_flatness.estimators.density import DensityResult, spectral_density
from lightning_flatness.estimators.eigenvalues import LayerEigenvalues, layer_eigenvalues, top_eigenvalues
from lightning_flatness.estimators.krylov.lanczos import TOLERANCE, lanczos
from lightning_flatness.estimators.krylov.solver import EigenResult, Which
from lightning_flatness.estimators.minimum import MinimumSharpnessResult, minimum_sharpness
from lightning_flatness.estimators.noise import fisher_trace, gradient_noise, noise_curvature_ratio
from lightning_flatness.estimators.operators import NonFiniteProductError, Operator
from lightning_flatness.estimators.relative import relative_flatness
from lightning_flatness.estimators.result import Estimate
from lightning_flatness.estimators.stability import (
    LearningRates,
    current_learning_rates,
    stability_band,
    stability_edge,
)
from lightning_flatness.estimators.trace import LayeredEstimate, hessian_trace, stochastic_trace
from lightning_flatness.estimators.undefined import UndefinedMeasureError
from lightning_flatness.estimators.worst_case import worst_case_sharpness

__all__ = [
    "TOLERANCE",
    "BallNorm",
    "DensityResult",
    "EigenResult",
    "Estimate",
    "LayerEigenvalues",
    "LayeredEstimate",
    "LearningRates",
    "MinimumSharpnessResult",
    "NonFiniteProductError",
    "Operator",
    "TraceMethod",
    "UndefinedMeasureError",
    "Which",
    "average_case_sharpness",
    "basis_path_balance",
    "batch_sharpness",
    "critical_sharpness",
    "current_learning_rates",
    "directional_sharpness",
    "fisher_trace",
    "gradient_noise",
    "hessian_trace",
    "lanczos",
    "layer_eigenvalues",
    "minimum_sharpness",
    "noise_curvature_ratio",
    "relative_flatness",
    "spectral_density",
    "stability_band",
    "stability_edge",
    "stochastic_trace",
    "top_eigenvalues",
    "worst_case_sharpness",
]

"""Estimators: pure functions of a landscape and a geometry that return a number with its error."""

from lightning_flatness.estimators.density import DensityResult, spectral_density
from lightning_flatness.estimators.eigenvalues import top_eigenvalues
from lightning_flatness.estimators.lanczos import EigenResult, Which, lanczos
from lightning_flatness.estimators.operators import Operator
from lightning_flatness.estimators.trace import TraceMethod, TraceResult, hessian_trace, stochastic_trace

__all__ = [
    "DensityResult",
    "EigenResult",
    "Operator",
    "TraceMethod",
    "TraceResult",
    "Which",
    "hessian_trace",
    "lanczos",
    "spectral_density",
    "stochastic_trace",
    "top_eigenvalues",
]

"""Estimators: pure functions of a landscape and a geometry that return a number with its error."""

from lightning_flatness.estimators.eigenvalues import top_eigenvalues
from lightning_flatness.estimators.lanczos import EigenResult, Which, lanczos

__all__ = ["EigenResult", "Which", "lanczos", "top_eigenvalues"]

"""Extreme eigenpairs of a symmetric operator by a Krylov method."""

from lightning_flatness.estimators.krylov.lanczos import lanczos
from lightning_flatness.estimators.krylov.solver import EigenResult, KrylovSolver, Which

__all__ = ["EigenResult", "KrylovSolver", "Which", "lanczos"]

"""Sharpness-aware minimisation: the perturbation of the weights, and the optimizer for plain loops."""

from lightning_flatness.sam.ascent import Ascent, PreviousGradient, check_ascent, known_direction, why_no_ascent
from lightning_flatness.sam.optimizer import SAM
from lightning_flatness.sam.perturbation import (
    Displacement,
    check_rho,
    linear_geometry,
    optimized_parameters,
    perturbed,
)

__all__ = [
    "SAM",
    "Ascent",
    "Displacement",
    "PreviousGradient",
    "check_ascent",
    "check_rho",
    "known_direction",
    "linear_geometry",
    "optimized_parameters",
    "perturbed",
    "why_no_ascent",
]

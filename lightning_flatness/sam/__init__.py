"""Sharpness-aware minimisation: the perturbation of the weights, and the optimizer for plain loops."""

from lightning_flatness.sam.optimizer import SAM
from lightning_flatness.sam.perturbation import check_rho, linear_geometry, optimized_parameters, perturbed

__all__ = ["SAM", "check_rho", "linear_geometry", "optimized_parameters", "perturbed"]

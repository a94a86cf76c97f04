"""Callbacks for the Lightning Trainer: training that seeks flat minima."""

from lightning_flatness.callbacks.sharpness_aware_minimization import SharpnessAwareMinimization

__all__ = ["SharpnessAwareMinimization"]

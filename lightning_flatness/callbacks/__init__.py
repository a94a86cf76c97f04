"""Lightning callbacks."""

from lightning_flatness.callbacks.flatness_monitor import FlatnessMonitor
from lightning_flatness.callbacks.loss_surface_monitor import LossSurfaceMonitor
from lightning_flatness.callbacks.probe import draw_probe
from lightning_flatness.callbacks.sharpness_aware_minimization import SharpnessAwareMinimization

__all__ = ["FlatnessMonitor", "LossSurfaceMonitor", "SharpnessAwareMinimization", "draw_probe"]

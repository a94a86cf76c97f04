"""Lightning callbacks."""

from lightning_flatness.callbacks.flatness_monitor import FlatnessMonitor
from lightning_flatness.callbacks.loss_surface_monitor import LossSurfaceMonitor

__all__ = ["FlatnessMonitor", "LossSurfaceMonitor"]

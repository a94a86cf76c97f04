"""Lightning callbacks."""

from lightning_flatness.callbacks.flatness_monitor import FlatnessMonitor

__all__ = ["FlatnessMonitor"]

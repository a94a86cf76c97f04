"""Loss surfaces: the loss along lines and over planes through the weights, measured and drawn."""

from lightning_flatness.surface.draw import compare_surfaces
from lightning_flatness.surface.measure import LossSurface, check_options, loss_surface

__all__ = ["LossSurface", "check_options", "compare_surfaces", "loss_surface"]

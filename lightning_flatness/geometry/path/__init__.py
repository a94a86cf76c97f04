"""Geometry ``"path"``: the values of the basis paths of a ReLU chain as coordinates."""

from lightning_flatness.geometry.path.chart import PathChart
from lightning_flatness.geometry.path.path_geometry import PathGeometry

__all__ = ["PathChart", "PathGeometry"]

"""Geometry ``"path_norm"``: every weight measured by the paths of the network that lead through it."""

from lightning_flatness.geometry.path_norm.path_norm_geometry import PathNormGeometry

__all__ = ["PathNormGeometry"]

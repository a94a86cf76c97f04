"""Geometries: how far apart two weight vectors are. Flatness is measured, minimised and drawn in them."""

from lightning_flatness.geometry.base import Chart, Geometry, LinearChart, LinearGeometry
from lightning_flatness.geometry.linear import Element, Euclidean, Filter, Layer
from lightning_flatness.geometry.optimizer import (
    MissingOptimizerStateError,
    OptimizerGeometry,
    unwrapped_optimizers,
)
from lightning_flatness.geometry.path import PathChart, PathGeometry
from lightning_flatness.geometry.registry import GEOMETRIES, resolve_geometry

__all__ = [
    "GEOMETRIES",
    "Chart",
    "Element",
    "Euclidean",
    "Filter",
    "Geometry",
    "Layer",
    "LinearChart",
    "LinearGeometry",
    "MissingOptimizerStateError",
    "OptimizerGeometry",
    "PathChart",
    "PathGeometry",
    "resolve_geometry",
    "unwrapped_optimizers",
]

"""Geometries: how far apart two weight vectors are. Flatness is measured, minimised and drawn in them."""

from lightning_flatness.geometry.attention import AttentionGeometry, Pair, Part
from lightning_flatness.geometry.base import (
    Chart,
    FirstBatch,
    Geometry,
    LinearChart,
    LinearGeometry,
    UndefinedGeometryError,
)
from lightning_flatness.geometry.known_optimizers import (
    decays_apart,
    is_preconditioned,
    known_optimizer,
    largest_divisor,
    unwrapped_optimizers,
)
from lightning_flatness.geometry.linear import Element, Euclidean, Filter, Layer
from lightning_flatness.geometry.optimizer import MissingOptimizerStateError, OptimizerGeometry
from lightning_flatness.geometry.path import PathChart, PathGeometry
from lightning_flatness.geometry.path_norm import PathNormGeometry
from lightning_flatness.geometry.registry import GEOMETRIES, resolve_geometry

__all__ = [
    "GEOMETRIES",
    "AttentionGeometry",
    "Chart",
    "Element",
    "Euclidean",
    "Filter",
    "FirstBatch",
    "Geometry",
    "Layer",
    "LinearChart",
    "LinearGeometry",
    "MissingOptimizerStateError",
    "OptimizerGeometry",
    "Pair",
    "Part",
    "PathChart",
    "PathGeometry",
    "PathNormGeometry",
    "UndefinedGeometryError",
    "decays_apart",
    "is_preconditioned",
    "known_optimizer",
    "largest_divisor",
    "resolve_geometry",
    "unwrapped_optimizers",
]

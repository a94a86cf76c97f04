"""Names for geometries, as users type them."""

from __future__ import annotations

from lightning_flatness.geometry.base import Geometry
from lightning_flatness.geometry.linear import Element, Euclidean, Filter, Layer
from lightning_flatness.geometry.optimizer import OptimizerGeometry
from lightning_flatness.geometry.path import PathGeometry

GEOMETRIES: dict[str, type[Geometry]] = {
    g.name: g for g in (Euclidean, Layer, Filter, Element, OptimizerGeometry, PathGeometry)
}
"""The geometries that have a name. A ``Geometry`` object can be passed wherever a name can."""


def resolve_geometry(geometry: str | Geometry) -> Geometry:
    """Return the geometry that a name stands for; a ``Geometry`` object is returned as it is.

    Args:
        geometry: ``"euclidean"``, ``"layer"``, ``"filter"``, ``"element"``, ``"optimizer"`` or ``"path"``, or a
            ``Geometry``.

    Returns:
        The geometry.

    Raises:
        ValueError: If there is no geometry of that name.
        TypeError: If it is neither a name nor a ``Geometry``.

    Example:
        >>> resolve_geometry("layer")
        Layer()
    """
    if isinstance(geometry, Geometry):
        return geometry
    if not isinstance(geometry, str):
        raise TypeError(
            f"Expected `geometry` to be a name or a Geometry, got {type(geometry).__name__}. "
            f"Pass one of {sorted(GEOMETRIES)}."
        )
    if geometry not in GEOMETRIES:
        raise ValueError(f"Expected `geometry` to be one of {sorted(GEOMETRIES)}, got {geometry!r}.")
    return GEOMETRIES[geometry]()

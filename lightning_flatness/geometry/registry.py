"""Names for geometries, as users type them."""

from __future__ import annotations

from difflib import get_close_matches

from lightning_flatness.geometry.attention import AttentionGeometry
from lightning_flatness.geometry.base import Geometry
from lightning_flatness.geometry.linear import Element, Euclidean, Filter, Layer
from lightning_flatness.geometry.optimizer import OptimizerGeometry
from lightning_flatness.geometry.path import PathGeometry
from lightning_flatness.geometry.path_norm import PathNormGeometry

GEOMETRIES: dict[str, type[Geometry]] = {
    g.name: g
    for g in (Euclidean, Layer, Filter, Element, OptimizerGeometry, PathGeometry, PathNormGeometry, AttentionGeometry)
}
"""The geometries that have a name. A ``Geometry`` object can be passed wherever a name can."""


_ALSO_CALLED = {
    "sam": "euclidean",
    "l2": "euclidean",
    "asam": "element",
    "adaptive": "element",
    "elementwise": "element",
    "filterwise": "filter",
    "filter_normalized": "filter",
    "layerwise": "layer",
    "relative": "layer",
    "adam": "optimizer",
    "preconditioned": "optimizer",
    "psi": "path",
}
"""Names of the geometries, or of methods that use them, elsewhere."""


def resolve_geometry(geometry: str | Geometry) -> Geometry:
    """Return the geometry that a name in ``GEOMETRIES`` stands for; a ``Geometry`` object is returned as it is.

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
        known = {**{name: name for name in GEOMETRIES}, **_ALSO_CALLED}
        guess = get_close_matches(geometry.lower(), known, n=1)
        hint = f" Did you mean {known[guess[0]]!r}?" if guess else ""
        raise ValueError(f"Expected `geometry` to be one of {sorted(GEOMETRIES)}, got {geometry!r}.{hint}")
    return GEOMETRIES[geometry]()

"""The error of a measure that is asked of a module it is not defined for."""

from __future__ import annotations


class UndefinedMeasureError(ValueError):
    """The measure is not defined for this module or loss; others are. Presets of metrics leave it out."""

"""Geometry ``"attention"``: no change of basis of a head's query-key and value-output space changes its numbers."""

from lightning_flatness.geometry.attention.attention_geometry import AttentionChart, AttentionGeometry
from lightning_flatness.geometry.attention.pairs import Pair, Part

__all__ = ["AttentionChart", "AttentionGeometry", "Pair", "Part"]

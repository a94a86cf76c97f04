"""Flatness measures as torchmetrics: ``update(landscape)`` measures, ``compute()`` returns tensors."""

from lightning_flatness.metrics.base import FlatnessMetric
from lightning_flatness.metrics.eigenvalues import InvariantSharpness, TopEigenvalues

__all__ = ["FlatnessMetric", "InvariantSharpness", "TopEigenvalues"]

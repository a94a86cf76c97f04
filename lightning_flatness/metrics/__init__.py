"""Flatness measures as torchmetrics: ``update(landscape)`` measures, ``compute()`` returns tensors."""

from lightning_flatness.metrics.base import FlatnessMetric
from lightning_flatness.metrics.eigenvalues import InvariantSharpness, TopEigenvalues
from lightning_flatness.metrics.path import BasisPathBalance, PSISharpness

__all__ = ["BasisPathBalance", "FlatnessMetric", "InvariantSharpness", "PSISharpness", "TopEigenvalues"]

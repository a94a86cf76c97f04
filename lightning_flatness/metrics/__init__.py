"""Flatness measures as torchmetrics: ``update(landscape)`` measures, ``compute()`` returns tensors."""

from lightning_flatness.metrics.base import FlatnessMetric
from lightning_flatness.metrics.batch import BatchSharpness
from lightning_flatness.metrics.critical import CriticalSharpness, DirectionalSharpness
from lightning_flatness.metrics.density import SpectralDensity
from lightning_flatness.metrics.eigenvalues import InvariantSharpness, TopEigenvalues
from lightning_flatness.metrics.gradient_noise import FisherTrace, GradientNoise, NoiseCurvatureRatio
from lightning_flatness.metrics.layerwise import MinimumSharpness, RelativeFlatness
from lightning_flatness.metrics.path import BasisPathBalance, PSISharpness
from lightning_flatness.metrics.presets import TYPICAL_COSTS, Preset, preset_metrics
from lightning_flatness.metrics.sharpness import AverageCaseSharpness, WorstCaseSharpness
from lightning_flatness.metrics.trace import HessianTrace

__all__ = [
    "TYPICAL_COSTS",
    "AverageCaseSharpness",
    "BasisPathBalance",
    "BatchSharpness",
    "CriticalSharpness",
    "DirectionalSharpness",
    "FisherTrace",
    "FlatnessMetric",
    "GradientNoise",
    "HessianTrace",
    "InvariantSharpness",
    "MinimumSharpness",
    "NoiseCurvatureRatio",
    "PSISharpness",
    "Preset",
    "RelativeFlatness",
    "SpectralDensity",
    "TopEigenvalues",
    "WorstCaseSharpness",
    "preset_metrics",
]

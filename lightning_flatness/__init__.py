"""Loss-landscape flatness for PyTorch Lightning: what it is, how it moves, and training that seeks it."""

from lightning_flatness.callbacks import FlatnessMonitor
from lightning_flatness.gauss_newton import OutputLoss
from lightning_flatness.geometry import OptimizerGeometry
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.metrics import (
    AverageCaseSharpness,
    GradientNoise,
    HessianTrace,
    InvariantSharpness,
    MinimumSharpness,
    NoiseCurvatureRatio,
    RelativeFlatness,
    SpectralDensity,
    TopEigenvalues,
    WorstCaseSharpness,
)
from lightning_flatness.stability import stability_edge

__version__ = "0.1.0"
__all__ = [
    "AverageCaseSharpness",
    "FlatnessMonitor",
    "GradientNoise",
    "HessianTrace",
    "InvariantSharpness",
    "LossLandscape",
    "MinimumSharpness",
    "NoiseCurvatureRatio",
    "OptimizerGeometry",
    "OutputLoss",
    "RelativeFlatness",
    "SpectralDensity",
    "TopEigenvalues",
    "WorstCaseSharpness",
    "stability_edge",
]

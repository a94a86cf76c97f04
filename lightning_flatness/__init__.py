"""Loss-landscape flatness for PyTorch Lightning: what it is, how it moves, and training that seeks it."""

from lightning_flatness.callbacks import FlatnessMonitor, LossSurfaceMonitor, SharpnessAwareMinimization
from lightning_flatness.gauss_newton import OutputLoss
from lightning_flatness.geometry import OptimizerGeometry, PathGeometry
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.metrics import (
    AverageCaseSharpness,
    BasisPathBalance,
    GradientNoise,
    HessianTrace,
    InvariantSharpness,
    MinimumSharpness,
    NoiseCurvatureRatio,
    PSISharpness,
    RelativeFlatness,
    SpectralDensity,
    TopEigenvalues,
    WorstCaseSharpness,
)
from lightning_flatness.sam import SAM
from lightning_flatness.stability import stability_edge
from lightning_flatness.surface import LossSurface, compare_surfaces, loss_surface

__version__ = "0.1.0"
__all__ = [
    "SAM",
    "AverageCaseSharpness",
    "BasisPathBalance",
    "FlatnessMonitor",
    "GradientNoise",
    "HessianTrace",
    "InvariantSharpness",
    "LossLandscape",
    "LossSurface",
    "LossSurfaceMonitor",
    "MinimumSharpness",
    "NoiseCurvatureRatio",
    "OptimizerGeometry",
    "OutputLoss",
    "PSISharpness",
    "PathGeometry",
    "RelativeFlatness",
    "SharpnessAwareMinimization",
    "SpectralDensity",
    "TopEigenvalues",
    "WorstCaseSharpness",
    "compare_surfaces",
    "loss_surface",
    "stability_edge",
]

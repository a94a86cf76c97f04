"""Loss-landscape flatness for PyTorch Lightning: what it is, how it moves, and training that seeks it."""

from lightning_flatness.callbacks import FlatnessMonitor, SharpnessAwareMinimization
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.metrics import InvariantSharpness, TopEigenvalues
from lightning_flatness.sam import SAM

__version__ = "0.1.0"
__all__ = [
    "SAM",
    "FlatnessMonitor",
    "InvariantSharpness",
    "LossLandscape",
    "SharpnessAwareMinimization",
    "TopEigenvalues",
]

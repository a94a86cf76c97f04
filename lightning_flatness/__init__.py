"""Loss-landscape flatness for PyTorch Lightning: what it is, how it moves, and training that seeks it."""

from lightning_flatness.callbacks import FlatnessMonitor, LossSurfaceMonitor
from lightning_flatness.geometry import PathGeometry
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.metrics import BasisPathBalance, InvariantSharpness, PSISharpness, TopEigenvalues
from lightning_flatness.surface import LossSurface, compare_surfaces, loss_surface

__version__ = "0.1.0"
__all__ = [
    "BasisPathBalance",
    "FlatnessMonitor",
    "InvariantSharpness",
    "LossLandscape",
    "LossSurface",
    "LossSurfaceMonitor",
    "PSISharpness",
    "PathGeometry",
    "TopEigenvalues",
    "compare_surfaces",
    "loss_surface",
]

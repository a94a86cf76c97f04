"""Loss-landscape flatness for PyTorch Lightning: what it is, how it moves, and training that seeks it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_flatness.callbacks import FlatnessMonitor, LossSurfaceMonitor, SharpnessAwareMinimization
    from lightning_flatness.compare import Comparison, compare_runs
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
    "Comparison",
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
    "compare_runs",
    "compare_surfaces",
    "loss_surface",
    "stability_edge",
]

_HOMES = {
    "callbacks": ("FlatnessMonitor", "LossSurfaceMonitor", "SharpnessAwareMinimization"),
    "compare": ("Comparison", "compare_runs"),
    "gauss_newton": ("OutputLoss",),
    "geometry": ("OptimizerGeometry", "PathGeometry"),
    "landscape": ("LossLandscape",),
    "sam": ("SAM",),
    "stability": ("stability_edge",),
    "surface": ("LossSurface", "compare_surfaces", "loss_surface"),
}
"""Where to find each public name; the others are metrics."""


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, when it is asked for: the command line needs no torch."""
    if name in __all__:
        home = next((home for home, names in _HOMES.items() if name in names), "metrics")
        value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

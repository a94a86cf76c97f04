"""Flatness of the loss landscape for PyTorch Lightning: measured, logged and trained for."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_flatness.callbacks import (
        FlatnessMonitor,
        LossSurfaceMonitor,
        SharpnessAwareMinimization,
        draw_probe,
    )
    from lightning_flatness.compare import Comparison, compare_runs
    from lightning_flatness.estimators import stability_edge
    from lightning_flatness.geometry import (
        AttentionGeometry,
        OptimizerGeometry,
        Pair,
        Part,
        PathGeometry,
        PathNormGeometry,
    )
    from lightning_flatness.landscape import LossLandscape, OptimizerStep, OutputLoss, ShardedLandscape
    from lightning_flatness.measuring import (
        FlatnessReport,
        FlatnessTracker,
        MeasuredCheckpoints,
        measure,
        measure_checkpoints,
    )
    from lightning_flatness.metrics import (
        AverageCaseSharpness,
        BasisPathBalance,
        BatchSharpness,
        CriticalSharpness,
        DirectionalSharpness,
        FisherTrace,
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
    from lightning_flatness.surface import LossSurface, compare_surfaces, loss_surface

__version__ = "0.1.0"
__all__ = [
    "SAM",
    "AttentionGeometry",
    "AverageCaseSharpness",
    "BasisPathBalance",
    "BatchSharpness",
    "Comparison",
    "CriticalSharpness",
    "DirectionalSharpness",
    "FisherTrace",
    "FlatnessMonitor",
    "FlatnessReport",
    "FlatnessTracker",
    "GradientNoise",
    "HessianTrace",
    "InvariantSharpness",
    "LossLandscape",
    "LossSurface",
    "LossSurfaceMonitor",
    "MeasuredCheckpoints",
    "MinimumSharpness",
    "NoiseCurvatureRatio",
    "OptimizerGeometry",
    "OptimizerStep",
    "OutputLoss",
    "PSISharpness",
    "Pair",
    "Part",
    "PathGeometry",
    "PathNormGeometry",
    "RelativeFlatness",
    "ShardedLandscape",
    "SharpnessAwareMinimization",
    "SpectralDensity",
    "TopEigenvalues",
    "WorstCaseSharpness",
    "compare_runs",
    "compare_surfaces",
    "draw_probe",
    "loss_surface",
    "measure",
    "measure_checkpoints",
    "stability_edge",
]

_HOMES = {
    "callbacks": ("FlatnessMonitor", "LossSurfaceMonitor", "SharpnessAwareMinimization", "draw_probe"),
    "compare": ("Comparison", "compare_runs"),
    "estimators": ("stability_edge",),
    "geometry": ("AttentionGeometry", "OptimizerGeometry", "Pair", "Part", "PathGeometry", "PathNormGeometry"),
    "landscape": ("LossLandscape", "OptimizerStep", "OutputLoss", "ShardedLandscape"),
    "measuring": ("FlatnessReport", "FlatnessTracker", "MeasuredCheckpoints", "measure", "measure_checkpoints"),
    "sam": ("SAM",),
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

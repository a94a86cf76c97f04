"""The measures of the package as a study takes them, each alone, with its errors and its cost."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from lightning_flatness import (
    AverageCaseSharpness,
    BasisPathBalance,
    BatchSharpness,
    FisherTrace,
    GradientNoise,
    HessianTrace,
    InvariantSharpness,
    LossLandscape,
    MinimumSharpness,
    NoiseCurvatureRatio,
    OutputLoss,
    PSISharpness,
    RelativeFlatness,
    TopEigenvalues,
    WorstCaseSharpness,
)
from lightning_flatness.estimators import UndefinedMeasureError
from lightning_flatness.geometry import UndefinedGeometryError
from lightning_flatness.metrics import FlatnessMetric

TOL = 1e-2
NUM_PRODUCTS = 12
NUM_DRAWS = 20
NUM_STEPS = 10
ALL_KINDS = ("mlp", "cnn", "resnet", "transformer")


@dataclass(frozen=True)
class Measure:
    """A measure of a study.

    Attributes:
        title: What tables and pictures call it.
        make: Returns a new metric.
        kinds: Networks for which it is not another measure under a second name. Where it is not defined is found out.
        sign: -1 where a small value is sharp.
    """

    title: str
    make: Callable[[], FlatnessMetric]
    kinds: tuple[str, ...] = ALL_KINDS
    sign: int = 1


MEASURES = {
    "lambda_max": Measure("lambda_max", lambda: TopEigenvalues(tol=TOL)),
    "layer": Measure("lambda_max, layer (invariant sharpness)", lambda: InvariantSharpness(tol=TOL)),
    "filter": Measure("lambda_max, filter", lambda: TopEigenvalues(geometry="filter", tol=TOL)),
    "element": Measure("lambda_max, element", lambda: TopEigenvalues(geometry="element", tol=TOL)),
    "path_norm": Measure("PSI sharpness, path_norm", lambda: PSISharpness(geometry="path_norm", tol=TOL)),
    "path": Measure("PSI sharpness, path", lambda: PSISharpness(geometry="path", tol=TOL)),
    "attention": Measure(
        "lambda_max, attention", lambda: TopEigenvalues(geometry="attention", tol=TOL), ("transformer",)
    ),
    "optimizer": Measure(
        "lambda_max, optimizer", lambda: TopEigenvalues(geometry="optimizer", tol=TOL), ("transformer",)
    ),
    "lambda_min": Measure("-lambda_min", lambda: TopEigenvalues(which="SA", tol=0.1), sign=-1),
    "trace": Measure("Hessian trace", lambda: HessianTrace(num_products=NUM_PRODUCTS)),
    "worst_case": Measure("worst case, rho 0.05", lambda: WorstCaseSharpness(rho=0.05, num_steps=NUM_STEPS)),
    "adaptive": Measure(
        "worst case, element, rho 0.5 (adaptive)",
        lambda: WorstCaseSharpness(rho=0.5, geometry="element", num_steps=NUM_STEPS),
    ),
    "average": Measure("average case, rho 0.5", lambda: AverageCaseSharpness(rho=0.5, num_draws=NUM_DRAWS)),
    "relative": Measure("relative flatness", lambda: RelativeFlatness(num_products=NUM_PRODUCTS)),
    "minimum": Measure("minimum sharpness", lambda: MinimumSharpness(num_products=3 * NUM_PRODUCTS)),
    "noise": Measure("gradient noise", GradientNoise),
    "fisher": Measure("Fisher trace", FisherTrace),
    "fisher_element": Measure("Fisher trace, element", lambda: FisherTrace(geometry="element")),
    "ratio": Measure("noise / curvature", lambda: NoiseCurvatureRatio(num_products=NUM_PRODUCTS)),  # see `_ratio`
    "batch": Measure("batch sharpness, batches of 32", lambda: BatchSharpness(batch_size=32)),
    "balance": Measure("balance of basis paths", lambda: BasisPathBalance(ignore_zeros=True)),
    "balance_deciles": Measure(
        "balance of basis paths, deciles", lambda: BasisPathBalance(ignore_zeros=True, quantile=0.1)
    ),
}
"""By the name of the column. The spectral density is left out: 650 gradients for what is no single number."""

WEIGHT_NORM = "weight_norm"
"""The norm of all weights: no flatness, but what a measure has to beat."""


def measure_all(
    module: nn.Module,
    kind: str,
    samples: tuple[Tensor, Tensor],
    num_total: int,
    optimizer: Optimizer | None = None,
    names: Sequence[str] = tuple(MEASURES),
) -> dict[str, Any]:
    """Measure everything that is defined for a network, each on a landscape of its own.

    Args:
        module: The network. BatchNorm takes the statistics of the samples, which are one batch.
        kind: Of the network.
        samples: Images and classes.
        num_total: Size of the training set that they are from.
        optimizer: What trained it.
        names: What to measure.

    Returns:
        Per measure its value, numerical error, standard error, whether it converged, and its cost in gradients and
        seconds of the processor; ``gradient_seconds``: of one gradient. What is not defined is left out.
    """

    def new_landscape() -> LossLandscape:
        return LossLandscape(module, [samples], OutputLoss(F.cross_entropy), optimizer=optimizer, num_total=num_total)

    row: dict[str, Any] = {
        WEIGHT_NORM: float(torch.cat([p.detach().flatten() for p in module.parameters()]).norm()),
        "gradient_seconds": _gradient_seconds(new_landscape()),
    }
    for name in names:
        measure = MEASURES[name]
        if kind not in measure.kinds:
            continue
        if name == "ratio" and "noise_seconds" in row and "trace_seconds" in row:
            row |= _ratio(row)
            continue
        metric, landscape = measure.make(), new_landscape()
        start = time.process_time()
        try:
            metric.update(landscape)
        except (UndefinedMeasureError, UndefinedGeometryError):
            continue
        row |= _columns(name, metric, measure.sign) | {f"{name}_seconds": time.process_time() - start}
    return {name: _rounded(value) for name, value in row.items()}


def _columns(name: str, metric: FlatnessMetric, sign: int) -> dict[str, Any]:
    return {
        name: sign * float(metric.compute().squeeze()),
        f"{name}_error": float(metric.error.squeeze()),
        f"{name}_standard_error": float(metric.standard_error.squeeze()),
        f"{name}_converged": bool(metric.converged),
        f"{name}_gradients": float(metric.gradient_evaluations),
    }


def _ratio(row: dict[str, Any]) -> dict[str, Any]:
    """Return what ``NoiseCurvatureRatio`` finds on the same samples with the same probes, from its two parts.

    A test holds that the numbers are the same; measuring the trace a second time would cost as much as all eigenvalues.
    """
    value = row["noise"] / row["trace"]

    def relative(kind: str) -> float:
        return math.hypot(*(row[f"{part}_{kind}"] / row[part] for part in ("noise", "trace")))

    return {
        "ratio": value,
        "ratio_error": abs(value) * relative("error"),
        "ratio_standard_error": abs(value) * relative("standard_error"),
        "ratio_converged": row["noise_converged"] and row["trace_converged"],
        "ratio_gradients": row["noise_gradients"] + row["trace_gradients"],
        "ratio_seconds": row["noise_seconds"] + row["trace_seconds"],
    }


def _gradient_seconds(landscape: LossLandscape) -> float:
    seconds = []
    for _ in range(3):
        start = time.process_time()
        with landscape.measurement():
            landscape.gradient()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def _rounded(value: Any) -> Any:
    """Return six digits, None for what is no number: a file for people."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None

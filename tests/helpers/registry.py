"""All metrics, each with settings under which it is quick: what the contract tests run over. A new one adds a line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_flatness import (
    AverageCaseSharpness,
    BasisPathBalance,
    BatchSharpness,
    CriticalSharpness,
    DirectionalSharpness,
    FisherTrace,
    GradientNoise,
    HessianTrace,
    InvariantSharpness,
    LossLandscape,
    MinimumSharpness,
    NoiseCurvatureRatio,
    OptimizerStep,
    OutputLoss,
    PSISharpness,
    RelativeFlatness,
    SpectralDensity,
    TopEigenvalues,
    WorstCaseSharpness,
)
from lightning_flatness.metrics import FlatnessMetric

METRICS: dict[str, Callable[[], FlatnessMetric]] = {
    "TopEigenvalues": TopEigenvalues,
    "TopEigenvalues(k=3)": lambda: TopEigenvalues(k=3, geometry="filter"),
    "TopEigenvalues(ggn)": lambda: TopEigenvalues(operator="ggn"),
    "TopEigenvalues(optimizer)": lambda: TopEigenvalues(geometry="optimizer"),
    "TopEigenvalues(per_layer)": lambda: TopEigenvalues(k=2, per_layer=True),
    "InvariantSharpness": InvariantSharpness,
    "HessianTrace": lambda: HessianTrace(num_products=8),
    "HessianTrace(element)": lambda: HessianTrace("element", method="hutchinson", num_products=8),
    "HessianTrace(per_layer)": lambda: HessianTrace(num_products=8, per_layer=True),
    "SpectralDensity": lambda: SpectralDensity(num_runs=2, num_steps=4, num_points=16),
    "WorstCaseSharpness": lambda: WorstCaseSharpness(num_steps=4),
    "WorstCaseSharpness(m)": lambda: WorstCaseSharpness(num_steps=3, num_samples=4, geometry="element", norm="linf"),
    "AverageCaseSharpness": lambda: AverageCaseSharpness(num_draws=3, normalize_logits=True),
    "RelativeFlatness": lambda: RelativeFlatness(num_products=8),
    "MinimumSharpness": lambda: MinimumSharpness(num_products=16),
    "GradientNoise": GradientNoise,
    "FisherTrace": lambda: FisherTrace("layer"),
    "CriticalSharpness": CriticalSharpness,
    "DirectionalSharpness": DirectionalSharpness,
    "BatchSharpness": lambda: BatchSharpness(batch_size=4),
    "PSISharpness": PSISharpness,
    "PSISharpness(path)": lambda: PSISharpness(geometry="path"),
    "BasisPathBalance": BasisPathBalance,
    "BasisPathBalance(quantile)": lambda: BasisPathBalance(quantile=0.1),
    "NoiseCurvatureRatio": lambda: NoiseCurvatureRatio(num_products=8),
}


def make_landscape(
    rank: int = 0,
    world_size: int = 1,
    shard: Callable[[nn.Sequential], object] | None = None,
    device: str = "cpu",
    **options: Any,
) -> LossLandscape:
    """Return a ReLU chain on 13 samples in ragged batches, of which a rank gets every ``world_size``-th sample."""
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller has chosen for the metric
        return _make_landscape(rank, world_size, shard, device, **options)


def _make_landscape(
    rank: int, world_size: int, shard: Callable[[nn.Sequential], object] | None, device: str, **options: Any
) -> LossLandscape:
    generator = torch.Generator("cpu").manual_seed(0)
    at: dict[str, Any] = {"generator": generator, "device": "cpu"}  # the same numbers on every device
    with torch.device("cpu"):
        module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)).double().eval()
    for p in module.parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64, **at) / 2
    module.to(device)
    x, y = torch.randn(13, 4, **at).double().to(device), torch.randint(3, (13,), **at).to(device)
    if shard is not None:
        shard(module)
    optimizer = torch.optim.Adam(module.parameters())
    F.cross_entropy(module(x), y).backward()
    with OptimizerStep(optimizer) as update:
        optimizer.step()
    optimizer.zero_grad()
    shares: list[tuple[Tensor, Tensor]] = list(
        zip(x[rank::world_size].split(5), y[rank::world_size].split(5), strict=True)
    )
    return LossLandscape(module, shares, OutputLoss(F.cross_entropy), optimizer=optimizer, update=update, **options)

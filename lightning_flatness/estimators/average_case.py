"""The mean rise of the loss under Gaussian noise on the weights."""

from __future__ import annotations

import math

import torch

from lightning_flatness.estimators.arguments import check_arguments
from lightning_flatness.estimators.nearby import check_radius, weight_rounding
from lightning_flatness.estimators.operators import gaussian
from lightning_flatness.estimators.result import Estimate, mean_and_error, scalar_estimate
from lightning_flatness.estimators.sampling import average_rise_standard_error
from lightning_flatness.geometry import Geometry
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.landscape.derived import with_normalized_logits
from lightning_flatness.module.loss import check_finite_loss


def average_case_sharpness(
    landscape: LossLandscape,
    rho: float = 0.05,
    geometry: str | Geometry = "euclidean",
    *,
    num_draws: int = 50,
    normalize_logits: bool = False,
    tol: float = 0.1,
    seed: int = 0,
) -> Estimate:
    """Return the mean rise of the loss under noise: of ``L(w(z)) - L(w)`` for ``z ~ N(0, rho²/n I)``.

    Arguments, cost and errors as of :class:`lightning_flatness.AverageCaseSharpness`. The value may be negative where
    the loss curves down.
    """
    check_arguments({"rho": rho, "num_draws": num_draws, "tol": tol})
    with landscape.measurement():
        if normalize_logits:
            landscape = with_normalized_logits(landscape)
        chart = landscape.chart(geometry)
        check_radius(chart, rho, geometry)
        centre = float(landscape.loss())
        generator = torch.Generator(device="cpu").manual_seed(seed)
        losses = []
        for _ in range(num_draws):
            noise = gaussian(chart.num_coordinates, generator, landscape.dtype, landscape.device)
            z = noise * (rho / math.sqrt(chart.num_coordinates))
            for side in (z, -z):
                with landscape.displaced(chart.displacement(side)):
                    losses.append(landscape.loss(allow_non_finite=True))
        pairs = torch.stack(losses).double().cpu().view(-1, 2)
        check_finite_loss(pairs.sum())
        sampling = average_rise_standard_error(landscape, chart, rho, seed)
    mean, scatter = mean_and_error(pairs.mean(dim=1) - centre)
    rounding = max(torch.finfo(landscape.dtype).eps * abs(centre), weight_rounding(landscape))
    value, error = float(mean), math.hypot(float(scatter), rounding)
    standard_error = math.hypot(error, sampling)
    return scalar_estimate(landscape, value, error, converged=error <= tol * abs(value), standard_error=standard_error)

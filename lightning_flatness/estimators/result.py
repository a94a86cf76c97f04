"""The result of an estimator: a value with its error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_flatness.landscape import LossLandscape


@dataclass(frozen=True)
class Estimate:
    """A value with its error.

    Attributes:
        value: The estimate.
        error: Its numerical error, for these samples, of the same shape and in the same units: a residual, or the
            scatter of random probes.
        converged: Whether the error reached the tolerance.
        num_products: Hessian-vector products spent.
        standard_error: The error for the whole set that the samples were drawn from, that of random probes included;
            None where it is not known.
        remark: What there is to say about the value, as the end of a sentence that begins with its name.
    """

    value: Tensor
    error: Tensor
    converged: bool
    num_products: int
    standard_error: Tensor | None = field(default=None, kw_only=True)
    remark: str = field(default="", kw_only=True)


def scalar_estimate(
    landscape: LossLandscape,
    value: float,
    error: float,
    *,
    converged: bool,
    num_products: int = 0,
    standard_error: float = math.nan,
) -> Estimate:
    """Return an estimate whose value and errors are scalars in the landscape's dtype, on its device."""
    numbers = torch.tensor([value, error, standard_error], dtype=landscape.dtype, device=landscape.device)
    return Estimate(numbers[0], numbers[1], converged, num_products, standard_error=numbers[2])


def mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of independent samples along the first axis, and its standard error; float64 on the CPU."""
    samples = samples.cpu().double()
    if len(samples) < 2:
        return samples.mean(dim=0), torch.full_like(samples.mean(dim=0), math.nan)
    return samples.mean(dim=0), samples.std(dim=0) / math.sqrt(len(samples))


def small_sample_factor(num_samples: int) -> float:
    """Return by what to multiply a standard error of few samples, so that deviations in its units have variance one.

    Such a deviation follows Student's distribution, of variance ``(n - 1) / (n - 3)``. That needs four samples; fewer
    get the factor of four.

    Example:
        >>> small_sample_factor(5)
        1.414...
    """
    n = max(num_samples, 4)
    return math.sqrt((n - 1) / (n - 3))

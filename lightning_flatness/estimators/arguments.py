"""The ranges of the arguments that estimators share: one table, one wording."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from lightning_flatness.estimators.krylov.solver import Which
from lightning_flatness.estimators.operators import Operator

BallNorm = Literal["l2", "linf"]
TraceMethod = Literal["hutch++", "hutchinson"]

_CHOICES = {"operator": Operator, "which": Which, "method": TraceMethod, "norm": BallNorm}
_LEAST = {
    "k": 1,
    "max_products": 1,
    "max_passes": 4,
    "num_products": 4,
    "num_runs": 2,
    "num_steps": 1,
    "num_points": 2,
    "num_draws": 2,
    "num_restarts": 0,
    "num_samples": 1,
    "batch_size": 1,
}
"""The smallest value of each count. ``None`` stands for all samples, or for the batches of the run."""

_WHY = {"num_products": " (two probes at least give an error)", "num_draws": " (two at least give an error)"}


def check_arguments(arguments: Mapping[str, Any], least: Mapping[str, int] | None = None) -> None:
    """Raise an error unless the arguments of an estimator are in range; those not in the table are passed over.

    Raises:
        ValueError: If one is out of range; ``least`` holds the smallest values of counts where these differ.
    """
    smallest = _LEAST | dict(least or {})
    for name, value in arguments.items():
        if name in _CHOICES and value not in get_args(_CHOICES[name]):
            *others, last = map(repr, get_args(_CHOICES[name]))
            raise ValueError(f"Expected `{name}` to be {', '.join(others)} or {last}, got {value!r}.")
        least_value = None if name in ("num_samples", "batch_size") and value is None else smallest.get(name)
        if least_value is not None and not (isinstance(value, int) and value >= least_value):
            raise ValueError(f"Expected `{name}` to be an integer >= {least_value}{_WHY.get(name, '')}, got {value!r}.")
        if name == "seed" and not isinstance(value, int):
            raise ValueError(f"Expected `seed` to be an integer, got {value!r}.")
        if name == "per_layer" and not isinstance(value, bool):
            raise ValueError(f"Expected `per_layer` to be True or False, got {value!r}.")
        if name == "tol" and not value >= 0:
            raise ValueError(f"Expected `tol` to be >= 0, got {value}.")
        if name == "width" and not value > 0:
            raise ValueError(f"Expected `width` to be > 0, got {value}.")
        if name == "quantile" and not 0 <= value < 0.5:
            raise ValueError(f"Expected `quantile` to be >= 0 and < 0.5, got {value}.")
        if name == "rho" and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"Expected `rho` to be > 0 and finite, got {value!r}.")

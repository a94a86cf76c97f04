"""Metrics by their names, as a command line has them."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from torch.optim import Optimizer

import lightning_flatness.metrics as all_metrics
from lightning_flatness.estimators import TOLERANCE, stability_edge
from lightning_flatness.geometry import Euclidean, is_preconditioned
from lightning_flatness.metrics.base import FlatnessMetric
from lightning_flatness.metrics.eigenvalues import TopEigenvalues
from lightning_flatness.metrics.measurement import check_metrics
from lightning_flatness.metrics.presets import Preset, preset_metrics

Metrics = Mapping[str, FlatnessMetric] | Sequence[str] | str


def chosen(
    metrics: Metrics = "default",
    *,
    top_k: int = 1,
    tol: float = TOLERANCE,
    seed: int = 0,
    geometry: str | None = None,
    optimizers: Sequence[Optimizer] = (),
) -> dict[str, FlatnessMetric]:
    """Return metrics by name.

    Args:
        metrics: ``"default"``, ``"all"``, names such as ``"hessian_trace"`` (a list, or with commas between them), or a
            dict of names and metrics, which is returned as it is.
        top_k: How many eigenvalues ``lambda_max`` has.
        tol: Relative residual at which eigenvalues stop.
        seed: Seed of all metrics.
        geometry: Measure in this geometry what is defined in any; ``_layer`` behind its name says so.
        optimizers: What trains the module. Named sets have ``preconditioned_sharpness`` for those that precondition.

    Returns:
        New metrics, in the order of the names.

    Raises:
        ValueError: If a name is not known.

    Example:
        >>> list(chosen("lambda_max,hessian_trace", geometry="layer"))
        ['lambda_max_layer', 'hessian_trace_layer']
    """
    if isinstance(metrics, Mapping):
        check_metrics(dict(metrics))
        return dict(metrics)
    names = [name.strip() for name in metrics.split(",")] if isinstance(metrics, str) else list(metrics)
    if len(names) == 1 and names[0] in get_args(Preset):
        found = preset_metrics(names[0], top_k=top_k, tol=tol, seed=seed)  # type: ignore[arg-type]
        moved = {name for name in found if isinstance(found[name].settings.get("geometry"), Euclidean)}
        beside = preconditioned(optimizers, tol, seed)
    else:
        known = preset_metrics("all", top_k=top_k, tol=tol, seed=seed)
        found = {name: known[name] if name in known else _of_class(name, tol, seed) for name in names}
        moved, beside = set(found), {}
    if geometry is not None:  # in a preset, those with a geometry of their own keep it
        found = dict(_in_geometry(n, metric, geometry) if n in moved else (n, metric) for n, metric in found.items())
    return found | beside


def preconditioned(optimizers: Sequence[Optimizer], tol: float, seed: int) -> dict[str, FlatnessMetric]:
    """Return the sharpness that an adaptive optimizer sees, by name; nothing for optimizers that see lambda_max.

    Args:
        optimizers: What trains the module.
        tol: Relative residual at which it stops.
        seed: Its seed.
    """
    if not is_preconditioned(optimizers) or math.isnan(stability_edge(optimizers)):
        return {}
    return {"preconditioned_sharpness": TopEigenvalues(geometry="optimizer", tol=tol, seed=seed, shared_start=True)}


def _classes() -> dict[str, type[FlatnessMetric]]:
    public = {name: getattr(all_metrics, name) for name in all_metrics.__all__}
    return {
        re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): value
        for name, value in public.items()
        if inspect.isclass(value) and issubclass(value, FlatnessMetric) and value is not FlatnessMetric
    }


def _of_class(name: str, tol: float, seed: int) -> FlatnessMetric:
    classes = _classes()
    known = sorted({*classes, *preset_metrics("all")})
    if name not in classes:
        guess = get_close_matches(name, known, n=1)
        hint = f"Did you mean {guess[0]!r}?" if guess else f"They are: {', '.join(known)}."
        raise ValueError(
            f"Expected `metrics` to be 'default', 'all' or a dict or names of metrics, got {name!r}. {hint}"
        )
    accepted = inspect.signature(classes[name]).parameters
    settings: dict[str, Any] = {key: value for key, value in {"tol": tol, "seed": seed}.items() if key in accepted}
    return classes[name](**settings)


def _in_geometry(name: str, metric: FlatnessMetric, geometry: str) -> tuple[str, FlatnessMetric]:
    accepted = inspect.signature(type(metric)).parameters
    if "geometry" not in accepted:
        return name, metric
    settings = {key: value for key, value in metric.settings.items() if key in accepted}
    return f"{name}_{geometry}", type(metric)(**settings | {"geometry": geometry})

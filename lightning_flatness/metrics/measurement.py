"""One measurement of several metrics: their values, errors and cost, and the names under which these are logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure
from torch.optim import Optimizer

from lightning_flatness.estimators import LearningRates, NonFiniteProductError, UndefinedMeasureError
from lightning_flatness.geometry import MissingOptimizerStateError
from lightning_flatness.landscape import LossLandscape, MissingUpdateError
from lightning_flatness.metrics.base import Curve, FlatnessMetric
from lightning_flatness.metrics.batch import BatchSharpness
from lightning_flatness.metrics.layered import of_whole_networks
from lightning_flatness.module.loss import NonFiniteLossError


@dataclass
class Measurement:
    """The results of several metrics at the same weights.

    Args:
        values: By the name of the curve, in the order of the metrics; then ``stability_edge``, ``edge_of_stability``,
            where the optimizers have an edge.
        errors: By the name of the curve, and there by kind, in its units: ``"residual"`` or ``"numerical_error"`` for
            these samples, ``"standard_error"`` for the whole training set.
        costs: ``gradient_evaluations``.
        remarks: By the name of the metric: that it is not defined for this module, or has not converged.
        figures: By the name of the metric, of those that have one.
        diverged: The quantity that is not finite, so that values and errors are NaN; None if all are finite.
    """

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    diverged: str | None = None


def measure_metrics(
    metrics: Mapping[str, FlatnessMetric],
    landscape: LossLandscape,
    optimizers: Sequence[Optimizer] = (),
    learning_rates: LearningRates | None = None,
    batch_size: int | None = None,
    *,
    skips_undefined: bool = True,
    allow_non_finite: bool = False,
) -> Measurement:
    """Measure metrics one after the other at the current weights, sharing what one has found with the next.

    Args:
        metrics: What to measure, by name.
        landscape: The loss on the probe.
        optimizers: What trains the module; the edge of stability is theirs.
        learning_rates: Those of the step just taken; default: the present ones.
        batch_size: Samples behind one optimizer step, for :class:`BatchSharpness`.
        skips_undefined: Leave out, with a remark, what is not defined for the module, instead of raising. A metric that
            needs a step of the optimizer is left out in any case before the first one.
        allow_non_finite: Where the loss or its derivatives are not finite, values and errors are NaN, instead of
            raising.

    Returns:
        Values, errors and cost.

    Raises:
        UndefinedMeasureError: If a metric is not defined for the module, and such are not left out.
        NonFiniteLossError: If the loss is not finite, and that is not allowed.
        NonFiniteProductError: If a derivative is not, and that is not allowed.
    """
    measured = Measurement()
    before = landscape.cost.gradient_evaluations
    with landscape.measurement(on_shards=all(metric.takes_shards for metric in metrics.values())):
        for name, metric in metrics.items():
            if isinstance(metric, BatchSharpness):
                metric.run_batch_size = batch_size
            try:
                metric.to(landscape.device).update(landscape)
            except (MissingOptimizerStateError, MissingUpdateError):  # before the first optimizer step
                continue
            except UndefinedMeasureError as error:
                if not skips_undefined:
                    raise
                measured.remarks[name] = f"is left out. {error}"
                continue
            except (NonFiniteLossError, NonFiniteProductError) as error:
                if not allow_non_finite:
                    raise
                metric.reset()
                measured.diverged = str(error)
            _add(measured, name, metric)
            measured.values.update(metric.references(name, optimizers, learning_rates))
    for name, edge in edge_of_stability(metrics, optimizers, learning_rates).items():
        if name in measured.values and math.isfinite(edge):
            measured.values.update(stability_edge=edge, edge_of_stability=measured.values[name] / edge)
    measured.costs["gradient_evaluations"] = landscape.cost.gradient_evaluations - before
    return measured


def _add(measured: Measurement, name: str, metric: FlatnessMetric) -> None:
    curves = metric.curves(name)
    for curve in curves:
        measured.values[curve.name] = curve.value
        measured.errors[curve.name] = {metric.error_name: curve.error}
        if not math.isnan(curve.standard_error):
            measured.errors[curve.name]["standard_error"] = curve.standard_error
    if (figure := metric.figure()) is not None:
        measured.figures[name] = figure
    if metric.remark:
        measured.remarks[name] = metric.remark
    elif not metric.converged and not all(math.isnan(c.value) for c in curves):
        measured.remarks[name] = _remark(metric, curves)


def _remark(metric: FlatnessMetric, curves: list[Curve]) -> str:
    """Say what has not converged, why, and what to do."""
    whole = set(of_whole_networks(c.name for c in curves))
    layers = sorted((c for c in curves if c.name not in whole), key=lambda c: -c.error / max(abs(c.value), 1e-30))
    shown = [*(c for c in curves if c.name in whole), *layers[:1]]  # the worst of them
    reached = ", ".join(f"{c.name} {c.value:.2g}, {c.name}_{metric.error_name} {c.error:.2g}" for c in shown)
    num_products, cost = int(metric.num_products), float(metric.gradient_evaluations)
    if num_products < metric.settings.get("max_products", 0):
        return (
            f"did not converge: errors of its products (rounding, finite differences) exceed its `tol`: {reached}. Its "
            "curves show by how much. HINT: raise its `tol`, or measure weights of a longer type."
        )
    spent = f"{num_products} Hessian-vector products" if num_products else f"{cost:.0f} gradient evaluations"
    return (
        f"did not converge within {spent}: {reached}. Its curves show by how much. HINT: raise its "
        f"`{metric.effort}` or `tol`."
    )


def edge_of_stability(
    metrics: Mapping[str, FlatnessMetric], optimizers: Sequence[Optimizer], learning_rates: LearningRates | None = None
) -> dict[str, float]:
    """Return the first metric that has an edge of stability, and that edge; empty if there is none.

    Args:
        metrics: By name.
        optimizers: What trains the module.
        learning_rates: Those of the step just taken.
    """
    edges = ((name, metric.stability_edge(optimizers, learning_rates)) for name, metric in metrics.items())
    return dict([(name, edge) for name, edge in edges if not math.isnan(edge)][:1])


def logged_names(measured: Measurement, prefix: str = "flatness/") -> dict[str, float]:
    """Return all numbers of a measurement by the names that they have in the logs.

    TensorBoard groups curves by what is before the slash: the first group has the values alone.

    Args:
        measured: Values, errors and costs.
        prefix: Put before every value; before errors and costs with ``_errors/`` and ``_cost/`` at its end.

    Returns:
        Values, errors and costs.

    Example:
        >>> logged_names(Measurement({"lambda_max": 9.0}, {"lambda_max": {"residual": 0.1}}, {"seconds": 2.0}))
        {'flatness/lambda_max': 9.0, 'flatness_errors/lambda_max_residual': 0.1, 'flatness_cost/seconds': 2.0}
    """
    group = prefix.rstrip("/_-. ") or "flatness"
    errors = ((name, kind, error) for name, kinds in measured.errors.items() for kind, error in kinds.items())
    named = {prefix + name: value for name, value in measured.values.items()}
    named |= {f"{group}_errors/{name}_{kind}": error for name, kind, error in errors}
    return named | {f"{group}_cost/{name}": cost for name, cost in measured.costs.items()}


def check_metrics(metrics: object) -> None:
    """Check what a user passes as metrics by name.

    Args:
        metrics: A dict of names and flatness metrics.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(metrics, dict) or not metrics:
        raise ValueError(
            f"Expected `metrics` to be a non-empty dict of names and flatness metrics, got {metrics!r}. "
            "Leave it out for the default ones."
        )
    for name, metric in metrics.items():
        if not isinstance(metric, FlatnessMetric):
            raise ValueError(
                f"Expected `metrics[{name!r}]` to be a flatness metric such as TopEigenvalues(), got "
                f"{type(metric).__name__}."
            )

"""Base class of the flatness metrics: ``update(landscape)`` measures, ``compute()`` returns the latest value.

A subclass has a constructor, which passes its settings on, and the estimator that takes them. If its value is more than
one number, it also names the curves.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_flatness.estimators.arguments import check_arguments
from lightning_flatness.estimators.stability import LearningRates
from lightning_flatness.geometry import resolve_geometry
from lightning_flatness.landscape import LossLandscape


class Curve(NamedTuple):
    """A point of a curve: its name in the logs, the value, its numerical error, and that for the whole training set."""

    name: str
    value: float
    error: float
    standard_error: float = math.nan


def arguments(scope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor by name, given its ``locals()``."""
    return {name: value for name, value in scope.items() if name not in ("self", "__class__")}


def latest(states: Tensor) -> Tensor:
    """Reduce the states of two measurements to the later one."""
    return states[-1]


class FlatnessMetric(Metric):
    """A flatness measure as a torchmetric: ``update(landscape)`` measures at the current weights.

    ``compute()`` returns the latest value; nothing is averaged over updates, since each is about other weights.
    Ranks agree already, because the landscape sums over all of them, so nothing is synchronised again. All states
    are tensors on the metric's device and none of them is saved in a ``state_dict``.

    Args:
        shape: Shape of the value.
        settings: The arguments of the estimator. Each becomes an attribute of the same name (``num_products``, the name
            of a result, becomes ``max_products``).

    Attributes:
        error: The numerical error of the value, of the same shape and in the same units: how far it is from the truth
            about *these samples*. A residual, or the scatter of random probes; more work makes it smaller.
        standard_error: How far the value is from the truth about the *whole training set* that the samples were drawn
            from: what the choice of samples makes, and random probes. More samples make it smaller. It is mostly the
            larger of the two. Not a number where it is not known: below 8 samples, in low precision, for the
            Gauss-Newton matrix. Too small where few samples make the value: two times for the eigenvalues of an LSTM,
            right for an MLP and CNNs (``examples/benchmarks/calibration.py``).
        converged: Whether the estimator reached its tolerance.
        num_products: Hessian-vector products of the latest measurement.
        gradient_evaluations: Cost of the latest measurement, in gradients of the loss on all samples.
        start: Directions from which the next measurement starts, where that saves something; None for none.
        estimator: ``estimator(landscape, **settings)`` returns an :class:`Estimate`.
        least: The smallest values of counts where the estimator needs more than others.
        error_name: ``"residual"``, ``"numerical_error"`` or ``"first_order_gap"``: what ``error`` is called in logs.
        effort: The argument to raise where the metric does not converge.
        follows_update: Whether it needs the last optimizer step.
        remark: What there is to say about the latest value; empty for none.

    Raises:
        ValueError: If a setting is out of range.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    estimator: ClassVar[Callable[..., Any]]
    least: ClassVar[dict[str, int]] = {}
    error_name: ClassVar[str] = "residual"
    effort: ClassVar[str] = "max_products"
    follows_update: ClassVar[bool] = False

    value: Tensor
    error: Tensor
    standard_error: Tensor
    converged: Tensor
    num_products: Tensor
    gradient_evaluations: Tensor

    def __init__(self, *, shape: tuple[int, ...] = (), **settings: Any) -> None:
        check_arguments(settings, self.least)
        super().__init__(sync_on_compute=False)
        self.start: Tensor | None = None
        self.remark = ""
        if "geometry" in settings:
            settings["geometry"] = resolve_geometry(settings["geometry"])
        self._names = tuple(settings)
        for name, value in settings.items():
            setattr(self, _attribute(name), value)
        unknown = torch.full(shape, torch.nan, device=self.device)
        self._add_states(value=unknown, error=unknown.clone(), standard_error=unknown.clone())
        self._add_states(converged=False, num_products=0, gradient_evaluations=0.0)
        # A MetricCollection takes metrics with equal states for one, so the states have to tell the settings apart.
        digest = hashlib.sha256(repr((type(self).__name__, *settings.values())).encode()).digest()
        self._add_states(fingerprint=list(digest))

    def _add_states(self, **states: Any) -> None:
        for name, value in states.items():
            self.add_state(name, torch.as_tensor(value, device=self.device), dist_reduce_fx=latest)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the estimator."""
        return {name: getattr(self, _attribute(name)) for name in self._names}

    def extra_repr(self) -> str:
        """Return the arguments of the constructor with their values, for ``repr``."""
        names = inspect.signature(type(self)).parameters
        return ", ".join(f"{name}={getattr(self, _attribute(name))!r}" for name in names)

    def update(self, landscape: LossLandscape) -> None:
        """Measure at the current weights of the landscape's module.

        Args:
            landscape: The loss as a function of the weights.

        Raises:
            TypeError: If it is not a ``LossLandscape``.
        """
        if not isinstance(landscape, LossLandscape):
            raise TypeError(
                f"Expected a LossLandscape, got {type(landscape).__name__}. "
                "Pass LossLandscape(module, batches, loss_fn)."
            )
        spent = landscape.cost.gradient_evaluations
        with landscape.measurement(on_shards=self.takes_shards):
            result = self.estimate(landscape)
        self.store(result, landscape.dtype)
        spent = landscape.cost.gradient_evaluations - spent
        self.gradient_evaluations = torch.tensor(spent, dtype=torch.float32, device=self.device)

    @property
    def takes_shards(self) -> bool:
        """Whether a :class:`ShardedLandscape` can be measured, whose vectors are spread over the ranks."""
        return False

    def estimate(self, landscape: LossLandscape) -> Any:
        """Return the result of the estimator with the settings of this metric."""
        return self.estimator(landscape, **self.settings)

    def store(self, result: Any, dtype: torch.dtype) -> None:
        """Keep the result of a measurement.

        Args:
            result: What the estimator has found: an :class:`Estimate`, or more.
            dtype: Of the values.
        """
        self.value = result.value.to(dtype).to(self.device)
        self.error = result.error.to(dtype).to(self.device)
        known = result.standard_error
        unknown = torch.full_like(self.value, math.nan)
        self.standard_error = unknown if known is None else known.to(dtype).to(self.device)
        self.converged = torch.tensor(result.converged, device=self.device)
        self.num_products = torch.tensor(result.num_products, device=self.device)
        self.remark = getattr(result, "remark", "")

    def compute(self) -> Tensor:
        """Return the value of the latest measurement."""
        return self.value

    # ------------------------------------------------------------------------------------------- curves and pictures

    def curves(self, name: str) -> list[Curve]:
        """Return the latest points of the curves of this metric.

        Args:
            name: The name of the metric in the logs.

        Returns:
            A point per curve.
        """
        return [Curve(name, float(self.value), float(self.error), float(self.standard_error))]

    def headline(self, name: str) -> str | None:
        """Return the name of the curve that sums up a run; None if there is none."""
        return name

    def charts(self, name: str, optimizers: Sequence[Optimizer]) -> dict[str, list[str]]:
        """Return the charts of a page with several curves in one, in the order in which they are to be seen.

        Args:
            name: The name of the metric in the logs.
            optimizers: What trains the module.

        Returns:
            Names of curves by the title of the chart.
        """
        if not math.isnan(self.stability_edge(optimizers)):
            return {f"edge of stability: {name}": [name, "stability_edge"]}
        return {} if self.headline(name) is None else {name: [name]}

    def stability_edge(
        self,
        optimizers: Sequence[Optimizer],  # noqa: ARG002
        learning_rates: LearningRates | None = None,  # noqa: ARG002
    ) -> float:
        """Return the value above which steps of the optimizers diverge; not a number if the value has no such edge."""
        return math.nan

    def references(
        self,
        name: str,  # noqa: ARG002
        optimizers: Sequence[Optimizer],  # noqa: ARG002
        learning_rates: LearningRates | None = None,  # noqa: ARG002
    ) -> dict[str, float]:
        """Return what else the value is compared with, as curves of their own.

        Args:
            name: The name of the metric in the logs.
            optimizers: What trains the module.
            learning_rates: Those of the step just taken.

        Returns:
            Values by the name of the curve.
        """
        return {}

    def figure(self) -> Figure | None:
        """Return a picture of the latest measurement; None where curves say it all."""
        return None

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw one value or a sequence of values.

        Args:
            val: What ``compute`` or ``forward`` returned, or a list of those. Default: the latest value.
            ax: A matplotlib axis to draw into.

        Returns:
            The figure and the axis.
        """
        return self._plot(val, ax)


def _attribute(setting: str) -> str:
    return "max_products" if setting == "num_products" else setting

"""Critical and directional sharpness as metrics, beside twice the inverse of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from lightning_flatness.estimators import Estimate, LearningRates, critical_sharpness, directional_sharpness
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.metrics.base import Curve, FlatnessMetric, arguments


class UpdateMetric(FlatnessMetric):
    """A metric along the last update of the optimizer, compared with twice the inverse of its learning rate.

    Attributes:
        learning_rate: That of the update.
    """

    error_name = "numerical_error"
    follows_update = True
    learning_rate = math.nan

    @property
    def takes_shards(self) -> bool:
        """Whether a :class:`ShardedLandscape` can be measured, whose weights stay spread over the ranks: always."""
        return True

    def reset(self) -> None:
        """Forget the latest value, and where the next measurement starts."""
        super().reset()
        self.start, self.learning_rate, self.remark = None, math.nan, ""

    def estimate(self, landscape: LossLandscape) -> Estimate:
        """Measure along the update of the landscape."""
        result: Estimate = self.estimator(landscape, **self.settings)
        self.learning_rate = math.nan if landscape.update is None else landscape.update.learning_rate
        return result

    def references(
        self,
        name: str,
        optimizers: Sequence[Optimizer],  # noqa: ARG002
        learning_rates: LearningRates | None = None,  # noqa: ARG002
    ) -> dict[str, float]:
        """Return twice the inverse of the learning rate: a value above it says that the update has raised the loss."""
        return {f"{name}_edge": 2 / self.learning_rate} if self.learning_rate > 0 else {}

    def charts(self, name: str, optimizers: Sequence[Optimizer]) -> dict[str, list[str]]:  # noqa: ARG002
        """Return the chart of the value with its edge."""
        return {f"edge of the update: {name}": [name, f"{name}_edge"]}


class CriticalSharpness(UpdateMetric):
    r"""The sharpness that decides whether the optimizer's own update raises the loss (arXiv 2601.16979).

        lambda_c = 2 / eta_c,   eta_c = min{eta > 0 : L(w - eta u) > L(w)},

    with the last update ``u`` and the weights ``w`` before it: ``w - eta u`` for its learning rate eta are the current
    weights, so that lambda_c is above ``2 / eta`` where the step has raised the loss of these samples, whatever the
    optimizer. That edge is logged as ``…_edge``. Of a quadratic loss it is the :class:`DirectionalSharpness`, which is
    lambda_max where the update is along the sharpest direction. The update is all that the step has done, weight decay
    and clipping included; of several groups of parameters eta is the largest learning rate.

    The learning rate is found by forward passes alone, without a second derivative: doubled or halved until the loss
    changes sides, then closed in. The earlier value is the start. The bracket is the numerical error. Where
    the loss does not fall along the update it is not a number (a remark says so); where it rises nowhere, half of a
    bound that reaches to zero, not converged.

    A measurement takes 5 to 8 forward passes, each a third of a gradient, the first one up to 15; two of them are for
    the standard error. Memory: two vectors like the weights, beside the one that holds the update.

    Args:
        tol: Width of the bracket of eta_c, relative to it.
        max_passes: Forward passes to stop at in any case, beside those of the standard error.

    Attributes:
        learning_rate: That of the update.

    Raises:
        ValueError: If an argument is out of range.
        MissingUpdateError: In ``update``, if the landscape knows of no optimizer step. In the ``FlatnessMonitor`` the
            curve begins after the first one.

    Example:
        >>> import torch
        >>> from lightning_flatness import CriticalSharpness, LossLandscape, OptimizerStep
        >>> module, x = torch.nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [2.0]])
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        >>> module(x).square().mean().backward()
        >>> with OptimizerStep(optimizer) as update:
        ...     optimizer.step()
        >>> landscape = LossLandscape(module, [x], lambda module, x: module(x).square().mean(), update=update)
        >>> metric = CriticalSharpness()
        >>> metric.update(landscape)
        >>> round(float(metric.compute()), 3)  # of 2 · mean x²
        5.0
    """

    effort = "max_passes"
    estimator = staticmethod(critical_sharpness)

    def __init__(self, tol: float = 1 / 16, max_passes: int = 32) -> None:
        super().__init__(**arguments(locals()))

    def estimate(self, landscape: LossLandscape) -> Estimate:
        """Measure, starting from the earlier critical learning rate."""
        result: Estimate = self.estimator(landscape, start=self.start, **self.settings)
        self.learning_rate = math.nan if landscape.update is None else landscape.update.learning_rate
        self.start = 2 / result.value if result.converged and bool(torch.isfinite(result.value)) else None
        return result


class DirectionalSharpness(UpdateMetric):
    r"""The curvature of the loss along the optimizer's own update, over its descent (arXiv 2601.16979).

        uᵀ H u / (uᵀ g)   and   uᵀ H u / (uᵀ u)

    with the last update ``u``, and Hessian ``H`` and gradient ``g`` of the samples' loss at the weights before it.
    The first is what :class:`CriticalSharpness` is for a quadratic loss, in units of ``2 / eta``; not a number if the
    update climbs. The second, ``…_curvature``, is between the lowest and the largest eigenvalue of the Hessian.

    A measurement costs one Hessian-vector product and one gradient, and four thirds of one for the standard errors.

    Args:
        tol: Numerical error, relative to the value, at which it counts as converged.

    Attributes:
        learning_rate: That of the update.

    Raises:
        ValueError: If an argument is out of range.
        MissingUpdateError: As :class:`CriticalSharpness`.

    Example:
        >>> import torch
        >>> from lightning_flatness import DirectionalSharpness, LossLandscape, OptimizerStep
        >>> module, x = torch.nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [2.0]])
        >>> optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        >>> module(x).square().mean().backward()
        >>> with OptimizerStep(optimizer) as update:
        ...     optimizer.step()
        >>> landscape = LossLandscape(module, [x], lambda module, x: module(x).square().mean(), update=update)
        >>> metric = DirectionalSharpness()
        >>> metric.update(landscape)
        >>> [round(value, 3) for value in metric.compute().tolist()]
        [5.0, 5.0]
    """

    effort = "tol"
    estimator = staticmethod(directional_sharpness)

    def __init__(self, tol: float = 0.1) -> None:
        super().__init__(shape=(2,), **arguments(locals()))

    def curves(self, name: str) -> list[Curve]:
        """Return a point of each quotient."""
        numbers = torch.stack([self.value, self.error, self.standard_error], dim=1).tolist()
        return [Curve(curve, *point) for curve, point in zip((name, f"{name}_curvature"), numbers, strict=True)]

"""What all flatness metrics share: ``update(landscape)`` measures, ``compute()`` returns the latest value."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_flatness.landscape import LossLandscape


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

    Attributes:
        error: The error of the value, of the same shape and in the same units: a residual or a standard error.
        converged: Whether the estimator reached its tolerance.
        num_products: Hessian-vector products of the latest measurement.
        gradient_evaluations: What the latest measurement cost, in gradients of the loss on all samples.
        error_name: ``"residual"`` or ``"standard_error"``: what kind of error it is, as it is called in logs.
        effort: The argument to raise where the metric does not converge.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    error_name: ClassVar[str] = "residual"
    effort: ClassVar[str] = "max_products"

    value: Tensor
    error: Tensor
    converged: Tensor
    num_products: Tensor
    gradient_evaluations: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__(sync_on_compute=False)
        self.add_state("value", torch.full(shape, torch.nan), dist_reduce_fx=latest)
        self.add_state("error", torch.full(shape, torch.nan), dist_reduce_fx=latest)
        self.add_state("converged", torch.tensor(False), dist_reduce_fx=latest)
        self.add_state("num_products", torch.tensor(0), dist_reduce_fx=latest)
        self.add_state("gradient_evaluations", torch.tensor(0.0), dist_reduce_fx=latest)

    @abstractmethod
    def measure(self, landscape: LossLandscape) -> None:
        """Measure and store the result with :meth:`store`."""

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
        with landscape.measurement():
            self.measure(landscape)
        spent = landscape.cost.gradient_evaluations - spent
        self.gradient_evaluations = torch.tensor(spent, dtype=torch.float32, device=self.device)

    def compute(self) -> Tensor:
        """Return the value of the latest measurement."""
        return self.value

    def store(self, value: Tensor, error: Tensor, *, converged: bool, num_products: int) -> None:
        """Keep the result of a measurement.

        Args:
            value: What ``compute`` is to return.
            error: Its error, of the same shape.
            converged: Whether the tolerance was reached.
            num_products: Hessian-vector products it took.
        """
        self.value, self.error = value.to(self.device), error.to(self.device)
        self.converged = torch.tensor(converged, device=self.device)
        self.num_products = torch.tensor(num_products, device=self.device)

    def scalars(self) -> list[tuple[str, float, float]]:
        """Return what is worth a curve: pairs of value and error, each with what to put behind the metric's name."""
        pairs = zip(self.value.flatten().tolist(), self.error.flatten().tolist(), strict=True)
        return [("" if i == 1 else f"_{i}", value, error) for i, (value, error) in enumerate(pairs, start=1)]

    def distinguish(self, *settings: Any) -> None:
        """Tell metrics of other settings apart, although their values may happen to agree.

        A ``MetricCollection`` takes metrics with equal states for one and updates only the first. A state that
        depends on the settings prevents that.

        Args:
            settings: What the value depends on beside the landscape.
        """
        digest = hashlib.sha256(repr((type(self).__name__, *settings)).encode()).digest()
        self.add_state("settings", torch.tensor(list(digest)), dist_reduce_fx=latest)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw one value or a sequence of values.

        Args:
            val: What ``compute`` or ``forward`` returned, or a list of those. Default: the latest value.
            ax: A matplotlib axis to draw into.

        Returns:
            The figure and the axis.
        """
        return self._plot(val, ax)

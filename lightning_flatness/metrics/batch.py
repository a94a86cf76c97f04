"""Batch sharpness as a metric, with the edges that it hovers at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_flatness.estimators import LearningRates, batch_sharpness, stability_band
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.metrics.base import FlatnessMetric, arguments


class BatchSharpness(FlatnessMetric):
    r"""The mean curvature of the loss of a batch along its own gradient (arXiv 2412.20553).

        mean over batches B of  g_Bᵀ H_B g_B / ‖g_B‖²

    with gradient and Hessian of the loss of the batch. In training with small batches and learning rate eta this
    number, not lambda_max, rises to the edge ``2 / eta`` and hovers there; with momentum beta somewhere between
    ``2 (1 - beta) / eta`` for small and ``2 (1 + beta) / eta`` for large batches (arXiv 2604.14108). With the batch of
    all samples it is at most lambda_max. Units: those of lambda_max.

    The batches are disjoint parts of the samples that are measured on; what is left over is left out. The standard
    error is that of so many batches: for one batch of a fifth of the samples or less it is useful, for batches of more
    than half of them not a number.

    A measurement costs four gradients.

    Args:
        batch_size: Samples behind one optimizer step. Default: in the ``FlatnessMonitor`` those of the run, with
            accumulated batches and over ranks; elsewhere it has to be given.
        tol: Standard error, relative to the value, at which the value counts as converged.

    Attributes:
        run_batch_size: The batch size of the run; what measures sets it.

    Raises:
        UndefinedMeasureError: In ``update``, if the batch size is not known, or above the number of samples.

    Example:
        >>> import torch
        >>> from lightning_flatness import BatchSharpness, LossLandscape
        >>> module = torch.nn.Linear(1, 1, bias=False)
        >>> module.weight.data.fill_(1.0)
        tensor([[1.]])
        >>> batches = [torch.tensor([[1.0], [2.0]])]
        >>> metric = BatchSharpness(batch_size=1)
        >>> metric.update(LossLandscape(module, batches, lambda module, x: module(x).square().mean()))
        >>> metric.compute()  # of the curvatures 2 and 8
        tensor(5.)
    """

    error_name = "numerical_error"
    effort = "probe_size"
    estimator = staticmethod(batch_sharpness)

    def __init__(self, batch_size: int | None = None, tol: float = 0.2) -> None:
        super().__init__(**arguments(locals()))
        self.run_batch_size: int | None = None

    def estimate(self, landscape: LossLandscape) -> Any:
        """Measure with the batch size that was given, or that of the run."""
        settings = self.settings
        settings["batch_size"] = settings["batch_size"] or self.run_batch_size
        return self.estimator(landscape, **settings)

    def references(
        self, name: str, optimizers: Sequence[Optimizer], learning_rates: LearningRates | None = None
    ) -> dict[str, float]:
        """Return the ends of the band in which the value hovers; nothing for optimizers other than SGD."""
        edges = stability_band(optimizers, learning_rates)
        names = (f"{name}_lower_edge", f"{name}_upper_edge")
        return {key: edge for key, edge in zip(names, edges, strict=True) if math.isfinite(edge)}

    def charts(self, name: str, optimizers: Sequence[Optimizer]) -> dict[str, list[str]]:
        """Return the chart of the value between its edges."""
        edges = self.references(name, optimizers)
        return {f"edges of batches: {name}": [name, *edges]} if edges else {}

"""Metrics that have a value for the whole network and, if asked for, one for each of its layers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from lightning_flatness.estimators.arguments import check_arguments
from lightning_flatness.estimators.layers import layers_in
from lightning_flatness.geometry import Geometry
from lightning_flatness.landscape import LossLandscape
from lightning_flatness.metrics.base import Curve, FlatnessMetric

SEPARATOR = "/"
"""Between the name of a metric and that of a layer in logs."""


class LayeredMetric(FlatnessMetric):
    """A metric whose value ends with those of the layers if ``per_layer``: ``value[-len(layers):]``.

    Args:
        per_layer: Whether to measure layers.
        shape: Shape of the value without them.
        settings: See :class:`FlatnessMetric`.

    Attributes:
        layers: Their names, in the order of the weights; none before the first measurement.
    """

    geometry: Geometry

    def __init__(self, *, per_layer: bool = False, shape: tuple[int, ...] = (), **settings: Any) -> None:
        check_arguments({"per_layer": per_layer})
        super().__init__(shape=shape, **settings)
        self.per_layer = per_layer
        self._num_first = math.prod(shape)
        self.layers: tuple[str, ...] = ()

    def forward(self, landscape: LossLandscape) -> Any:
        """Measure and return the value."""
        if self.per_layer and isinstance(landscape, LossLandscape):
            with landscape.measurement():
                layers = layers_in(landscape, landscape.chart(self.geometry))
            size = self._num_first + len(layers)
            if self.value.numel() != size:  # torchmetrics puts the old value and the new one side by side
                for name in ("value", "error", "standard_error"):
                    setattr(self, name, torch.full((size,), math.nan, device=self.device))
        return super().forward(landscape)

    def store(self, result: Any, dtype: torch.dtype) -> None:
        """Keep the result of a measurement, and the names of the layers."""
        super().store(result, dtype)
        self.layers = getattr(result, "layers", ())

    def layered_curves(self, names: list[str], name: str) -> list[Curve]:
        """Return a point per number: of the whole network, then of the layers, ``hessian_trace/encoder.0``.

        Args:
            names: Curves of the whole network.
            name: The name of the metric in the logs.

        Returns:
            The points; not numbers where nothing is known.
        """
        names = [*names, *(f"{name}{SEPARATOR}{layer}" for layer in self.layers)]
        rows = [t.double().reshape(-1) for t in (self.value, self.error, self.standard_error)]
        numbers = torch.stack(rows, dim=1).tolist()
        numbers += [[math.nan] * 3] * (len(names) - len(numbers))
        return [Curve(curve, *point) for curve, point in zip(names, numbers, strict=True)]


def of_whole_networks(names: Iterable[str]) -> list[str]:
    """Return the curves that are not of a layer of another one.

    Example:
        >>> of_whole_networks(["lambda_max", "hessian_trace", "hessian_trace/encoder.0"])
        ['lambda_max', 'hessian_trace']
    """
    known = list(names)
    return [name for name in known if name.rpartition(SEPARATOR)[0] not in known]

"""The axis of a tensor that holds the units of a layer, through reshaping and pooling.

Tracing knows no shapes and needs none: a convolution has its units on the second axis, a linear layer on the last one,
and the number of positions per unit follows from the number of inputs of the next layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The place of the units. Methods return None if an operation would mix them.

    Attributes:
        kind: ``"channels"``: (batch, units, positions ...). ``"flat"``: (batch, units · positions), a unit's positions
            side by side. ``"last"``: (batch, ..., units), after a linear layer; flattened, the units of a position lie
            side by side.
        num_units: Number of units.
        num_spatial: Axes of positions, where the units are channels.
    """

    kind: Literal["channels", "flat", "last"]
    num_units: int
    num_spatial: int = 0

    def pooled(self, num_spatial: int) -> Layout | None:
        """Return the layout after pooling or padding over so many axes of positions."""
        return self if (self.kind, self.num_spatial) == ("channels", num_spatial) else None

    def flattened(self, start: Any, end: Any) -> Layout | None:
        """Return the layout after ``flatten(start, end)``."""
        if self.kind != "channels":
            return self if start == 1 and end == -1 else None
        num_axes = 2 + self.num_spatial
        if not isinstance(start, int) or not isinstance(end, int) or end % num_axes != num_axes - 1:
            return None
        start %= num_axes
        if start == 1:
            return Layout("flat", self.num_units)
        return Layout("channels", self.num_units, start - 1) if start >= 2 else None

    def viewed(self, sizes: Sequence[Any]) -> Layout | None:
        """Return the layout after ``view(*sizes)``, which may only flatten: ``view(batch, -1)``."""
        if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
            sizes = sizes[0]
        return self.flattened(1, -1) if len(sizes) == 2 else None

    def reduced(self, dims: Any, keepdim: Any = False) -> Layout | None:
        """Return the layout after a reduction over axes of positions, e.g. ``mean(dims, keepdim)``."""
        dims = [dims] if isinstance(dims, int) else dims
        if self.kind != "channels" or not isinstance(dims, Iterable):
            return None
        axes = {d % (2 + self.num_spatial) for d in dims if isinstance(d, int)}
        if min(axes, default=0) < 2:
            return None
        left = self.num_spatial if keepdim else self.num_spatial - len(axes)
        return Layout("channels", self.num_units, left) if left else Layout("flat", self.num_units)

    def squeezed(self, dims: Any) -> Layout | None:
        """Return the layout after ``squeeze(dims)``, of all axes of positions where ``dims`` is None."""
        return self.reduced(tuple(range(2, 2 + self.num_spatial)) if dims is None else dims)

    def columns_of_linear(self, num_inputs: int) -> Tensor | None:
        """Return the source unit of each column of a linear layer; a unit has one per position."""
        num_positions, rest = divmod(num_inputs, self.num_units)
        if self.kind == "channels" or rest:
            return None
        units = torch.arange(self.num_units, device="cpu")
        if self.kind == "flat":
            return units.repeat_interleave(num_positions)
        return units.repeat(num_positions)

    def columns_of_convolution(self, num_inputs: int, kernel: Sequence[int]) -> Tensor | None:
        """Return the same for a convolution, whose columns are taps of channels."""
        if (self.kind, self.num_units, self.num_spatial) != ("channels", num_inputs, len(kernel)):
            return None
        return torch.arange(num_inputs, device="cpu").repeat_interleave(math.prod(kernel))

"""Where the units of a layer are in the tensor that it returns, and what reshaping and pooling make of that.

Tracing knows no shapes, and none are needed: after a convolution the units are the second axis, a linear layer's are
the last one, and how many positions a unit has is read off the next layer's number of inputs.
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
    """Where the units are; methods return None where an operation would mix them.

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
        """Return the layout after axes of positions are taken away, e.g. by ``mean(dims, keepdim)``."""
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

    def columns_of_linear(self, num_inputs: int) -> tuple[Tensor, Tensor] | None:
        """Return which unit each column of a linear layer comes from, and each unit's column in the skeleton.

        Args:
            num_inputs: Number of columns; each unit has one for each of its positions, of which the middle one counts.
        """
        num_positions, rest = divmod(num_inputs, self.num_units)
        if self.kind == "channels" or rest:
            return None
        units = torch.arange(self.num_units)
        if self.kind == "flat":
            return units.repeat_interleave(num_positions), units * num_positions + num_positions // 2
        return units.repeat(num_positions), (num_positions // 2) * self.num_units + units

    def columns_of_convolution(self, num_inputs: int, kernel: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Return the same for a convolution, whose columns are the taps of each channel; the centre tap counts.

        Args:
            num_inputs: Number of input channels.
            kernel: Size of the kernel along each axis.
        """
        if (self.kind, self.num_units, self.num_spatial) != ("channels", num_inputs, len(kernel)):
            return None
        centre = 0
        for size in kernel:
            centre = centre * size + size // 2
        units, num_taps = torch.arange(num_inputs), math.prod(kernel)
        return units.repeat_interleave(num_taps), units * num_taps + centre

"""A chain of layers: which weights follow which, and which units they join."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lightning_flatness.geometry.base import UndefinedGeometryError
from lightning_flatness.geometry.path.tracing import PATH_HINT


@dataclass(frozen=True)
class ChainLayer:
    """A linear layer or convolution of the chain.

    Attributes:
        name: Its name in the module, e.g. ``"net.0"``.
        weight: Shape (units, ...).
        bias: Shape (units,), or None.
        sources: For each column of ``weight.flatten(1)``, its source unit in the previous layer.
        num_inputs: Number of units of the previous layer.
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    sources: Tensor
    num_inputs: int

    @property
    def num_units(self) -> int:
        """Number of units: outputs or channels."""
        return self.weight.shape[0]


@dataclass(frozen=True)
class Chain:
    """The layers from the input to the output.

    Attributes:
        layers: Linear layers and convolutions in order.
        slopes: Parameters of PReLU activations.
    """

    layers: list[ChainLayer]
    slopes: list[nn.Parameter]


def not_a_chain(found: str) -> UndefinedGeometryError:
    """Return the error for a module that is not a chain because of what was found."""
    return UndefinedGeometryError(
        "Expected a chain of linear layers and convolutions (groups=1) with positively homogeneous operations between "
        f"them for the geometry 'path', got {found}. {PATH_HINT}"
    )

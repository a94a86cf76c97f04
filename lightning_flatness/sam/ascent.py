"""SAM with one gradient a step: the perturbation is known before the gradient is, from the optimizer's own state.

SAM's ascent step needs a gradient of its own. Two directions are there already when a step begins: the momentum that
the optimizer keeps, and the gradient of the step before.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_flatness.sam.perturbation import optimized_parameters

Ascent = Literal["gradient", "momentum", "previous"]
"""Where the perturbation points: up the gradient of the same batch, down the momentum, or up the last gradient."""

ASCENTS = ("gradient", "momentum", "previous")

PREVIOUS_GRADIENT = "sam_previous_gradient"
"""Name of the last step's gradient in the state of the optimizer."""

_MOMENTUM = ("momentum_buffer", "exp_avg")
"""Names of the momentum in the states of torch's optimizers, and of most others."""


def check_ascent(ascent: str) -> None:
    """Raise an error unless ``ascent`` is the name of one.

    Raises:
        ValueError: If it is not.
    """
    if ascent not in ASCENTS:
        raise ValueError(
            f"Expected `ascent` to be one of {', '.join(map(repr, ASCENTS))}, got {ascent!r}. Use 'gradient' for SAM, "
            "the others for one gradient per step."
        )


def why_no_ascent(optimizer: Optimizer, ascent: str) -> str | None:
    """Return why an optimizer cannot give the direction, as a sentence with what to do; None if it can."""
    if ascent == "gradient":
        return None
    if any(base.__name__ == "ZeroRedundancyOptimizer" for base in type(optimizer).__mro__):  # slow to import
        return (
            f"Expected the whole state of the optimizer on every rank for ascent={ascent!r}, got "
            "ZeroRedundancyOptimizer. Use ascent='gradient'."
        )
    if ascent == "momentum" and not _buffers(optimizer) and not any(map(_may_have_momentum, optimizer.param_groups)):
        return (
            f"Expected an optimizer with momentum for ascent='momentum', got {type(optimizer).__name__} without. Use "
            "e.g. torch.optim.SGD(..., momentum=0.9) or torch.optim.AdamW, or ascent='previous'."
        )
    return None


def _may_have_momentum(group: dict[str, object]) -> bool:
    settings = [value for name, value in group.items() if "momentum" in name or "beta" in name]
    return any(not isinstance(value, bool) and bool(value) for value in settings)


def _buffers(optimizer: Optimizer, names: tuple[str, ...] = _MOMENTUM) -> list[tuple[Tensor, Tensor]]:
    """Return the parameters that have a buffer of these names in the optimizer's state, and the buffers."""
    states = [(p, optimizer.state[p]) for p in optimized_parameters(optimizer) if p in optimizer.state]
    found = [(p, next((s[n] for n in names if isinstance(s.get(n), Tensor)), None)) for p, s in states]
    return [(p, buffer) for p, buffer in found if buffer is not None]


def known_direction(optimizer: Optimizer, ascent: str) -> tuple[list[Tensor], list[Tensor], float]:
    """Return the direction of the coming step's perturbation.

    Args:
        optimizer: The optimizer that holds it in its state.
        ascent: ``"momentum"`` or ``"previous"``.

    Returns:
        Parameters, the direction of each, which may be the optimizer's own buffer, and the sign to move along it with:
        -1.0 for the momentum. Empty before the first step.

    Raises:
        RuntimeError: If the optimizer has made steps and keeps no momentum.
    """
    names = _MOMENTUM if ascent == "momentum" else (PREVIOUS_GRADIENT,)
    pairs = _buffers(optimizer, names)
    if not pairs and ascent == "momentum" and any(optimizer.state[p] for p in list(optimizer.state)):
        raise RuntimeError(
            f"Expected an optimizer whose state has a {' or '.join(map(repr, names))} for ascent='momentum', got "
            f"{type(optimizer).__name__} without. Use ascent='previous', which works with any optimizer."
        )
    pairs = [(p, buffer) for p, buffer in pairs if p.requires_grad]  # frozen ones stay where they are
    directions = [_dense(b).to(torch.promote_types(b.dtype, torch.float32)) for _, b in pairs]
    return [p for p, _ in pairs], directions, -1.0 if ascent == "momentum" else 1.0


class PreviousGradient:
    """Keeps the gradient of an optimizer's latest step in its state, and with it in checkpoints.

    It is taken before the step, because a step may change it (Nesterov's momentum, clipping), and kept after it: a step
    that a loss scaler skips keeps nothing, and before its first step an optimizer wants its state to be empty, also
    that of a single parameter whose gradient was taken away in between.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._taken: list[tuple[Tensor, Tensor | None]] = []

    def take(self) -> None:
        """Copy the gradients that the coming step will see."""
        parameters = optimized_parameters(self._optimizer)
        self._taken = [(p, None if p.grad is None else _dense(p.grad).clone()) for p in parameters]

    def keep(self) -> None:
        """Keep what was taken: the step has been made."""
        for parameter, gradient in self._taken:
            if gradient is not None:
                if parameter.grad is not None or self._optimizer.state.get(parameter):
                    self._optimizer.state[parameter][PREVIOUS_GRADIENT] = gradient
            elif parameter in self._optimizer.state:
                self._optimizer.state[parameter].pop(PREVIOUS_GRADIENT, None)
        self._taken = []


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.layout == torch.strided else tensor.to_dense()

"""The geometry that an adaptive optimizer sees: distances measured as its preconditioner measures them.

Adam divides the step of every weight by ``sqrt(v_hat) + eps``. In the coordinates ``w = w0 + P^(-1/2) z`` with that
diagonal P, its steps are plain (momentum) gradient steps, so the curvature that decides whether it is stable is that
of ``P^(-1/2) H P^(-1/2)``: the preconditioned sharpness of arXiv 2207.14484.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_flatness.geometry.base import Geometry, LinearGeometry
from lightning_flatness.geometry.known_optimizers import (
    KNOWN_OPTIMIZERS,
    is_preconditioned,
    known_optimizer,
    unwrapped_optimizers,
)
from lightning_flatness.module.sharding import sharded_form, whole


class MissingOptimizerStateError(ValueError):
    """The optimizer has not made a step yet, so its preconditioner is not there."""


class OptimizerGeometry(LinearGeometry):
    r"""``w = w0 + P^(-1/2) z`` with the diagonal ``P`` that the running optimizer divides its steps by.

    SGD: ``P = I``, with and without momentum. Adam, AdamW: ``P = sqrt(v_hat) + eps`` with the bias correction
    ``v_hat = v / (1 - beta2^t)`` (and the maximum of ``v`` with ``amsgrad``). RMSprop: ``P = sqrt(v) + eps`` (centred:
    of the variance). Adagrad: ``P = sqrt(sum g²) + eps``. Learning rates, momentum and its bias correction, and weight
    decay are not in ``P``; see :func:`stability_edge`.

    A weight that the optimizer does not hold, or holds but has never stepped (it had no gradient), does not move
    under it and gets the scale 0.

    Args:
        optimizer: The optimizer, or several that share the parameters. None, as in the name ``"optimizer"``: the
            ``optimizer`` of the landscape, which the ``FlatnessMonitor`` sets to those of the Trainer.

    Raises:
        TypeError: If an optimizer is none of those named; in ``chart``, if there is none.
        MissingOptimizerStateError: In ``chart``, if an adaptive optimizer has not made a step yet.

    Example:
        >>> from lightning_flatness import LossLandscape, OptimizerGeometry, TopEigenvalues
        >>> module = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.Adam(module.parameters(), eps=0.0)
        >>> module(torch.tensor([4.0])).backward()
        >>> optimizer.step()  # after one step v_hat is the gradient squared: P = 4
        >>> landscape = LossLandscape(module, [torch.tensor([[1.0]])], lambda m, x: m(x).square().mean())
        >>> metric = TopEigenvalues(geometry=OptimizerGeometry(optimizer))
        >>> metric.update(landscape)
        >>> metric.compute()  # P^(-1/2) H P^(-1/2) = 2 / 4
        tensor(0.5000)
    """

    name = "optimizer"

    def __init__(self, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> None:
        self.optimizers = None if optimizer is None else unwrapped_optimizers(optimizer)
        for each in self.optimizers or ():
            _check_supported(each)

    def for_optimizer(self, optimizer: Optimizer | Sequence[Optimizer] | None) -> Geometry:
        """Return the geometry of ``optimizer``, unless this one has been given an optimizer of its own."""
        return self if self.optimizers is not None or optimizer is None else OptimizerGeometry(optimizer)

    def scales(self, module: nn.Module, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        """Return ``P^(-1/2)``; None for SGD that holds all parameters."""
        if self.optimizers is None:
            raise TypeError(
                "Expected an optimizer for the geometry 'optimizer', got none. Pass LossLandscape(..., optimizer=...), "
                "or geometry=OptimizerGeometry(optimizer); in the FlatnessMonitor the name is enough."
            )
        held = {id(p): (each, g) for each in self.optimizers for g in each.param_groups for p in g["params"]}
        own = [sharded_form(p) for p in parameters]
        if all(id(p) in held and not is_preconditioned(held[id(p)][0]) for p in own):
            return None
        diagonals = [_preconditioner(*held[id(p)], p) if id(p) in held else None for p in own]
        if all(d is None for d in diagonals):
            names = sorted({type(each).__name__ for each in self.optimizers})
            raise MissingOptimizerStateError(
                f"Expected an optimizer that has stepped the weights of this module, got {', '.join(names)} without "
                "state for any of them: its preconditioner comes from the gradients it has seen. Measure after the "
                "first step."
            )
        return [
            torch.zeros((), device=p.device) if d is None else whole(d).to(p.device).rsqrt()
            for d, p in zip(diagonals, parameters, strict=True)
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizerGeometry:
        """Share the optimizer: a copy of it would hold copies of the parameters, not those of the module."""
        return OptimizerGeometry(self.optimizers)

    def __repr__(self) -> str:
        names = [type(each).__name__ for each in self.optimizers or ()]
        return f"OptimizerGeometry({', '.join(names)})"


def _check_supported(optimizer: Optimizer) -> None:
    if known_optimizer(optimizer) is None:
        *others, last = (kind.__name__ for kind in KNOWN_OPTIMIZERS)
        raise TypeError(
            f"Expected one of {', '.join(others)} and {last} for the geometry 'optimizer', got "
            f"{type(optimizer).__name__}, whose preconditioner is not known. Use another geometry."
        )


def _preconditioner(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Tensor | None:
    """Return the diagonal of P for one tensor, as torch computes it in ``step``; None before the first step."""
    known = known_optimizer(optimizer)
    assert known is not None
    if known.squares is None:
        return torch.ones_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
    state = optimizer.state.get(parameter, {})
    if float(state.get("step", 0)) == 0:
        return None
    return known.squares(state, group).sqrt() + float(group["eps"])

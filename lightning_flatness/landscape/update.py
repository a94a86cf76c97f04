"""The update that an optimizer has made: the change of the weights in one step, whatever made it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_flatness.geometry import unwrapped_optimizers
from lightning_flatness.module.sharding import sharded_form, whole


class MissingUpdateError(ValueError):
    """No optimizer step is known that has led to the current weights."""


class OptimizerStep:
    r"""One step of an optimizer as it happened, for measures along its update: weights before minus weights after.

    Any optimizer will do: only the weights before and after the block are looked at. Their difference has all that the
    step did: momentum, preconditioning, clipping, weight decay. The update is ``u = (w_before - w_after) / eta``, so
    that ``w_after = w_before - eta u``, with the learning rate eta of the step; of several groups or optimizers the
    largest one, so that another eta multiplies the learning rates of all groups by the same factor.

    Holds one copy of the weights; of weights that are sharded (FSDP2, tensor parallelism) only this rank's part.

    Args:
        optimizer: What makes the step, or several of them.

    Attributes:
        learning_rate: eta; not a number without one.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = torch.optim.SGD([w], lr=0.5)
        >>> w.square().sum().backward()
        >>> with OptimizerStep(optimizer) as update:
        ...     optimizer.step()
        >>> update.change([w]) / update.learning_rate  # the gradient
        tensor([2., 4.])
    """

    def __init__(self, optimizer: Optimizer | Sequence[Optimizer]) -> None:
        self.optimizers = unwrapped_optimizers(optimizer)
        self.learning_rate = math.nan
        self._is_open = False
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self) -> None:
        """Copy the weights before the step."""
        groups: list[dict[str, Any]] = [group for each in self.optimizers for group in each.param_groups]
        self.learning_rate = max((float(g["lr"]) for g in groups if g.get("lr") is not None), default=math.nan)
        self._is_open = True
        self._held = {id(p): (p, p.detach().clone()) for g in groups for p in g["params"] if p.requires_grad}

    @torch.no_grad()
    def end(self) -> None:
        """Look at the weights after the step; a second call changes nothing."""
        if self._is_open:
            self._is_open = False
            for p, before in self._held.values():
                before.sub_(p.detach())

    def __enter__(self) -> OptimizerStep:
        self.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()

    def change(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return the weights before minus those after as a flat vector, float32 at least; all ranks call it together.

        Args:
            parameters: The weights; zeros for those that the optimizer does not hold.
        """
        return torch.cat([self._piece(p).flatten() for p in parameters])

    def changes(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the same piece by piece, sharded as the weights are; None for those that the optimizer does not hold.

        Args:
            parameters: The weights.
        """
        found = [self._held.get(id(sharded_form(p))) for p in parameters]
        return [None if held is None else held[1] for held in found]

    def _piece(self, parameter: Tensor) -> Tensor:
        (held,) = self.changes([parameter])
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if held is None:
            return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        return whole(held).to(parameter.device, dtype)
